"""Notices when this process makes no progress any more."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

USUAL_STEPS = 20  # a stall is this many usual step times without a step
REMEMBERED = 100  # steps whose median time is the usual one
PATIENCE = 12  # what may take long, such as compiling, may take this many times `stall_seconds`


class Watchdog:
    """Measures how long the main thread, which writes it, has made no progress. Another thread reads it."""

    def __init__(self) -> None:
        self.doing = "starting"  # for messages
        self.stall_seconds = 0.0  # no shorter time is a stall; 0: no time is
        self._since, self._long = time.monotonic(), True
        self._last_step: float | None = None  # when it was done, unless something else has happened since
        self._intervals: deque[float] = deque(maxlen=REMEMBERED)

    def progress(self):
        """Notes that the main thread makes progress: with steps, or with batches of an evaluation."""
        self._since = time.monotonic()

    def step_done(self):
        """Notes that a train step is done. From the first one on, more are expected."""
        now = time.monotonic()
        if self._last_step is not None:
            self._intervals.append(now - self._last_step)
        self._since = self._last_step = now
        self._long = False

    def restart_clock(self):
        """Makes the time until now not count, e.g. since the whole process was suspended."""
        self._since, self._last_step = time.monotonic(), None

    @contextmanager
    def long_task(self, doing: str) -> Iterator[None]:
        """Allows much more time, for compiling, saving and the like, in which no step is expected."""
        before = self.doing, self._long
        self.doing, self._long, self._since = doing, True, time.monotonic()
        try:
            yield
        finally:
            self.doing, self._long = before
            self.restart_clock()

    def seconds(self) -> float:
        """The seconds since the main thread last made progress."""
        return time.monotonic() - self._since

    def usual_seconds(self) -> float:
        """The time of a step; 0: not yet known."""
        return statistics.median(list(self._intervals) or [0.0])

    def stall_message(self) -> str:
        """What is wrong if there was no progress for too long, or ""."""
        usual = self.usual_seconds()
        limit = max(self.stall_seconds, USUAL_STEPS * usual) * (PATIENCE if self._long else 1)
        seconds = self.seconds()
        if not self.stall_seconds or seconds <= limit:
            return ""
        limits = f"limit {limit:.0f} s, usual {usual:.2g} s"
        return f"no step done for {seconds:.0f} s ({limits}); now {self.doing}"


def stacks_of_all_threads() -> str:
    """Every thread's stack, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"stack of thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}\n"
        for ident, frame in sys._current_frames().items()
    )
