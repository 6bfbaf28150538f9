"""The command that measures a GPU, in the form that it has on a CPU, and what becomes of parts that fail."""

import contextlib
import importlib.util
import itertools
import json
import time
from pathlib import Path

import pytest

from trainit.config import ConfigError
from trainit.tools.benchmark import card, card_parts, children
from trainit.tools.benchmark.card import PARTS, Card, share

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def without_torch(monkeypatch):
    find = importlib.util.find_spec
    hidden = {"torch", "transformers"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )


def rows(text: str) -> list[list[str]]:
    """The cells of a table in Markdown, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.evidence(
    "the command that measures a GPU runs as a whole on a CPU, with a real run and its resume"
)
def test_every_part_runs_on_a_cpu(tmp_path, monkeypatch, without_torch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert card.measure(120, 1, tmp_path / "table.md") == 0, capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("No GPU: a CPU") and "`trainit benchmark --suite=gpu --minutes=120`" in text
    assert text in capsys.readouterr().out
    found = rows(text)
    assert [name for name, _ in itertools.groupby(row[0] for row in found)] == [
        *("product", "124M", "attention", "run", "plan", "float8")
    ]
    cells = {row[1]: row[2:] for row in found}
    assert cells["torch.compile"][0].startswith("torch and transformers are not installed")
    assert cells["losses of 50 steps"][2] == "at most 1%: reached"
    assert cells["10 steps of the debug run"][0].startswith("loss 9.0")  # ln(8192), that of guessing
    assert cells["again from step 5"] == [
        *("5 losses, 0 apart at most", "", "the same, bit for bit: reached")
    ]


def measured(kind: str, folder: Path, minutes: float = 8, rounds: int = 1) -> Card:
    return Card(kind, minutes, rounds, folder / "table.md", folder)


def test_a_part_fails_alone(tmp_path, capsys):
    """The others still run, the table still comes, and the exit code says that something failed."""
    one = measured(H100, tmp_path)

    def fail():
        error = MemoryError("RESOURCE_EXHAUSTED: | out\nof memory")
        error.add_note("where it was")
        raise error

    one.parts = {name: lambda: one._add("it", "1 ms") for name in PARTS} | {"attention": fail}
    assert one.measure() == 1
    found = rows((tmp_path / "table.md").read_text().replace("\\|", "/"))
    assert [row[0] for row in found] == list(PARTS)
    assert {row[2] for row in found if row[0] != "attention"} == {"1 ms"}
    assert [row[2] for row in found if row[0] == "attention"] == [
        "failed: RESOURCE_EXHAUSTED: / out of memory"
    ]


def test_minutes_are_divided(tmp_path, monkeypatch):
    """By the parts' shares; what one leaves is for those after it."""
    assert sum(PARTS.values()) == 8 * 60
    assert (share(100, [1, 3]), share(100, [1]), share(-5, [1, 3])) == (25, 100, 0)
    now = [0.0]
    monkeypatch.setattr(card.time, "monotonic", lambda: now[0])
    one, limits = measured(H100, tmp_path), {}

    def part():
        limits[one.part] = one.deadline - now[0]
        now[0] += 10.0

    one.parts = dict.fromkeys(PARTS, part)
    one.measure()
    assert limits["product"] == pytest.approx(20)
    assert limits["124M"] == pytest.approx(95 / 460 * 470)
    assert limits["350M"] == pytest.approx(480 - 7 * 10)  # all that is left
    monkeypatch.setattr(children, "run", lambda *_, **__: pytest.fail("it is started without any time"))
    one.deadline = now[0]
    with pytest.raises(ConfigError, match="no time was left"):
        one._child("nothing")


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    hangs = "import subprocess, sys, time\np = subprocess.Popen(['sleep', '600'])\n"
    hangs += "open(sys.argv[1], 'w').write(str(p.pid))\ntime.sleep(600)\n"
    (tmp_path / "hangs.py").write_text(hangs)
    (tmp_path / "fails.py").write_text("print('out')\nraise MemoryError('the reason\\nand more')")
    settings = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(ChildProcessError, match="not done after 5 s"):
        children.run("hangs", f"{tmp_path}/pid", settings=settings, limit=5)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    end = time.monotonic() + 20
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while "zombie" not in status.read_text():
            assert time.monotonic() < end, "what it started still runs"
            time.sleep(0.05)
    with pytest.raises(ChildProcessError, match="the reason") as caught:
        children.run("fails", settings=settings)
    assert str(caught.value) == "MemoryError: the reason"
    assert "fails.py" in caught.value.__notes__[0] and "and more" in caught.value.__notes__[0]


@pytest.mark.parametrize("torch", [True, False])
def test_speeds_are_judged_by_their_goals(tmp_path, monkeypatch, torch):
    """124M by hand: 6 (12 * 12 * 768**2 + 768 * 50304) + 12 * 12 * 1024 * 768 a token, 32 * 1024 tokens."""
    flops = (6 * (144 * 768**2 + 768 * 50304) + 144 * 1024 * 768) * 32 * 1024
    seconds = {"trainit": flops / (0.55 * 989.4e12), "torch_compile": flops / (0.5 * 989.4e12)}
    started = []

    def run(module, program, size, *rest, settings, limit):
        started.append(program)
        if program == "torch_compile" and not torch:
            raise ChildProcessError("OutOfMemoryError: CUDA out of memory")
        result = {"first": 30.0, "seconds": [9.0, seconds[program], 0.0], "peak": 2e9, "loss": 9.0}
        return f"{json.dumps(result)}"

    monkeypatch.setattr(children, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    one = measured(H100, tmp_path, rounds=2)
    one.deadline = card.time.monotonic() + 1000
    one.part = "124M"
    one.parts["124M"]()
    trainit = next(row for row in one.rows if row[1] == "Trainit's defaults")
    assert trainit[2].startswith("55.0% MFU") and trainit[4] == "50% MFU: reached"
    assert trainit[3] == "2.00 GB, step 1 after 30.0 s"
    assert one.failed is not torch
    if torch:
        assert started == ["trainit", "torch_compile"] * 2
        assert one.rows[1][3].startswith("Trainit is 1.10 times as fast")
        assert one.rows[1][4] == "1.15 times: missed"
    else:  # it is not tried again
        assert started == ["trainit", "torch_compile", "trainit"]
        assert one.rows[0][1:3] == ["torch_compile", "failed: OutOfMemoryError: CUDA out of memory"]


def test_a_plan_needs_a_card_that_it_knows():
    with pytest.raises(ConfigError, match=r"a plan knows .*H100.* and not NVIDIA A10"):
        list(card_parts.plan("tiny", "NVIDIA A10", "{}"))


def test_a_table_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"--output=.*No such file or directory"):
        Card(H100, 8, 1, tmp_path / "nowhere" / "table.md", tmp_path).measure()
    assert not list(tmp_path.iterdir())
