"""Runs a sweep until no more runs are wanted: one after another, or as array jobs of Slurm or Grid Engine."""

import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from trainit.cluster import run_lock
from trainit.cluster.files import write_atomically
from trainit.cluster.process import STOP_SIGNALS
from trainit.config import ConfigError, require
from trainit.config.exit_codes import DONE, STOPPED, USAGE
from trainit.experiments.compare.runs import read
from trainit.experiments.sweep.spec import Job, Sweep

LAUNCH = {"sbatch": Path("launch/slurm.sh"), "qsub": Path("launch/sge.sh")}


class StoppedError(Exception):
    """The sweep was asked to stop, and everything is saved."""


def loss(job: Job) -> float | None:
    """Returns a run's final validation loss, None if it is not finished; ConfigError if settings differ."""
    record = job.folder / "arguments.txt"
    if not record.exists():
        return None
    before, now = record.read_text().splitlines(), "\n".join(job.arguments).splitlines()
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
    write_atomically(job.folder / "arguments.txt", "\n".join(job.arguments) + "\n")


class LocalRunner:
    """Runs one run after another on this machine, and passes on to it the signals that ask to stop."""

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._stopping = False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._on_signal)
        # The process that has started this one may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number, _):
        self._stopping = True
        if self._child and number != signal.SIGINT:  # a terminal sends SIGINT to the child itself
            self._child.send_signal(number)

    def run(self, jobs: Sequence[Job]):
        """Runs jobs and logs what each has reached. Raises StoppedError if the sweep was asked to stop."""
        for count, job in enumerate(jobs, start=1):
            start, code = time.monotonic(), self._run(job)
            if code == DONE:
                final, seconds = read(job.folder).final, time.monotonic() - start
                logging.info("%3d/%d %s: validation loss %.4f, %.0f s", count, len(jobs), job, final, seconds)
            elif self._stopping or code == STOPPED:
                raise StoppedError
            else:
                logging.info("%3d/%d %s: failed with %d: %s", count, len(jobs), job, code, failure(job))

    def _run(self, job: Job) -> int:
        """Runs a job, unless another process does so meanwhile; returns the exit code."""
        while not self._stopping and wait_for_holder(job, lambda: self._stopping) and not finished(job):
            prepare(job)
            command = [sys.executable, "-m", "trainit", "train", *job.arguments]
            environment = {**os.environ, "TRAINIT_LAUNCHER": str(os.getpid())}
            with (job.folder / "output.txt").open("w") as output:
                self._child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                if self._stopping:  # the signal came before there was a child
                    self._child.terminate()
                code = self._child.wait()
            self._child = None
            # Another process may have taken the folder while this one's was starting.
            if code != USAGE or not run_lock.holder(job.folder):
                return code
        return STOPPED if self._stopping else DONE


def wait_for_holder(job: Job, is_stopping: Callable[[], bool] = lambda: False) -> bool:
    """Waits while another process holds a run's folder, or until a stop is asked for; whether it is free.

    A sweep that was killed may have started it. Not to wait would count the run as failed, and choose the
    best rate without it.
    """
    if holder := run_lock.holder(job.folder):
        logging.info("%s: waiting until %s ends, which has its folder", job, holder)
    while holder and not is_stopping():
        time.sleep(0.5)
        holder = run_lock.holder(job.folder)
    return not holder


def run_array(given: tuple[str, str], output: Path, jobs: Sequence[Job]):
    """Runs jobs as an array job of (scheduler, its options), waits for its end, and logs which failed."""
    scheduler, options = given
    script = LAUNCH[scheduler]
    require(script.is_file(), f"{script} is not here: submit from the folder that contains launch/")
    # Task i of the array reads its arguments from the file named i, on whichever host it runs.
    folder = output.absolute() / "array"
    folder.mkdir(parents=True, exist_ok=True)
    for task, job in enumerate(jobs, start=1):
        wait_for_holder(job)
        prepare(job)
        write_atomically(folder / str(task), shlex.join(job.arguments) + "\n")

    command = {
        "sbatch": ["sbatch", "--wait", f"--array=1-{len(jobs)}"],
        "qsub": ["qsub", "-sync", "y", "-t", f"1-{len(jobs)}", "-v", f"TRAINIT_ARRAY={folder}"],
    }[scheduler] + [*shlex.split(options), str(script)]
    logging.info("%d runs as an array job: %s", len(jobs), shlex.join(command))
    logging.info("This waits for the job and may be stopped; run it again when the job has ended.")
    try:
        subprocess.run(command, env={**os.environ, "TRAINIT_ARRAY": str(folder)}, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{scheduler} is not on this machine") from None
    for job in itertools.filterfalse(finished, jobs):
        logging.info("%s: not finished: %s", job, failure(job))


def search(sweep: Sweep, start: Callable[[Sequence[Job]], None]) -> list[Job]:
    """Runs a sweep; returns all runs, also those that failed. `start` returns when the runs have ended."""
    tried: set[Job] = set()

    def known(job: Job) -> float | None:
        final = loss(job)
        return math.inf if final is None and job in tried else final

    # Results may show that more runs are wanted: at other learning rates, or with more seeds.
    while True:
        jobs = sweep.wanted(known)
        if not (todo := [job for job in jobs if known(job) is None]):
            return jobs
        logging.info("%d runs, %d of them still to do, in %s", len(jobs), len(todo), sweep.output)
        start(todo)
        tried |= set(todo)
