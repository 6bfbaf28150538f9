"""Every command and every piece of code in the README runs as it stands there: minutes, for .ci/run."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, metrics

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
CODE = re.findall(r"```python\n(.*?)```", README, re.S)
IN_CI = [line for line in COMMANDS if line.startswith("pip ")]  # which .ci/run runs
SHORT = {  # added so that a command that trains for minutes takes seconds; nothing else changes
    "trainit.main": [
        "--config.steps=6",
        "--config.eval.every_steps=3",
        "--config.checkpoint.save_steps=3",
    ],
    "trainit.tools.benchmark": ["--tokens=2000000", "--steps=3"],
}


REPORTS = (
    r"8 × cpu, \d+ cores, JAX",
    r"loader +[\d.]+ M tokens/s  through Grain",
    r"loader +[\d.]+ times the speed of random crops",
    r"loader +[\d.]+ M tokens/s  read from the disk; [\d.]+ times",
    r"loader +[\d.]+ ms  to the first batch of a resume at step 1,000,000",
    r"loader +[1-4]?\d\d MiB  of a whole process that reads of 300 billion tokens",
    r"step +[\d.]+ ms  median of 3",
    r"step +\d+ tokens/s  [\d.]+ TFLOP/s",
    r"step +[\d.]+ GiB  on a device at most: parameters [\d.]+, optimizer [\d.]+, gradients [\d.]+, act",
    r"step +time: .*\d+%",
    r"step +exchanged: reduce-scatter over fsdp: [\d.]+ MiB a device and step",
    r"save +[\d.]+% of the time",
)


def code(part: str) -> str:
    """The README's only piece of code that contains this."""
    (block,) = [block for block in CODE if part in block]
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place that looks like a clone, with a short run in runs/debug."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "trainit", "launch"):
        (folder / name).symlink_to(ROOT / name)
    execute(folder, "python -m trainit.main --config=configs/debug.py")
    with contextlib.chdir(folder):
        exec(compile(code("write_text"), "README.md", "exec"), {})
    (folder / "signum.py").write_text(code("Signum"))
    sweep = code("get_sweep")
    for long, short in (("5e-4, 1e-3, 2e-3", "1e-3"), ("1, 2, 3", "1, 2"), ('"steps": 100', '"steps": 3')):
        assert long in sweep
        sweep = sweep.replace(long, short)
    (folder / "rates.py").write_text(sweep)
    return folder


def execute(folder, command: str, short: bool = True) -> str:
    words = shlex.split(command)
    if words[0] == "launch/local.sh":
        start, module, arguments = words[:1], "trainit.main", words[1:]
    else:
        assert words[:2] == ["python", "-m"]
        start, module, arguments = [sys.executable, *words[1:3]], words[2], words[3:]
    given = {argument.split("=")[0] for argument in arguments}
    extra = [a for a in SHORT.get(module, []) if a.split("=")[0] not in given] if short else []
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        [*start, *arguments, *extra],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in IN_CI], ids=lambda c: c[10:70])
def test_commands(command, folder):
    """In the order in which they stand there; the run that is trained on ends sooner than in the README."""
    output = execute(folder, command.replace("--config.steps=260", "--config.steps=8"))
    if "--sweep" in command:
        check_sweep(output)
    for pattern in REPORTS if "trainit.tools.benchmark" in command and "--sweep" not in command else ():
        assert re.search(pattern, output), (pattern, output)


def check_sweep(output: str):
    """All that can be is tried, and the best are the best of these."""
    tried = re.findall(r"^sweep +([\d.]+) ms +([\d.]+) GiB +[\d.]+ s to compile  (.*)$", output, re.MULTILINE)
    *rows, fastest, smallest = tried
    assert {"as the config has it", "attention=plain"} <= {row[2] for row in rows}
    assert re.search(r"cudnn.*cannot be: model.attention=cudnn needs an NVIDIA GPU", output)
    assert float(fastest[0]) == min(float(row[0]) for row in rows)
    assert float(smallest[1]) == min(float(row[1]) for row in rows)
    for field, value in (("remat", "block"), ("scan_layers", "False"), ("device_batch_size", "1")):
        assert any(f"{field}={value}" in row[2] for row in rows), field


def test_own_data_and_own_config(folder, monkeypatch):
    """The README's config file, trained on the data that the README's other piece of code prepares."""
    monkeypatch.chdir(folder)
    exec(compile(code("write_dataset"), "README.md", "exec"), {})
    (folder / "own.py").write_text(code("def get_config(arg"))
    execute(folder, "python -m trainit.main --config=own.py --config.cpu_devices=2", short=False)
    records = metrics(folder / "runs" / "own")
    assert records[-1]["step"] == 40
    assert records[-1]["valid/loss"] < records[-1]["train/loss"] + 2


def test_metric_names(folder):
    seen = {name for record in metrics(folder / "runs" / "debug") for name in record} - {"step"}
    assert seen <= set(re.findall(r"`([\w/]+)`", README))
