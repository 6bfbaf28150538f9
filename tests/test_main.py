"""The command as users type it: what goes wrong is one line and exit code 2; --debug shrinks anything."""

import json
import shutil

import pytest
from processes import ROOT, metrics, run, run_imported

DEBUG = "--config=configs/debug.py"
TINY = f"--config={ROOT}/tests/tiny.py"
CUDA = "--config.platform=cuda"  # there is none here


def error_of(*args) -> str:
    """The one line that a wrong command ends with."""
    output = run_imported(*args, expect=2)
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, output
    assert output.splitlines()[-1] == lines[0]
    assert lines[0].startswith("trainit: error: ")
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ("--config=FILE is missing",)),
        (("--config=configs/none.py",), ("configs/none.py: there is no such file",)),
        ((DEBUG, "train"), ("'train' is no flag",)),
        ((DEBUG, "--confg.steps=3"), ("confg.steps",)),
        ((f"{DEBUG}:modle=gpt2",), ("unknown group 'modle=gpt2'", "dataset, diagnostics, model, optimizer")),
        ((f"{DEBUG}:model=gpt7",), ("unknown model 'gpt7'", "gpt2_medium")),
        ((DEBUG, "--config.step=3"), ("unknown field config.step;", "did you mean config.steps?")),
        ((DEBUG, "--config.model.width=3"), ("unknown field config.model.width;", "dim", "num_heads")),
        ((DEBUG, "--config.steps.x=3"), ("unknown field config.steps.x",)),
        ((DEBUG, "--config.steps=many"), ("config.steps", "many")),
        ((DEBUG, "--config.model.dim=1.5"), ("config.model.dim", "1.5")),
        ((DEBUG, "--config.batch_size=6"), ("batch_size=6", "mesh.data*mesh.fsdp=4")),
        ((DEBUG, "--config.mesh.data=4"), ("data 4, fsdp 2, tensor 2", "16 devices", "there are 8")),
        ((DEBUG, "--config.cpu_devices=4"), ("8 devices", "there are 4")),
        ((DEBUG, "--config.model.vocab_size=8000"), ("model.vocab_size=8000", "tokenizer's 8192")),
        ((DEBUG, "--config.dataset.path=data/none"), ("data/none", "does not exist")),
        ((DEBUG, "--config.model.attention=cudnn"), ("model.attention=cudnn", "platform=cpu")),
        ((DEBUG, "--config.optimizer.name=sgdm"), ("optimizer.name=sgdm", "FILE:optimizer=sgdm")),
        ((DEBUG, "--config.optimizer.name=nope"), ("optimizer.name='nope'", "ada_ftrl, adafactor")),
        ((DEBUG, "--config.platform=cuda"), ("platform='cuda' cannot be used here: ", "backend")),
        # Of the optimizer all is known before a device is asked for.
        (
            (f"{DEBUG}:optimizer=muon", "--config.optimizer.ns_steps=0", CUDA),
            ("optimizer.ns_steps=0 must be",),
        ),
        ((f"{DEBUG}:optimizer=sgdm", "--config.optimizer.name=adam", CUDA), ("FILE:optimizer=adam",)),
        (
            (DEBUG, "--config.parameter_groups=('tail/.* beta1=0.5',)", CUDA),
            ("no parameter is left for 'tail",),
        ),
        (
            (DEBUG, "--config.parameter_groups=('blocks/.* optimizer=sophia',)", CUDA),
            ("must have all parameters",),
        ),
        (
            (DEBUG, "--config.checkpoint.load_path=runs/none"),
            ("load_path='runs/none' has no checkpoint; ", "there are none in /", "/runs/none/checkpoints"),
        ),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, tuple) else None,
)
def test_wrong_commands(args, parts, tmp_path):
    workdir = () if any(a.startswith("--workdir") for a in args) else (f"--workdir={tmp_path}",)
    line = error_of(*args, *workdir)
    for part in parts:
        assert part in line


def test_wrong_folders(random_dataset, tmp_path):
    (tmp_path / "file").touch()
    line = error_of(TINY, f"--config.dataset.path={random_dataset}", f"--workdir={tmp_path}/file/run")
    assert "file/run cannot be written: Not a directory" in line
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    assert "unfinished" in error_of(TINY, f"--config.dataset.path={unfinished}", f"--workdir={tmp_path}/run")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("return undefined_name", "NameError: name 'undefined_name'"),
        ("from trainit.config import defaults; c = defaults(); c.modle.dim = 3", "AttributeError: "),
        ("assert False", "AssertionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("return {}['a']", "KeyError: 'a'"),
    ],
)
def test_a_config_file_that_raises(body, part, tmp_path):
    (tmp_path / "broken.py").write_text(f"def get_config(arg=''):\n    {body}\n")
    line = error_of(f"--config={tmp_path}/broken.py", f"--workdir={tmp_path}")
    assert f"broken.py raises {part}" in line
    assert line.rstrip().endswith("(line 2)")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("def get_config(arg):\n    pass\n", "own.py: get_config returns a NoneType, not a config"),
        ("def config(arg):\n    pass\n", "own.py raises KeyError: 'get_config'"),
        (
            "def get_config(arg):\n    f(\n",
            "raises SyntaxError: '(' was never closed (own.py, line 2)",
        ),
    ],
)
def test_a_config_file_that_gives_no_config(body, part, tmp_path):
    (tmp_path / "own.py").write_text(body)
    assert part in error_of(f"--config={tmp_path}/own.py", f"--workdir={tmp_path}")


