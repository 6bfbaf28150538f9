"""Texts at each validation of a run."""

import json

import pytest
from processes import run_imported

from trainit.__main__ import main as trainit_command
from trainit.cluster import devices

PROMPTS = ("some words", "")


def train(data, workdir, *flags: str, **expect: int) -> str:
    about = [f"--config.dataset.path={data}", f"--workdir={workdir}", f"--config.eval.prompts={PROMPTS}"]
    about += ["--config.eval.every_steps=2", "--config.model.attn_dropout=0", "--config.eval.length=9"]
    return run_imported("--config=tests/tiny.py", *about, *flags, **expect)


@pytest.mark.evidence("texts at a validation are those of the checkpoint of that step, on any mesh")
def test_samples_are_those_of_the_checkpoint(random_dataset, tmp_path, monkeypatch, capsys):
    """On eight devices, in a job that is resumed on a mesh that splits sequences; then the command, on this
    process's devices."""
    output = train(random_dataset, tmp_path, "--config.steps=2")
    assert "step 2: 2 texts" in output
    overwrite = ["--config.checkpoint.overwrite_config=True"]
    split = ["--config.mesh.fsdp=1", "--config.mesh.context=2"]
    train(random_dataset, tmp_path, "--config.steps=4", *overwrite, *split)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (0, 2, 4) for prompt in PROMPTS
    ]
    assert all(line["tokens"] == 9 or line["ended"] == "end_of_text" for line in lines)
    monkeypatch.setattr(devices, "configure", lambda *_, **__: None)  # JAX runs already
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    capsys.readouterr()
    flags = [f"--prompts={tmp_path}/p.jsonl", "--length=9", "--json"]
    assert trainit_command(["generate", str(tmp_path), *flags]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines[-2:]] == [line["text"] for line in again]


def test_a_prompt_that_fills_the_context_is_refused_at_once(random_dataset, tmp_path):
    long = f"--config.eval.prompts=('{'a' * 40}',)"
    output = train(random_dataset, tmp_path, long, expect=2)
    assert "has 40 tokens, and the model's context is of 32" in output.splitlines()[-1]
