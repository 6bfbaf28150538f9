"""launch/slurm.sh on a real Slurm: jobs on two nodes, of two processes each, all on this machine.

`slurm-up.sh` installs Slurm from Debian's packages and starts it in network namespaces of its own;
that needs root, and without it these tests are skipped.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import (
    ROOT,
    SMOOTH,
    assert_same_but_for_rounding,
    last_saved_is_last_logged,
    metrics,
    with_variable,
)

pytestmark = pytest.mark.evidence(
    "on a real Slurm, 2 nodes of 2 processes each: `scancel --signal` and the time limit save, and put "
    "the job back until all steps are done, with one metrics file; a cancelled job and one with a "
    "killed process are not put back. With `restart.limit`, a run survives crashed nodes: on a spare, on "
    "fewer nodes, or back in the queue"
)

HERE = Path(__file__).parent
STEPS = 80  # more than its time limit lets a job do at once


@pytest.fixture(scope="module")
def slurm(submitted_from, tmp_path_factory):
    """Runs a command on the cluster's head node."""
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([HERE / "slurm-up.sh", folder, "3"], capture_output=True, text=True, check=False)
    if up.returncode:
        pytest.skip(f"Slurm cannot be started here: {(up.stdout + up.stderr).strip()[-300:]}")

    def on_head(*command) -> str:
        return subprocess.check_output(
            [folder / "on", "head", *map(str, command)], text=True, cwd=submitted_from
        ).strip()

    on_head.folder = folder
    yield on_head
    subprocess.run([HERE / "slurm-down.sh", folder], check=True, capture_output=True)


class Job:
    """A job that trains the tests' tiny model on two nodes."""

    def __init__(self, slurm, random_dataset, activate, folder, *resources, steps, config=()):
        self.slurm, self.output = slurm, folder / "out"
        self.run = folder / "run"
        os.environ["TRAINIT_ACTIVATE"] = activate
        submitted = slurm(
            "sbatch",
            *("--nodes=2", "--gpus-per-node=2", f"--output={self.output}", *resources),
            "launch/slurm.sh",
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={self.run}", f"--config.steps={steps}"),
            *("--config.cpu_devices=1", "--config.mesh.data=1", SMOOTH, *config),
        )
        self.id = submitted.split()[-1]

    def field(self, name) -> str:
        about = dict(
            part.split("=", 1)
            for part in self.slurm("scontrol", "show", "job", self.id).split()
            if "=" in part
        )
        return about[name]

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def step(self) -> int:
        records = metrics(self.run) if (self.run / "metrics.jsonl").exists() else []
        return records[-1]["step"] if records else -1

    def wait(self, condition, seconds=240):
        """Waits for a condition; a job that was put back starts in seconds rather than in two minutes.

        Not at once: while its old script is being ended, Slurm would take that for the end of the new one.
        """
        end, put_back = time.monotonic() + seconds, None
        while not condition():
            assert time.monotonic() < end, self.text()
            if self.field("Reason") != "BeginTime":
                put_back = None
            elif put_back is None:
                put_back = time.monotonic()
            elif time.monotonic() - put_back > 6:
                self.slurm("scontrol", "update", f"jobid={self.id}", "StartTime=now")
            time.sleep(0.5)

    def send(self, number, which):
        """Sends a signal to the process of this number, wherever it is."""
        for pid in with_variable(f"SLURM_PROCID={number}", "-f", f"trainit train.*{self.run}"):
            os.kill(pid, which)

    def ended(self) -> bool:
        """Whether it is over for good: while it is put back, Slurm calls it FAILED for a moment."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        if self.field("JobState") not in over:
            return False
        time.sleep(3)
        return self.field("JobState") in over


@pytest.fixture
def submit(slurm, random_dataset, activate, tmp_path):
    """Submits a job; whatever becomes of the test, none is left behind."""
    yield lambda *args, **kwargs: Job(slurm, random_dataset, activate, tmp_path, *args, **kwargs)
    slurm("scancel", "--user=root")
    while slurm("squeue", "--noheader"):
        time.sleep(0.5)


def test_a_stopped_job_puts_itself_back_until_it_is_done(slurm, submit, calm, submitted_from, container):
    """Stopped once by `scancel --signal`, then as often as its time limit asks; in a container."""
    job = submit("--time=2", "--signal=USR1@30", steps=STEPS)
    job.wait(lambda: job.step() >= 3)
    slurm("scancel", "--signal=USR1", job.id)
    job.wait(lambda: int(job.field("Restarts")) >= 1)
    job.wait(job.ended, 1500)
    assert job.field("JobState") == "COMPLETED", job.text()
    assert "processes: 4" in job.text()
    assert "token      none" not in job.text()
    assert "process 3  n2" in job.text()
    assert job.text().count("stopped    on") == int(job.field("Restarts")) >= 2
    assert container() == 4 * (1 + int(job.field("Restarts")))
    assert_same_but_for_rounding(metrics(job.run), calm(STEPS))
    assert not list(submitted_from.glob(".trainit-*"))


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, submit):
    job = submit("--time=10", steps=100_000)
    job.wait(lambda: job.step() >= 2)
    slurm("scancel", job.id)
    job.wait(job.ended)
    time.sleep(2)  # a revived job would show now
    assert job.field("JobState") == "CANCELLED"
    assert job.field("Restarts") == "0"
    assert last_saved_is_last_logged(job.run)


def test_a_killed_process_fails_the_job_and_it_is_not_put_back(submit):
    job = submit("--time=10", steps=100_000)
    job.wait(lambda: job.step() >= 2)
    job.send(2, signal.SIGKILL)
    killed = time.monotonic()
    job.wait(job.ended)
    assert time.monotonic() - killed < 60
    assert job.field("JobState") == "FAILED", job.text()
    assert job.field("Restarts") == "0"


@pytest.fixture
def crash(slurm):
    """Crashes the node of a name; without one, and after the test, all come up again."""

    def crash(name=""):
        if name:
            subprocess.run(["bash", "-c", CRASH, "crash", HERE, slurm.folder, name], check=True)
        else:
            subprocess.run([HERE / "slurm-up.sh", slurm.folder, "3"], check=True, capture_output=True)

    yield crash
    crash()


CRASH = '. "$1/fakehosts.sh"; fh_kill "$2" "$3"'
AGAIN = "--config.restart.limit=3", "--config.checkpoint.save_steps=2", "--silence_seconds=5"


def test_a_spare_node_takes_the_place_of_a_lost_one(submit, crash, calm, monkeypatch, submitted_from):
    """First a process on the second node hangs, and all start there again; then the node crashes."""
    monkeypatch.setenv("TRAINIT_NODES", "2")
    job = submit("--nodes=3", steps=9, config=AGAIN)
    job.wait(lambda: job.step() >= 1)
    job.send(3, signal.SIGSTOP)
    job.wait(lambda: ": start 2 of at most 4, from the newest checkpoint" in job.text())
    job.wait(lambda: job.step() >= 4)
    crash("n2")
    job.wait(job.ended)
    assert job.field("JobState") == "COMPLETED", job.text()
    assert job.field("Restarts") == "0"
    assert "n2 failed twice and is not used again in this job" in job.text(), job.text()
    assert ": start 3 of at most 4, from the newest checkpoint, on n1, n3 instead of n1, n2" in job.text()
    assert_same_but_for_rounding(metrics(job.run), calm(9))
    assert not list(submitted_from.glob(".trainit-*"))


def test_without_a_spare_the_run_continues_on_fewer_nodes(submit, crash, calm):
    job = submit(steps=5, config=(*AGAIN, "--config.mesh.fsdp=-1", "--config.restart.shrink=True"))
    job.wait(lambda: job.step() >= 1)
    crash("n2")
    job.wait(job.ended)
    assert job.field("JobState") == "COMPLETED", job.text()
    assert ": start 2 of at most 4, from the newest checkpoint, on n1 instead of n1, n2" in job.text()
    assert "processes: 2" in job.text()
    assert_same_but_for_rounding(metrics(job.run), calm(5))


def test_without_enough_nodes_the_job_goes_back_to_the_queue(submit, crash, calm):
    """The second node crashes; later, on others, the first one, on which the job's script runs."""
    job = submit(steps=8, config=AGAIN)
    job.wait(lambda: job.step() >= 1)
    crash("n2")
    job.wait(lambda: int(job.field("Restarts")) == 1)
    assert "back in the queue: 1 of 2 hosts are left, without n2" in job.text()
    job.wait(lambda: job.field("ExcNodeList") == "n2", 20)
    job.wait(lambda: job.step() >= 4)
    assert job.field("NodeList") == "n[1,3]"
    crash("n1")
    job.wait(lambda: int(job.field("Restarts")) == 2)
    crash()
    job.wait(job.ended)
    assert job.field("JobState") == "COMPLETED", job.text()
    assert_same_but_for_rounding(metrics(job.run), calm(8))


