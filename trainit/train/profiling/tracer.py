"""Traces of a run's steps, by JAX's profiler, for XProf and Perfetto."""

import contextlib
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import jax
from absl import logging

from trainit.cluster.watchdog import Watchdog
from trainit.config import Config, require
from trainit.train.profiling import parts

LOOK_SECONDS = 1.0  # between looks for the file that asks for a trace

Result = TypeVar("Result")


def ranges(config: Config) -> list[tuple[int, int]]:
    """Returns (FROM, TO) of each range of `profile.steps`. Raises ConfigError if they are none."""
    text = config.profile.steps
    found = [(int(begin), int(end)) for begin, end in re.findall(r"(\d{1,10}):(\d{1,10})", text)]
    require(
        ",".join(f"{begin}:{end}" for begin, end in found) == text.replace(" ", "")
        and all(begin < end <= config.steps for begin, end in found)
        and all(end <= begin for (_, end), (begin, _) in pairwise(found)),
        f"profile.steps={text!r} must be rising ranges of steps up to steps={config.steps}, as in '100:105'",
    )
    return found


class Tracer:
    """Traces the steps of `profile.steps`, and the next ones when a signal or a file asks for it.

    Each process decides for itself. Its traces are in the run's folder: profile/step_N/process_P, where N is
    the last step that is traced.
    """

    def __init__(self, config: Config, workdir: Path, watchdog: Watchdog):
        """Waits for SIGURG from here on, which does nothing to processes that do not expect it."""
        self._config, self._workdir, self._watchdog = config, workdir, watchdog
        self._process, chosen = jax.process_index(), config.profile.processes
        self._is_chosen = not chosen or self._process in chosen
        self._ranges = ranges(config) if self._is_chosen else []
        self._is_asked, self._looked = False, 0.0
        self._begin = self._end = 0  # steps before and after the trace under way; 0: none
        signal.signal(signal.SIGURG, lambda *_: self._ask())

    def _ask(self):
        self._is_asked = self._is_chosen
        if not self._is_chosen:
            text = "profile    no trace: process %d is not in profile.processes=%s"
            logging.warning(text, self._process, self._config.profile.processes)

    def run(
        self, step: int, state, start: Callable[[], Result], compiled: Callable[[], jax.stages.Compiled]
    ) -> Result:
        """Starts the step after `step` others, by `start`, and traces it if that is due.

        `state` is what it begins with, and `compiled` gives the program that was compiled for it.
        """
        if not self._end and (end := self._wanted(step)):
            jax.block_until_ready(state)  # steps before have ended
            self._start(step, end)
        if not self._end:
            return start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            result = start()
        if step + 1 == self._end:
            with self._watchdog.long_task("writing a trace"):
                jax.block_until_ready(result)
                self._stop(compiled)
        return result

    def _wanted(self, step: int) -> int:
        """The step up to which to trace from here on; 0: no trace is due."""
        for begin, end in self._ranges:
            if begin <= step < end:
                return end
        if (now := time.monotonic()) - self._looked > LOOK_SECONDS:
            self._looked = now
            with contextlib.suppress(OSError):  # most of the time, there is none
                (self._workdir / f"trace_{self._process}").unlink()
                self._is_asked = True
        if not self._is_asked:
            return 0
        self._is_asked = False
        return min(step + self._config.profile.count, self._config.steps)

    def _start(self, step: int, end: int):
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # no event for each call of a function
        self._folder = self._workdir / f"profile/step_{end}/process_{self._process}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # what is wrong with it comes up before the trace
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._begin, self._end = step, end
        except Exception as error:  # no trace is worth the run
            self._ranges = []
            logging.warning("profile    no trace: %s: %s", type(error).__name__, error)

    def _stop(self, compiled: Callable[[], jax.stages.Compiled]):
        begin, end, self._end = self._begin, self._end, 0
        try:
            jax.profiler.stop_trace()
            found = parts.shares(parts.read(self._folder), parts.instructions(compiled().as_text() or ""))
            about = parts.describe(found) or "no instruction ran"
            logging.info("profile    steps %d to %d: %s", begin + 1, end, about)
            logging.info("           in %s: xprof --logdir=..., or ui.perfetto.dev", self._folder)
        except Exception as error:
            logging.warning("profile    the trace is lost: %s: %s", type(error).__name__, error)
