"""launch/sge.sh on a real Grid Engine: jobs on two nodes, of two processes each, all on this machine.

`sge-up.sh` installs Grid Engine from Debian's packages and starts it in network namespaces of its own;
that needs root, and without it these tests are skipped.
"""

import os
import re
import shlex
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
    last_step,
    metrics,
    with_variable,
)

pytestmark = pytest.mark.evidence(
    "on a real Grid Engine: the same as on Slurm, with `qdel` and `-notify`, and on one host; with "
    "`restart.limit`, crashed hosts likewise"
)

HERE = Path(__file__).parent
STEPS = 80  # more than its time limit lets a job do at once
TWO_NODES = "-pe", "mpi_2_tasks_per_node", "4"


@pytest.fixture(scope="module")
def on_head(submitted_from, tmp_path_factory):
    """Runs a command on the cluster's head node."""
    folder = tmp_path_factory.mktemp("sge")
    up = subprocess.run([HERE / "sge-up.sh", folder, "3"], capture_output=True, text=True, check=False)
    if up.returncode:
        pytest.skip(f"Grid Engine cannot be started here: {(up.stdout + up.stderr).strip()[-300:]}")

    def run(*command, check=True) -> str:
        result = subprocess.run(
            [folder / "on", "head", *map(str, command)],
            capture_output=True,
            text=True,
            cwd=submitted_from,
            check=check,
        )
        return result.stdout.strip()

    run.folder = folder
    yield run
    subprocess.run([HERE / "sge-down.sh", folder], check=True, capture_output=True)


class Job:
    """A job that trains the tests' tiny model, and the jobs that it submits to continue."""

    def __init__(self, on_head, random_dataset, activate, folder, *resources, steps, nodes=2, config=()):
        self.on_head, self.output, self.run = on_head, folder / "out", folder / "run"
        variables = f"TRAINIT_ACTIVATE={activate}", f"TRAINIT_CACHE={os.environ['TRAINIT_CACHE']}"
        variables += "TRAINIT_PROCESSES_PER_NODE=2", "TRAINIT_MARGIN=30", f"TRAINIT_NODES={nodes}"
        if "TRAINIT_CONTAINER" in os.environ:
            variables += (f"TRAINIT_CONTAINER={os.environ['TRAINIT_CONTAINER']}",)
        submitted = on_head(
            *("qsub", "-o", self.output, *resources, "-v", ",".join(variables), "launch/sge.sh"),
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={self.run}", f"--config.steps={steps}"),
            *("--config.cpu_devices=1", "--config.mesh.fsdp=-1", "--config.mesh.data=1", SMOOTH),
            *("--config.mesh.tensor=1", *config),
        )
        self.id = re.search(r"Your job (\d+)", submitted)[1]

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def step(self) -> int:
        return last_step(self.run)

    def wait(self, condition, seconds=240):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text() + self.on_head("qstat", "-f")
            time.sleep(0.5)

    def over(self) -> bool:
        """Whether neither it nor one that it has submitted waits or runs."""
        return not self.on_head("qstat")

    def starts(self) -> int:
        return self.text().count(", start ")

    def kill(self, number, with_signal):
        """Sends a signal to the process of this number, wherever it is."""
        for pid in with_variable(f"TRAINIT_PROCESS_ID={number}", "-f", f"trainit train.*{self.run}"):
            os.kill(pid, with_signal)


@pytest.fixture
def submit(on_head, random_dataset, activate, tmp_path):
    """Submits a job; whatever becomes of the test, none is left behind."""
    yield lambda *args, **kwargs: Job(on_head, random_dataset, activate, tmp_path, *args, **kwargs)
    on_head("qdel", "-f", "-u", "root", check=False)
    while on_head("qstat"):
        time.sleep(0.5)
    subprocess.run(["pkill", "-9", "-f", f"workdir={tmp_path}"], check=False)


def test_a_stopped_job_goes_on_until_it_is_done(submit, calm, submitted_from, container):
    """Stopped once by a signal, then as often as its time limit asks; in a container."""
    job = submit(*TWO_NODES, "-l", "h_rt=140", steps=STEPS)
    job.wait(lambda: job.step() >= 3)
    job.kill(3, signal.SIGUSR1)
    job.wait(lambda: job.starts() >= 2)
    job.wait(job.over, 1500)
    assert "done       all 80 steps" in job.text(), job.text()
    assert f"place      Grid Engine job {job.id}: process 0 of 4, coordinator n" in job.text()
    assert "process 3  n" in job.text()
    assert job.text().count("stopped    on SIGUSR1") == job.starts() - 1 >= 2
    assert container() == 4 * job.starts()
    assert_same_but_for_rounding(metrics(job.run), calm(STEPS))
    assert not list(submitted_from.glob(".trainit-*"))


def test_a_job_on_one_host_runs_again_until_it_is_done(submit, calm):
    """In a parallel environment of one host, without qrsh: exit code 99."""
    job = submit("-pe", "omp", "2", "-l", "h_rt=600", "-r", "y", steps=15, nodes=1)
    job.wait(lambda: job.step() >= 3)
    job.kill(0, signal.SIGTERM)
    job.wait(job.over)
    assert "done       all 15 steps" in job.text(), job.text()
    assert job.starts() == 2
    assert job.text().count(f"job {job.id}, start ") == 2  # the same job
    assert_same_but_for_rounding(metrics(job.run), calm(15))


