"""Random faults on a job of four processes, each followed by a resume: nothing lost, nothing doubled.

    pytest -n 0 -s tests/cluster/test_faults.py

FAULTS sets how many (30), FAULTS_SEED draws others; both are printed, with what became of each.
"""

import contextlib
import os
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from processes import ROOT, end, exact, last_step, launch, metrics, pid_of, saving, wait_for

FAULTS = int(os.environ.get("FAULTS", "30"))
STEPS = 120
SILENCE_SECONDS = 6
LIMIT_SECONDS = 60  # in which a job with a fault has to have ended
DEADLY = (signal.SIGKILL, signal.SIGSTOP)
KINDS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
MOMENTS = ("starting", "mid-step", "mid-save")


@pytest.fixture
def job(random_dataset, tmp_path):
    def begin(name):
        return launch(
            4,
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={tmp_path}/{name}"),
            *("--config.cpu_devices=1", "--config.mesh.data=2", "--config.mesh.fsdp=2"),
            *("--config.mesh.tensor=1", f"--config.steps={STEPS}", "--config.eval.every_steps=30"),
            *("--config.device_batch_size=0", "--config.eval.sequences=8"),
            f"--silence_seconds={SILENCE_SECONDS}",
            "--wait_seconds=40",  # for a process that is suspended before it has come
            TRAINIT_GRACE="3",
        )

    return begin


@contextlib.contextmanager
def strangers(launcher):
    """Twenty silent connections to process 0's port, as soon as it is open, until the block ends."""
    over, held = threading.Event(), []

    def call():
        port = 0
        while not over.wait(0.02) and len(held) < 20:
            with contextlib.suppress(OSError, AssertionError):
                if not port:
                    environment = Path(f"/proc/{pid_of(launcher, 0)}/environ").read_text()
                    port = int(re.search(r"TRAINIT_COORDINATOR=localhost:(\d+)", environment)[1])
                while len(held) < 20:
                    held.append(socket.create_connection(("localhost", port), timeout=1))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()
        for connection in held:
            connection.close()


def strike(process, run, kind, rank, moment, draw) -> float:
    """Sends a signal to one process at some moment; when."""
    started_at = last_step(run)
    if moment == "starting":
        time.sleep(draw.uniform(1, 6))
    else:
        steps = draw.randrange(1, 4)
        assert wait_for(process, lambda: last_step(run) >= started_at + steps), "it did not step"
        if moment == "mid-save":
            assert wait_for(process, lambda: saving(run)), "it did not save"
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.2))
    os.kill(pid_of(process, rank), kind)
    return time.monotonic()


@pytest.mark.evidence(
    "30 faults on a job of 4 processes (SIGKILL, SIGSTOP, SIGTERM, SIGINT, SIGUSR1, SIGUSR2; the process and "
    "the moment, while starting, in a step or in a save, drawn from a printed seed), half of them with up to "
    "twenty strangers at the port, each followed by a resume: no step lost or doubled, all metrics "
    "bit-identical to the undisturbed run's, each job ended within a minute"
)
def test_random_faults_change_nothing(job, tmp_path):
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(2**32)))
    draw = random.Random(seed)
    print(f"\n{FAULTS} faults drawn from FAULTS_SEED={seed}")
    end(job("calm"), 0)
    run, ended_in = tmp_path / "run", []
    for number in range(FAULTS):
        kind, rank = draw.choice(KINDS), draw.randrange(4)
        moment = draw.choices(MOMENTS, (1, 3, 2))[0]
        process, before = job("run"), last_step(run)
        if before > STEPS - 10:
            moment = MOMENTS[0]  # else it might be done before it is struck
        crowd = strangers(process) if draw.random() < 0.5 else contextlib.nullcontext([])
        try:
            with crowd as held:
                struck = strike(process, run, kind, rank, moment, draw)
            output = end(process, None if kind in DEADLY else 75, LIMIT_SECONDS + SILENCE_SECONDS)
        finally:
            process.kill()
        ended_in.append(time.monotonic() - struck)
        print(
            f"{number + 1:3}  {kind.name:8} to process {rank} {moment:9} from step {max(before, 0):3}, "
            f"{len(held):2} strangers: exit {process.returncode}, in {ended_in[-1]:4.1f} s, "
            f"metrics up to step {max(last_step(run), 0)}"
        )
        assert ended_in[-1] < LIMIT_SECONDS, output
    end(job("run"), 0)
    records, calm = exact(metrics(run)), exact(metrics(tmp_path / "calm"))
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert records == calm
    print(
        f"{FAULTS} faults, {len(records)} records: no step lost or doubled, all metrics bit-identical to the "
        f"undisturbed run's; the slowest end took {max(ended_in):.0f} s"
    )
