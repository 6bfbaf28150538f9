"""The benchmark runs and measures what it says; its times are for people, not for tests."""

import re

from processes import ROOT, start


def test_every_part_reports(random_dataset):
    args = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}"
    process = start(*args, "--tokens=2000000", "--steps=3", module="trainit.benchmark")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    for pattern in (
        r"8 × cpu, \d+ cores, JAX",
        r"loader +[\d.]+ M tokens/s  read in the calling thread",
        r"loader +[\d.]+ M tokens/s  through Grain",
        r"step +[\d.]+ ms  median of 3",
        r"step +\d+ tokens/s  [\d.]+ TFLOP/s",
        r"step +[\d.]+ GiB",
        r"save +[\d.]+% of the time",
    ):
        assert re.search(pattern, output), (pattern, output)


def test_unknown_part(random_dataset):
    args = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}", "--only=loder"
    process = start(*args, module="trainit.benchmark")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.strip() == "trainit: error: --only=loder: there are loader, step, save"
