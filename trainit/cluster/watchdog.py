"""How fast this process gets on, and from when on that is a stall."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

USUAL_STEPS = 20  # a stall is no step in so many usual step times
REMEMBERED = 100  # steps from whose times the usual one is taken
PATIENCE = 12  # what may take long, such as compiling, may take so many times the least that is a stall


class Watchdog:
    """Written by the main thread, read by the one that watches it."""

    def __init__(self):
        self.doing = "starting"
        self.stall_seconds = 0.0  # the least that counts as a stall; 0: nothing does
        self._since, self._patient = time.monotonic(), True
        self._last_step: float | None = None  # when it was done, unless something else came in between
        self._intervals: deque[float] = deque(maxlen=REMEMBERED)

    def progress(self):
        """The main thread gets on: with steps, or with batches of an evaluation."""
        self._since = time.monotonic()

    def step_done(self):
        """A train step is done. From the first one on, steps are expected."""
        now = time.monotonic()
        if self._last_step is not None:
            self._intervals.append(now - self._last_step)
        self._since = self._last_step = now
        self._patient = False

    def restart_clock(self):
        """Time that has gone by until now does not count: the whole process was suspended."""
        self._since, self._last_step = time.monotonic(), None

    @contextmanager
    def long_task(self, doing: str) -> Iterator[None]:
        """For what may take long: no step is expected meanwhile."""
        before = self.doing, self._patient
        self.doing, self._patient = doing, True
        self._since = time.monotonic()
        try:
            yield
        finally:
            self.doing, self._patient = before
            self.restart_clock()

    def seconds(self) -> float:
        """Since the main thread last got on."""
        return time.monotonic() - self._since

    def stall_message(self) -> str:
        """What is wrong when nothing has come for too long, or ""."""
        usual = statistics.median(list(self._intervals) or [0.0])
        limit = max(self.stall_seconds, USUAL_STEPS * usual)
        limit *= PATIENCE if self._patient else 1
        seconds = self.seconds()
        if not self.stall_seconds or seconds <= limit:
            return ""
        return (
            f"no step done for {seconds:.0f} s (limit {limit:.0f} s, usual {usual:.2g} s); now {self.doing}"
        )


def stacks() -> str:
    """Every thread's stack, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"stack of thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}\n"
        for ident, frame in sys._current_frames().items()
    )
