"""Every command and piece of code in README and on the documentation's pages runs: minutes, for .ci/run.

The pages are followed in the order of the site's navigation, each from its top to its bottom, in one folder
that looks like a clone. So a page may use what an earlier one has made, as a reader would.

    ```sh                          each line is run
    ```python                      is run
    ```python title="signum.py"    is saved as that file
    ```                            is only shown, since it needs a GPU, a cluster or other data
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, Block, all_blocks, commands, words
from processes import metrics

SHORT = {  # added so that a command that trains for minutes takes seconds; nothing else changes
    "train": [
        *("--config.steps=6", "--config.eval.every_steps=3", "--config.eval.sequences=16"),
        "--config.checkpoint.save_steps=3",
    ],
    "benchmark": ["--tokens=2000000", "--steps=3"],
}
REPLACED = {  # in pages, for the same reason
    "[5e-4, 1e-3, 2e-3]": "[1e-3]",
    "[1, 2, 3]": "[1, 2]",
    '"steps": 100': '"steps": 3',
    "--config.steps=260": "--config.steps=8",
    "--config.schedule.warmup=25": "--config.schedule.warmup=1",
    "--config.schedule.rewarm_at=250": "--config.schedule.rewarm_at=6 --config.schedule.rewarm=1",
    "--config.steps=100": "--config.steps=6",
    "--config.steps=20": "--config.steps=6",
    "--rows=16 --devices=8,64": "--rows=16 --devices=8,64 --config.model.num_blocks=2",
}
REPORTS = (
    r"8 × cpu, \d+ cores, JAX",
    r"loader +[\d.]+ M tokens/s  through Grain",
    r"loader +[\d.]+ times the speed of random crops",
    r"loader +[\d.]+ M tokens/s  read from the disk; [\d.]+ times",
    r"loader +[\d.]+ ms  to the first batch of a resume at step 1,000,000",
    r"loader +[1-4]?\d\d MiB  of a whole process that reads 300 billion tokens",
    r"step +[\d.]+ ms  median of 3",
    r"step +\d+ tokens/s  [\d.]+ TFLOP/s",
    r"step +[\d.]+ GiB  on a device at most: parameters [\d.]+, optimizer [\d.]+, gradients [\d.]+, act",
    r"step +time: .*\d+%",
    r"step +exchanged: reduce-scatter over fsdp: [\d.]+ MiB a device and step",
    r"save +[\d.]+% of the time",
)
MAIN = "python -m trainit.main"


def steps() -> list[tuple[Block, str]]:
    """(block, command or code) of everything that is run, in order, without what .ci/run installs."""
    found = []
    for block in all_blocks():
        if block.language == "sh":
            found += [(block, line) for line in commands(block) if not line.startswith("pip ")]
        elif block.language == "python":
            found.append((block, block.text))
    return found


def name(step: tuple[Block, str]) -> str:
    block, text = step
    what = text[:60] if block.language == "sh" else block.title or "code"
    return f"{Path(block.page).stem}-{block.line}-{what}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like a clone, with a short run in runs/debug."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "trainit", "launch"):
        (folder / name).symlink_to(ROOT / name)
    execute(folder, f"{MAIN} --config=configs/debug.py")
    return folder


def execute(folder, command: str, short: bool = True) -> str:
    start, arguments = shlex.split(command), []
    if start[0] == "launch/local.sh":
        start, arguments, tool = start[:1], start[1:], "train"
    elif command.startswith(MAIN):
        start, arguments, tool = [sys.executable, *start[1:3]], start[3:], "train"
    else:
        assert start[0] == "trainit", command
        start, arguments, tool = [sys.executable, "-m", *start[:2]], start[2:], start[1]
    given = {argument.split("=")[0] for argument in arguments}
    extra = [a for a in SHORT.get(tool, []) if a.split("=")[0] not in given] if short else []
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        [*start, *arguments, *extra],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


@pytest.mark.parametrize("step", steps(), ids=name)
def test_commands(step, folder):
    """In the order in which they stand there; runs and sweeps are shorter than on the pages."""
    block, text = step
    for long, short in REPLACED.items():
        text = text.replace(long, short)
    if block.title:
        (folder / block.title).write_text(text)
    elif block.language == "python":
        with contextlib.chdir(folder):
            exec(compile(text, block.page, "exec"), {})
    else:
        output = execute(folder, text, short="own.py" not in text)
        if "--sweep" in text:
            check_sweep(output)
        for pattern in REPORTS if "trainit benchmark" in text and "--sweep" not in text else ():
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


def test_long_texts_are_on_the_pages():
    """What is made shorter is there, so that no page takes minutes unnoticed."""
    texts = "".join(block.text for block in all_blocks())
    for long in REPLACED:
        assert long in texts, long


def test_own_data_and_own_config(folder):
    """The page's config file, trained on the data that the page's other piece of code prepares."""
    records = metrics(folder / "runs" / "own")
    assert records[-1]["step"] == 40
    assert records[-1]["valid/loss"] < records[-1]["train/loss"] + 2


def test_metric_names(folder):
    seen = {name for record in metrics(folder / "runs" / "debug") for name in record} - {"step"}
    assert seen <= words(ROOT / "docs/reference/metrics.md")
