"""Starts the runs of a sweep: here one after another, or as an array job of Slurm or Grid Engine."""

import os
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

    Raises:
        ConfigError: its folder contains a run that was started with other arguments.
    """
    record = job.folder / "arguments.txt"
    if not record.exists():
        return None
    before, now = record.read_text().splitlines(), list(job.arguments)
    if before != now:
        changes = [f"{a} -> {b}" for a, b in zip(before, now, strict=False) if a != b]
        changes += [f"without {a}" for a in before[len(now) :]] + [f"with {b}" for b in now[len(before) :]]
        raise ConfigError(
            f"{job.folder} was run with other settings ({'; '.join(changes)}); choose another --output, or "
            f"delete it"
        )
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
        if file.exists():
            lines = [line for line in file.read_text(errors="replace").splitlines() if "error: " in line]
            if lines:
                return lines[-1].partition("error: ")[2]
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
        """Runs jobs and logs what each has reached.

        Raises:
            StoppedError: the sweep was asked to stop.
        """
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


class ArrayRunner:
    """Runs jobs as one array job of a scheduler, and waits until it has ended."""

    def __init__(self, scheduler: str, options: str, output: Path):
        """
        Args:
            scheduler: "sbatch" or "qsub".
            options: the scheduler's, such as "--gpus-per-node=8 --time=4:00:00".
            output: the sweep's folder, which all hosts see.
        """
        self._scheduler, self._options, self._output = scheduler, shlex.split(options), output
        script = LAUNCH[scheduler]
        require(script.is_file(), f"{script} is not here: submit from the folder that contains launch/")

    def run(self, jobs: Sequence[Job]):
        """Runs jobs and logs which of them have failed.

        Raises:
            ConfigError: the scheduler is not on this machine.
        """
        # Task i of the array reads its arguments from the file named i.
        folder = self._output.absolute() / "array"
        folder.mkdir(parents=True, exist_ok=True)
        for task, job in enumerate(jobs, start=1):
            prepare(job)
            (folder / str(task)).write_text(shlex.join(job.arguments) + "\n")

        tasks, variable = f"1-{len(jobs)}", f"TRAINIT_ARRAY={folder}"
        if self._scheduler == "sbatch":
            command = ["sbatch", "--wait", f"--array={tasks}"]
        else:
            command = ["qsub", "-sync", "y", "-t", tasks, "-v", variable]
        command += [*self._options, str(LAUNCH[self._scheduler])]
        logging.info("%d runs as an array job: %s", len(jobs), shlex.join(command))
        logging.info("This waits for the job and may be stopped; run it again when the job has ended.")
        try:
            subprocess.run(command, env={**os.environ, "TRAINIT_ARRAY": str(folder)}, check=False)
        except FileNotFoundError:
            raise ConfigError(f"{self._scheduler} is not on this machine") from None
        for job in jobs:
            if not finished(job):
                logging.info("%s: not finished: %s", job, failure(job))
