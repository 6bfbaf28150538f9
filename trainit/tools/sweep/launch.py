"""Starts the runs of a sweep: here one after another, or as an array job of Slurm or Grid Engine."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from trainit.cluster.process import STOPPED
from trainit.config import ConfigError, require
from trainit.tools.compare.runs import read
from trainit.tools.sweep.spec import Job

LAUNCH = {"sbatch": Path("launch/slurm.sh"), "qsub": Path("launch/sge.sh")}


class StoppedError(Exception):
    """The sweep was asked to stop, and everything is saved."""


def loss(job: Job) -> float | None:
    """Returns the final validation loss of a run; None if it is not finished.

    Raises ConfigError if its folder contains a run that was started with other arguments.
    """
    record = job.folder / "arguments.txt"
    if not record.exists():
        return None
    before, now = record.read_text().splitlines(), list(job.arguments)
    if before != now:
        pairs = itertools.zip_longest(before, now, fillvalue="nothing")
        changes = "; ".join(f"{a} -> {b}" for a, b in pairs if a != b)
        what = f"{job.folder} was run with other settings ({changes})"
        raise ConfigError(f"{what}; choose another --output, or delete it")
    try:
        run = read(job.folder)
    except OSError:
        return None
    return run.final if run.finished else None


def finished(job: Job) -> bool:
    """Whether a run is finished; raises what `loss` raises."""
    return loss(job) is not None


def failure(job: Job) -> str:
    """Returns the last error of a run that is not finished, as one line."""
    for file in (job.folder / "output.txt", job.folder / "logs" / "process_0.log"):
        errors = re.findall("error: (.*)", file.read_text(errors="replace")) if file.exists() else []
        if errors:
            return errors[-1]
    return f"it left no error message; see {job.folder}"


def prepare(job: Job):
    """Makes the folder of a run and records the arguments with which it is started."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "arguments.txt").write_text("\n".join(job.arguments) + "\n")


class LocalRunner:
    """Runs one run after another on this machine, and passes on to it the signals that ask to stop."""

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._stopping = False
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        for number in signals:
            signal.signal(number, self._on_signal)
        # The process that has started this one may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _on_signal(self, number, frame):
        del frame
        self._stopping = True
        if self._child and number != signal.SIGINT:  # a terminal sends SIGINT to the child itself
            self._child.send_signal(number)

    def run(self, jobs: Sequence[Job]):
        """Runs jobs and logs what each has reached. Raises StoppedError if the sweep was asked to stop."""
        for count, job in enumerate(jobs, start=1):
            prepare(job)
            start = time.monotonic()
            with (job.folder / "output.txt").open("w") as output:
                command = [sys.executable, "-m", "trainit", "train", *job.arguments]
                self._child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                if self._stopping:  # the signal came before there was a child
                    self._child.terminate()
                code = self._child.wait()
            self._child = None
            seconds = time.monotonic() - start
            if code == 0:
                final = read(job.folder).final
                logging.info("%3d/%d %s: validation loss %.4f, %.0f s", count, len(jobs), job, final, seconds)
            elif not self._stopping and code != STOPPED:
                logging.info("%3d/%d %s: failed with %d: %s", count, len(jobs), job, code, failure(job))
            if self._stopping or code == STOPPED:
                raise StoppedError


def run_array(scheduler: str, options: str, output: Path, jobs: Sequence[Job]):
    """Runs jobs as one array job of a scheduler, waits until it has ended, and logs which have failed.

    The scheduler is a key of LAUNCH, and the output a folder that all hosts see.
    """
    script = LAUNCH[scheduler]
    require(script.is_file(), f"{script} is not here: submit from the folder that contains launch/")
    # Task i of the array reads its arguments from the file named i.
    folder = output.absolute() / "array"
    folder.mkdir(parents=True, exist_ok=True)
    for task, job in enumerate(jobs, start=1):
        prepare(job)
        (folder / str(task)).write_text(shlex.join(job.arguments) + "\n")

    tasks = f"1-{len(jobs)}"
    command = {
        "sbatch": ["sbatch", "--wait", f"--array={tasks}"],
        "qsub": ["qsub", "-sync", "y", "-t", tasks, "-v", f"TRAINIT_ARRAY={folder}"],
    }[scheduler] + [*shlex.split(options), str(script)]
    logging.info("%d runs as an array job: %s", len(jobs), shlex.join(command))
    logging.info("This waits for the job and may be stopped; run it again when the job has ended.")
    try:
        subprocess.run(command, env={**os.environ, "TRAINIT_ARRAY": str(folder)}, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{scheduler} is not on this machine") from None
    for job in jobs:
        if not finished(job):
            logging.info("%s: not finished: %s", job, failure(job))
