"""The command: what it prints, and what it refuses."""

import io
import json
import re
import types

import pytest
from finished import make_run

from trainit.__main__ import main as trainit_command
from trainit.cluster import devices


@pytest.fixture(scope="module")
def run(random_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, random_dataset, 257, 256)
    return folder


@pytest.fixture
def generate(run, monkeypatch, capsys):
    """A function that runs the command: its exit code and its output."""
    monkeypatch.setattr(devices, "configure", lambda *_, **__: None)  # JAX runs already

    def call(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = trainit_command(["generate", str(run), *flags])
        return code, *capsys.readouterr()

    return call


def objects(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_one_prompt_several_and_the_input(generate, tmp_path, monkeypatch):
    """The same texts, whichever way prompts come."""
    code, shown, log = generate("--prompt=one two", "--length=9")
    assert code == 0
    assert "step 7, float32" in log
    _, output, _ = generate("--prompt=one two", "--length=9", "--json")
    [one] = objects(output)
    assert shown == f"one two{one['text']}\n"
    assert (one["prompt"], one["tokens"], one["ended"]) == ("one two", 9, "length")

    (tmp_path / "p.txt").write_text("one two\n\nthree\n")
    flags = ("--length=9", "--number=2", "--temperature=1", "--json")
    _, output, _ = generate(f"--prompts={tmp_path}/p.txt", *flags)
    four = objects(output)
    assert [(o["prompt"], o["number"]) for o in four] == [
        *(("one two", 0), ("one two", 1)),
        *(("three", 0), ("three", 1)),
    ]
    assert len({o["text"] for o in four}) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n\nthree\n"))
    assert objects(generate(*flags, "--rows=3")[1]) == four
    _, output, _ = generate(f"--prompts={tmp_path}/p.txt", *flags[:-1])
    headings = [f"--- prompt {o}, {n} of 2" for o in (1, 2) for n in (1, 2)]
    bodies = [o["prompt"] + o["text"] for o in four]
    assert output == "".join(f"{h}\n{b}\n" for h, b in zip(headings, bodies, strict=True))


def test_stops_and_the_context(generate):
    whole = objects(generate("--prompt=one two", "--length=400", "--json")[1])[0]
    if whole["ended"] != "end_of_text":
        assert (whole["ended"], whole["tokens"]) == ("context", 32 - 7)
        assert "after the model's context of 32 tokens" in generate("--prompt=one two", "--length=400")[2]
    stop = whole["text"][5:7]
    cut = objects(generate("--prompt=one two", "--length=400", "--json", "--stop=\0\0", f"--stop={stop}")[1])
    assert (cut[0]["text"], cut[0]["ended"]) == (whole["text"].partition(stop)[0], "stop")


def test_it_asks_at_a_terminal(generate, monkeypatch):
    """Each line is a prompt of its own; an error ends none of the others."""
    typed = iter(["one two", "a" * 40, "one two"])

    def read(shown: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", read)
    code, output, errors = generate("--length=5")
    first, second, last = output.split("\n", 2)
    assert (code, first, last) == (0, second, "\n")
    assert first.startswith("one two")
    assert errors.count("has 40 tokens, and the model's context is of 32") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=" + "a" * 32], "has 32 tokens, and the model's context is of 32, .* shorten it"),
        (["--prompt=a", "--prompts=b"], "--prompt and --prompts exclude each other"),
        (["--prompts=no.txt"], "--prompts=no.txt: No such file"),
        (["--prompt=a", "--top_p=0.9"], "--top_p=0.9 needs --temperature above 0"),
        (["--prompt=a", "--temperature=1", "--top_p=0"], "--top_p=0 leaves no token"),
        (["--prompt=a", "--temperature=-1"], "-1 must be at least 0"),
        (["--prompt=a", "--stop="], "--stop= is empty"),
        (["--prompt=a", "--step=3"], r"has no checkpoint of step 3; there are \[7\]"),
        (["--prompt=a", "--tokenizer=gpt2"], "has 50257 ids and the model 384"),
        (["--prompt=a", "--tokenizer=none"], "--tokenizer=none: a text needs a tokenizer"),
        ([], "no prompt: give --prompt=TEXT"),
    ],
)
def test_what_is_refused(flags, message, generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, output, errors = generate(*flags)
    last = errors.splitlines()[-1]
    assert (code, output) == (2, "")
    assert re.search(message, last), errors
