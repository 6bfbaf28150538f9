"""Runs of a sweep started: here one after another, or as an array job of Slurm or Grid Engine."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from trainit.config import ConfigError, require
from trainit.tools.compare.runs import read
from trainit.tools.sweep.spec import Job

STOPPED = 75  # exit code of a run that was asked to stop
LAUNCH = {"sbatch": Path("launch/slurm.sh"), "qsub": Path("launch/sge.sh")}


class StoppedError(Exception):
    """The sweep was asked to stop; everything is saved."""


def loss(job: Job) -> float | None:
    """The final validation loss of a run; None until it is done.

    Raises:
        ConfigError: its folder holds a run that was started with other arguments.
    """
    record = job.folder / "arguments.txt"
    if not record.exists():
        return None
    before, now = record.read_text().splitlines(), list(job.arguments)
    if before != now:
        differ = [f"{a} -> {b}" for a, b in zip(before, now, strict=False) if a != b]
        differ += [f"without {a}" for a in before[len(now) :]] + [f"with {b}" for b in now[len(before) :]]
        raise ConfigError(
            f"{job.folder} was run with other settings ({'; '.join(differ)}); take another --output, or "
            f"delete it"
        )
    try:
        run = read(job.folder)
    except OSError:
        return None
    return run.final if run.finished else None


def finished(job: Job) -> bool:
    """Whether a run is done; raises as `loss`."""
    return loss(job) is not None


def failure(job: Job) -> str:
    """The last error of a run that is not finished, in a line."""
    for file in (job.folder / "output.txt", job.folder / "logs" / "process_0.log"):
        if file.exists():
            lines = [line for line in file.read_text(errors="replace").splitlines() if "error: " in line]
            if lines:
                return lines[-1].partition("error: ")[2]
    return f"it left no error; see {job.folder}"


def prepare(job: Job):
    """The folder of a run, with the arguments that it is started with."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "arguments.txt").write_text("\n".join(job.arguments) + "\n")


class Here:
    """One run after another, on this machine."""

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._asked = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        for number in numbers:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever has started this may have blocked them

    def _ask(self, number, frame):
        """Passes the wish to stop on, unless the terminal has sent it to both."""
        del frame
        self._asked = True
        if self._child and number != signal.SIGINT:
            self._child.send_signal(number)

    def run(self, jobs: Sequence[Job]):
        """
        Raises:
            StoppedError: somebody has asked to stop.
        """
        for count, job in enumerate(jobs, start=1):
            prepare(job)
            begin = time.monotonic()
            with (job.folder / "output.txt").open("w") as output:
                command = [sys.executable, "-m", "trainit.main", *job.arguments]
                self._child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                if self._asked:  # just before there was somebody to pass it on to
                    self._child.terminate()
                code = self._child.wait()
            self._child = None
            took = time.monotonic() - begin
            if code == 0:
                loss = read(job.folder).final
                logging.info("%3d/%d %s: validation loss %.4f, %.0f s", count, len(jobs), job, loss, took)
            elif not self._asked and code != STOPPED:
                logging.info("%3d/%d %s: failed with %d: %s", count, len(jobs), job, code, failure(job))
            if self._asked or code == STOPPED:
                raise StoppedError


class Array:
    """All runs of a stage as one array job; waits until it has ended."""

    def __init__(self, scheduler: str, options: str, output: Path):
        """
        Args:
            scheduler: "sbatch" or "qsub".
            options: for it, as in "--gpus-per-node=8 --time=4:00:00".
            output: the sweep's folder, which all hosts see.
        """
        self._scheduler, self._options, self._output = scheduler, shlex.split(options), output
        script = LAUNCH[scheduler]
        require(script.is_file(), f"{script} is not here: submit from the folder that holds launch/")

    def run(self, jobs: Sequence[Job]):
        folder = self._output.absolute() / "array"
        folder.mkdir(parents=True, exist_ok=True)
        for number, job in enumerate(jobs, start=1):
            prepare(job)
            (folder / str(number)).write_text(shlex.join(job.arguments) + "\n")
        tasks, script = f"1-{len(jobs)}", str(LAUNCH[self._scheduler])
        if self._scheduler == "sbatch":
            command = ["sbatch", "--wait", f"--array={tasks}", *self._options, script]
        else:
            command = [
                "qsub",
                "-sync",
                "y",
                "-t",
                tasks,
                "-v",
                f"TRAINIT_ARRAY={folder}",
                *self._options,
                script,
            ]
        logging.info("%d runs as an array job: %s", len(jobs), shlex.join(command))
        logging.info(
            "This waits for it, and may be stopped: the same command goes on when the job has ended."
        )
        try:
            subprocess.run(command, env={**os.environ, "TRAINIT_ARRAY": str(folder)}, check=False)
        except FileNotFoundError:
            raise ConfigError(f"{self._scheduler} is not on this machine") from None
        for job in jobs:
            if not finished(job):
                logging.info("%s: not finished: %s", job, failure(job))