# Stands in for Python, and for the run: each start gets a step further, and blames the second node.
FAILS = """#!/usr/bin/env bash
[ "$2" != trainit.cluster.restart ] || PYTHONPATH=ROOT exec PYTHON "$@"
[ "$SLURM_PROCID" = 0 ] || exit 1
echo "{\\"step\\": $SLURM_STEP_ID}" >"FOLDER/metrics.jsonl"
echo "{\\"limit\\": 5, \\"folder\\": \\"FOLDER\\", \\"processes\\": 4}" >"$TRAINIT_RUN_FILE"
echo '{"code": 1, "text": "process 3 (n2, pid 9) is gone"}' >"$TRAINIT_RUN_FILE.fault"
exit 1
"""


def test_a_job_that_may_not_go_back_says_what_to_do(slurm, random_dataset, tmp_path, submitted_from):
    (tmp_path / "python3").write_text(
        FAILS.replace("PYTHON ", f"{sys.executable} ")
        .replace("ROOT", str(ROOT))
        .replace("FOLDER", str(tmp_path))
    )
    (tmp_path / "python3").chmod(0o755)
    job = Job(slurm, random_dataset, f"PATH={tmp_path}:$PATH", tmp_path, "--no-requeue", steps=1)
    job.wait(job.ended)
    assert job.field("JobState") == "FAILED", job.text()
    assert "n2 failed twice and is not used again in this job" in job.text()
    assert "not done: Slurm does not put the job back; submit it again with --exclude=n2" in job.text()
    assert not list(submitted_from.glob(f".trainit-{job.id}.*"))


def test_a_sweep_is_an_array_job(slurm, sweep, activate, tmp_path):
    arguments, check = sweep
    os.environ["TRAINIT_ACTIVATE"] = activate
    options = f"--sbatch=--nodes=1 --gpus-per-node=2 --output={tmp_path}/job-%a"
    check(slurm(sys.executable, "-m", "trainit", "sweep", *arguments, options), devices=2)
