"""Saving, by all processes of a job, what may fail on any of them: agreed, and tried again."""

import time
from collections.abc import Callable

from absl import logging

from trainit.cluster import sync
from trainit.cluster.monitor import JobMonitor
from trainit.train.checkpoint import CheckpointStore

RETRY_SECONDS = (1, 5, 20)  # pauses before a failed save is tried again; then the run ends
DURABLE, BUSY, FAILED = range(3)  # what becomes of a save


class SaveError(RuntimeError):
    """A checkpoint could not be saved, time and again."""


class SaveRetry:
    """The saves of one run: one under way at most, and none lost without notice."""

    def __init__(self, checkpoints: CheckpointStore, monitor: JobMonitor, start: Callable[[], None]):
        """
        Args:
            checkpoints: of the run.
            monitor: tells of failures elsewhere, and is told of those here.
            start: starts a save of the present step.
        """
        self._checkpoints, self._monitor, self._start = checkpoints, monitor, start
        self._failures = 0  # in a row

    def check(self):
        """Tells the others if a save has failed here; cheap."""
        if error := self._checkpoints.error():
            self._monitor.report_failed_save(str(error))

    def again(self):
        """A save has failed somewhere: all save the present step instead."""
        if not sync.is_lead():
            self._monitor.clear_failed_save()
        self.settle()
        if sync.is_lead():
            self._monitor.clear_failed_save()

    def settle(self):
        """Returns when the newest save is durable. If it has failed anywhere, all save the present step.

        Raises:
            SaveError: it fails time and again.
        """
        with self._monitor.watchdog.long_task("saving"):
            while self._outcome() == FAILED:
                reason = self._checkpoints.error() or "another process says why"
                if self._failures == len(RETRY_SECONDS):
                    raise SaveError(
                        f"a checkpoint could not be saved in {self._failures + 1} attempts: {reason}; the "
                        f"one before it is whole"
                    )
                pause = RETRY_SECONDS[self._failures]
                logging.warning("save       failed, tried again in %d s: %s", pause, reason)
                self._failures += 1
                time.sleep(pause)
                if not self._checkpoints.reopen():
                    self._start()
            self._failures = 0

    def _outcome(self) -> int:
        """What has become of the newest save, on all processes: a collective."""
        while True:
            while self._checkpoints.busy() and not self._checkpoints.error():
                if self._monitor.save_failed_somewhere():
                    break
                time.sleep(0.02)
            mine = DURABLE
            if self._checkpoints.error():
                mine = FAILED
            elif self._checkpoints.busy():
                mine = BUSY
            worst = max(sync.gather(mine))
            if worst != BUSY:
                return worst