def test_damaged_datasets(random_dataset, tmp_path):
    """Whatever is wrong with the dataset or its tokenizer is known before training, not after."""
    from trainit.prepare.demo import write_dataset
    from trainit.tokenizers import ByteTokenizer

    for number, (file, content, part) in enumerate(
        [
            ("dataset.json", b"{", "dataset.json is damaged"),
            ("dataset.json", b"[]", "dataset.json is damaged"),
            ("dataset.json", b'{"format": 3}', "dataset.json is damaged ('splits')"),
            ("tokenizer.model", b"another", "SHA-256"),
        ]
    ):
        folder = shutil.copytree(random_dataset, tmp_path / str(number))
        (folder / file).write_bytes(content)
        assert part in error_of(TINY, f"--config.dataset.path={folder}", f"--workdir={tmp_path}/run")
    write_dataset(tmp_path / "empty", ByteTokenizer(), {"train": ["abc"], "validation": ["", ""]})
    line = error_of(TINY, f"--config.dataset.path={tmp_path}/empty", f"--workdir={tmp_path}/run")
    assert "split validation has 2 tokens of 0 bytes" in line


def test_debug_runs_the_cluster_config_here_and_refuses_another_model(tmp_path):
    """The benchmark shrunk: the demo text in place of the missing Pile, eight devices, ten steps."""
    command = "--config=configs/pile_gpt.py", "--debug", f"--workdir={tmp_path}", "--config.mesh.tensor=4"
    output = run_imported(*command)
    assert "data 1 × fsdp 2 × tensor 4" in output
    assert "done       all 10 steps" in output
    assert [r["step"] for r in metrics(tmp_path)] == list(range(11))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["dim"] == 96
    assert config["precision"] == "bfloat16"

    line = error_of(*command, "--config.model.dim=128", "--config.model.num_blocks=3")
    changes = "dim: 96 -> 128", "head_dim: 24 -> 32", "mlp_dim: 384 -> 512", "num_blocks: 2 -> 3"
    assert "; ".join(f"model.{change}" for change in changes) in line
    assert "overwrite_config=True" in line
    line = error_of(*command, "--config.model.dim=128", "--config.checkpoint.overwrite_config=True")
    assert "params/blocks/attention/key/bias is float32[2,4,24] there and float32[2,4,32] here" in line


def test_groups_and_overrides_reach_the_run(random_dataset, tmp_path):
    output = run(
        f"{TINY}:optimizer=sgdm,schedule=trapezoid",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}",
        "--config.steps=10",
        "--config.schedule.warmup=2",
        "--config.optimizer.learning_rate=0.5",
        "--config.checkpoint.save_steps=4,6",
        "--config.log.every_steps=2",
        "--config.dataset.workers=1",
        "--config.parameter_groups=('head/.* optimizer=adamw learning_rate=0.1',)",
    )
    assert "group      adamw, learning rate 0.1, weight decay 0.1: head/kernel\n" in output
    assert "group      sgdm, learning rate 0.5, weight decay 0: blocks/attention/key/bias, " in output
    rates = {r["step"]: r["train/learning_rate"] for r in metrics(tmp_path) if r["step"]}
    # Two steps up, then 0.5; over the last 20 % down: steps 8 and 9 of 0-based 10.
    assert rates == pytest.approx({2: 0.25, 4: 0.5, 6: 0.5, 8: 0.5, 10: 0.25})
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 10]


def test_a_run_goes_on_with_the_optimizer_file_that_it_began_with(random_dataset, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from trainit.optimizers.sgdm import get_config, make  # noqa: F401\n")
    command = (
        f"{TINY}:optimizer={own}",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}/run",
    )
    small = ("--config.steps=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--config.cpu_devices=2")
    run_imported(*command, *small)
    own.write_text(own.read_text() + "# another\n")
    line = error_of(*command, *small)
    assert "was made with another config (optimizer_files: '" in line


def test_a_batch_that_grows_is_the_run_gone_on_with_a_larger_one(random_dataset, tmp_path):
    """Bit for bit the run that was resumed with the other size; and it can be resumed within a stage."""
    command = [
        f"{TINY}:schedule=constant",
        f"--config.dataset.path={random_dataset}",
        "--config.batch_size=8",
    ]
    command += ["--config.schedule.warmup=2", "--config.eval.every_steps=0", "--config.eval.sequences=8"]
    command += ["--config.cpu_devices=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    grown = [*command, "--config.steps=6", "--config.batch_schedule=3: 16", f"--workdir={tmp_path}/grown"]
    output = run_imported(*grown, "--config.checkpoint.save_steps=4")
    assert "from step 3 on 16: 4 × 2" in output
    assert "batch      16 sequences from step 3 on" in output
    by_hand = [*command, f"--workdir={tmp_path}/by_hand"]
    run_imported(*by_hand, "--config.steps=3")
    larger = ["--config.batch_size=16", "--config.checkpoint.overwrite_config=True"]
    run_imported(*by_hand, "--config.steps=6", *larger)

    def losses(folder):
        return [(r["step"], r["tokens"], r["train/loss"]) for r in metrics(tmp_path / folder)]

    once = losses("grown")
    assert [tokens for _, tokens, _ in once] == [32 * n for n in (8, 16, 24, 40, 56, 72)]
    assert once == losses("by_hand")
    shutil.rmtree(tmp_path / "grown/checkpoints/6")
    assert "resume     at step 4" in run_imported(*grown)
    assert losses("grown") == once
