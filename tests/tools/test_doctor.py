"""The doctor: what it finds, alone and among processes, well and broken."""

import sys

import jax
import numpy as np
import pytest
from processes import ROOT, Fork, end, free_port

from trainit.tools.doctor.environment import (
    check_clocks,
    check_devices,
    check_tensorboard,
    check_versions,
    check_wandb,
)
from trainit.tools.doctor.network import check_all_reduces
from trainit.tools.doctor.report import FAIL, NOTE, OK, Result, table

TWO = ["process 0 (n1)", "process 1 (n2)"]
TINY = f"--config={ROOT}/tests/tiny.py"


def verdicts(output) -> dict[str, str]:
    """{"devices": "ok", ...} of a printed table."""
    words = [
        line.split() for line in output.splitlines() if not line.startswith(" ") and " checks " not in line
    ]
    names = {"within": 1, "between": 1}  # checks whose names are two words
    return {" ".join(w[: 1 + names.get(w[0], 0)]): w[1 + names.get(w[0], 0)] for w in words if len(w) > 2}


def test_versions_that_differ_name_the_package_and_the_hosts():
    same = {"jax": "0.10.2", "Trainit": "1"}
    assert check_versions([same, same], TWO).verdict == OK
    row = check_versions([same, same | {"jax": "0.11.0"}], TWO)
    assert row.verdict == FAIL
    assert row.finding == "jax 0.10.2: process 0 (n1); 0.11.0: process 1 (n2)"


def test_devices_that_differ():
    assert check_devices([["H100"] * 4, ["H100"] * 4], TWO).verdict == OK
    row = check_devices([["H100"] * 4, ["H100"] * 3], TWO)
    assert (row.verdict, row.finding) == (FAIL, "4 × H100: process 0 (n1); 3 × H100: process 1 (n2)")


def test_clocks():
    """What may have passed between the readings is no skew."""
    assert check_clocks(100.0, [100.1, 100.2], 100.3, TWO).verdict == OK
    assert check_clocks(100.0, [100.1, 107.0], 110.0, TWO).verdict == OK
    row = check_clocks(100.0, [100.1, 40.1], 100.3, TWO)
    assert (row.verdict, row.finding) == (FAIL, "process 0 (n1) is 60.0 s ahead of process 1 (n2)")


def test_trackers(monkeypatch):
    assert check_wandb(("tensorboard",)).verdict == NOTE
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_wandb(("wandb",)).verdict == OK
    assert check_tensorboard(("wandb",)) == []
    assert [row.verdict for row in check_tensorboard(("tensorboard",))] == [OK]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert [row.verdict for row in check_tensorboard(("tensorboard",))] == [FAIL]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{free_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    row = check_wandb(("wandb",))
    assert row.verdict == FAIL
    assert "cannot be reached" in row.finding
    assert "secret" not in row.finding + row.remedy


@pytest.mark.parametrize("wrong", [False, True])
def test_all_reduces_are_checked(wrong, monkeypatch):
    """On eight devices; and the check sees it when one sum is wrong."""
    if wrong:
        psum = jax.lax.psum
        monkeypatch.setattr(jax.lax, "psum", lambda x, axes: psum(x, axes) + (x > 400).astype(np.float32))
    whole, within, between = check_all_reduces(["n1"])
    assert whole.verdict == within.verdict == (FAIL if wrong else OK)
    assert between.verdict == NOTE


def test_the_table_fits_a_terminal():
    rows = [Result("a", OK, "word " * 60), Result("longer", FAIL, "bad", "do something")]
    lines = table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-3:] == ["longer  FAIL  bad", "              -> do something", "1 of 2 checks failed"]


def test_alone(random_dataset, tmp_path):
    output = end(
        Fork(
            TINY,
            f"--config.dataset.path={random_dataset}",
            f"--workdir={tmp_path}/run",
            command="doctor",
        ),
        0,
        60,
    )
    found = verdicts(output)
    assert set(found.values()) == {OK, NOTE}
    named = {"config", "settings", "devices", "all-reduce", "workdir", "shared", "mesh", "dataset", "clocks"}
    named |= {"computing"}
    assert named <= set(found)
    assert "all 16 checks passed" in output
    assert not list((tmp_path / "run/logs").iterdir())  # it leaves nothing behind


def test_what_fails_does_not_hide_the_rest(tmp_path):
    """No dataset, and a folder that cannot be made: two failures, all other checks."""
    (tmp_path / "file").touch()
    arguments = TINY, "--config.dataset.path=data/none", f"--workdir={tmp_path}/file/run"
    output = end(Fork(*arguments, command="doctor"), 1, 60)
    found = verdicts(output)
    assert {name for name, verdict in found.items() if verdict == FAIL} == {"dataset", "workdir"}
    assert found["all-reduce"] == OK
    assert "'data/none' does not exist" in output
    assert "2 of 12 checks failed" in output


def test_a_mesh_that_does_not_fit(random_dataset, tmp_path):
    arguments = (
        TINY,
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}",
        "--config.mesh.data=3",
    )
    output = end(Fork(*arguments, "--config.batch_size=48", command="doctor"), 1, 60)
    assert verdicts(output)["mesh"] == FAIL
    assert "covers 12 devices, but there are 8" in " ".join(output.split())


def test_a_process_that_does_not_come(random_dataset, tmp_path):
    arguments = TINY, f"--config.dataset.path={random_dataset}", f"--workdir={tmp_path}", "--wait_seconds=1"
    where = f"--coordinator=localhost:{free_port()}", "--num_processes=3", "--process_id=0"
    output = end(Fork(*arguments, *where, command="doctor"), 1, 60)
    assert verdicts(output)["processes"] == FAIL
    assert "2 of 3 processes are missing: 1, 2" in " ".join(output.split())