def test_a_deleted_job_saves_and_stays_deleted(on_head, submit, submitted_from):
    job = submit(*TWO_NODES, steps=100_000)
    job.wait(lambda: job.step() >= 2)
    (folder,) = submitted_from.glob(".trainit-*")
    token = (folder / "token").read_text()
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "token")] == [0o700, 0o600]
    on_head("qdel", job.id)
    job.wait(job.over)
    time.sleep(3)  # a revived job would show now
    assert job.over()
    assert job.starts() == 1
    assert "stopped    on SIGUSR2 at step" in job.text(), job.text()
    assert len(token) == 64
    assert token not in job.text()
    assert "token      none" not in job.text()
    assert last_saved_is_last_logged(job.run)


def test_a_killed_process_fails_the_job_and_it_is_not_put_back(submit):
    job = submit(*TWO_NODES, steps=100_000)
    job.wait(lambda: job.step() >= 2)
    job.kill(2, signal.SIGKILL)
    killed = time.monotonic()
    job.wait(job.over, 60)
    assert time.monotonic() - killed < 60
    time.sleep(3)
    assert job.over()
    assert job.starts() == 1
    assert "is gone: it was killed or has crashed" in job.text(), job.text()


@pytest.fixture
def crash(on_head):
    """Crashes the second host that a job uses; returns both. It comes up again after the test."""

    def crash(job) -> tuple[str, str]:
        first, second = re.search(r"processes on each of (n\d) (n\d)", job.text()).groups()
        subprocess.run(["bash", "-c", CRASH, "crash", HERE, on_head.folder, second], check=True)
        return first, second

    yield crash
    subprocess.run([HERE / "sge-up.sh", on_head.folder, "3"], check=True, capture_output=True)


CRASH = '. "$1/fakehosts.sh"; fh_kill "$2" "$3"'
AGAIN = "--config.restart.limit=3", "--config.checkpoint.save_steps=2", "--silence_seconds=5"


def test_a_spare_host_takes_the_place_of_a_lost_one(submit, crash, calm, submitted_from):
    """First a process on the second host hangs, and all start there again; then the host crashes."""
    job = submit("-pe", "mpi_2_tasks_per_node", "6", steps=9, config=AGAIN)
    job.wait(lambda: job.step() >= 1)
    job.kill(3, signal.SIGSTOP)
    job.wait(lambda: ": start 2 of at most 4, from the newest checkpoint" in job.text())
    job.wait(lambda: job.step() >= 4)
    first, second = crash(job)
    job.wait(job.over)
    assert "done       all 9 steps" in job.text(), job.text()
    assert job.starts() == 1
    assert f"{second} failed twice and is not used again in this job" in job.text()
    (third,) = {"n1", "n2", "n3"} - {first, second}
    moved = {f"{a}, {b} instead of {first}, {second}" for a, b in ((first, third), (third, first))}
    assert any(f"start 3 of at most 4, from the newest checkpoint, on {m}" in job.text() for m in moved)
    assert_same_but_for_rounding(metrics(job.run), calm(9))
    assert not list(submitted_from.glob(".trainit-*"))


def test_without_a_spare_the_run_continues_on_fewer_hosts(submit, crash, calm):
    job = submit(*TWO_NODES, steps=5, config=(*AGAIN, "--config.restart.shrink=True"))
    job.wait(lambda: job.step() >= 1)
    first, _ = crash(job)
    job.wait(job.over)
    assert "done       all 5 steps" in job.text(), job.text()
    assert f": start 2 of at most 4, from the newest checkpoint, on {first} instead of" in job.text()
    assert_same_but_for_rounding(metrics(job.run), calm(5))


def test_without_enough_hosts_the_job_goes_back_to_the_queue(submit, crash, calm, submitted_from):
    job = submit(*TWO_NODES, "-l", "h_rt=600", steps=5, config=AGAIN)
    job.wait(lambda: job.step() >= 1)
    _, second = crash(job)
    job.wait(lambda: job.starts() == 2)
    assert f"back in the queue: 1 of 2 hosts are left, without {second}" in job.text()
    job.wait(job.over)
    assert "done       all 5 steps" in job.text(), job.text()
    assert_same_but_for_rounding(metrics(job.run), calm(5))
    assert not list(submitted_from.glob(".trainit-*"))


def test_a_sweep_is_an_array_job(on_head, sweep, activate, tmp_path):
    arguments, check = sweep
    variables = f"TRAINIT_ACTIVATE={activate}", f"TRAINIT_CACHE={os.environ['TRAINIT_CACHE']}"
    options = shlex.join(
        ["-o", str(tmp_path), *TWO_NODES, "-v", ",".join((*variables, "TRAINIT_PROCESSES_PER_NODE=2"))]
    )
    check(
        on_head(sys.executable, "-m", "trainit", "sweep", *arguments, f"--qsub={options}", check=False),
        devices=4,
    )
