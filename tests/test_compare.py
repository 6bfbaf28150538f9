"""Reading run folders and drawing their curves."""

import json
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT

from trainit import compare


@pytest.fixture
def run_folder(tmp_path):
    lines = ['{"step": 0, "tokens": 0, "valid/loss": 5.0, "valid/bits_per_byte": 2.0}']
    for n in range(1, 10):
        rate = {"throughput/tokens_per_second": 100 + n}
        lines.append(json.dumps({"step": n, "tokens": 8 * n, "train/loss": 5 / n} | rate))
    lines += ['{"step": 10, "tokens": 80, "train/loss": null, "valid/loss": 4.0, "valid/bits_per_byte": 1.5}']
    lines += ['{"step": 11, "tok']  # a crash in the middle of a line
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_series_has_the_finite_points(run_folder):
    records = compare.read_metrics(run_folder)
    assert [r["step"] for r in records] == list(range(11))
    assert compare.series(records, "step", "train/loss")[0] == list(range(1, 10))
    assert compare.series(records, "tokens", "valid/loss") == ([0, 80], [5.0, 4.0])


def test_smooth_is_the_weighted_mean():
    values = np.random.default_rng(0).normal(size=50)
    weights = 0.9 ** np.arange(50)
    expected = [np.average(values[: n + 1][::-1], weights=weights[: n + 1]) for n in range(50)]
    np.testing.assert_allclose(compare.smooth(list(values), 10), expected)


def test_command_prints_a_table_and_draws(run_folder, tmp_path):
    command = [sys.executable, "-m", "trainit.compare", run_folder, run_folder, f"--output={tmp_path}/c.png"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    header, row = result.stdout.splitlines()[:2]
    assert header.split() == ["run", "steps", "tokens", "valid/loss", "best", "bits/byte", "tokens/s"]
    assert row.split()[1:] == ["10", "80", "4.0000", "4.0000", "1.5000", "105"]
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_is_no_run_folder(tmp_path):
    command = [sys.executable, "-m", "trainit.compare", tmp_path / "none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        == f"trainit: error: {tmp_path}/none is no run folder: No such file or directory"
    )
