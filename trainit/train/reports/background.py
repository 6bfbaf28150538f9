"""A tracker in a thread of its own: whatever it waits for or fails at, the run continues without a pause."""

import contextlib
import queue
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

MOST_WAITING = 10_000  # calls that a tracker may be behind: some 40 MB of records
IDLE_SECONDS = 1.0  # without a new record, after which what was taken is flushed


class Tracker(Protocol):
    """What a tracker does with what it is given. All of it happens in its thread."""

    def log(self, step: int, metrics: Mapping):
        """Takes the metrics of a step: numbers, and lists of counts, see `diagnostics.histogram_edges`."""

    def log_texts(self, step: int, texts: Sequence[Mapping]):
        """Takes objects of a prompt and its text."""

    def flush(self):
        """Hands on what it has kept back so far."""

    def close(self, code: int):
        """Hands on everything, and the run's exit code."""


class BackgroundTracker:
    """Makes a tracker and calls it, in a thread. Its first failure is one line, and its last call."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self._name = name
        self._waiting: queue.Queue = queue.Queue(MOST_WAITING)
        self._has_failed = self._is_behind = False
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()

    def call(self, method: str, *values: Any):
        """Has the tracker call this method of its own when it is done with those before; never waits."""
        if self._has_failed:
            return
        try:
            self._waiting.put_nowait((method, values))
        except queue.Full:
            if not self._is_behind:
                text = "%-10s is %d records behind: it lacks those that come before it has caught up"
                logging.warning(text, self._name, MOST_WAITING)
            self._is_behind = True

    def close(self, code: int):
        """Has the tracker close when it is done with what is waiting."""
        if self._waiting.full():
            with contextlib.suppress(queue.Empty):
                self._waiting.get_nowait()
        self.call("close", code)

    def wait(self, deadline: float):
        """Waits for a tracker that closes, until `deadline` of time.monotonic."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            logging.warning("%-10s did not finish in time; the run does not wait longer", self._name)

    def _work(self, make: Callable[[], Tracker]):
        try:
            tracker, method, is_flushed = make(), "", True
            while method != "close":
                try:
                    method, values = self._waiting.get(timeout=None if is_flushed else IDLE_SECONDS)
                except queue.Empty:
                    method, values = "flush", ()
                getattr(tracker, method)(*values)
                is_flushed = method == "flush"
        except Exception as error:
            self._has_failed = True
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
            logging.warning("%-10s %s; the run continues without it", self._name, reason)
