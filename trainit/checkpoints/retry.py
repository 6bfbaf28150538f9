"""Saving by all processes of a job. A save that fails on any of them is repeated by all."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from absl import logging

from trainit.checkpoints.state import TrainState
from trainit.checkpoints.store import CheckpointStore
from trainit.cluster import sync
from trainit.cluster.monitor import JobMonitor

RETRY_SECONDS = (1, 5, 20)  # pauses before a failed save is tried again; then the run ends
DURABLE, BUSY, FAILED = range(3)  # what has become of a save


class SaveError(RuntimeError):
    """A checkpoint could not be saved, although it was tried several times."""


@dataclass
class SaveRetry:
    """The saves of one run. At most one is under way, and none fails unnoticed.

    A save runs in the background for many steps, and its memory is reused meanwhile. So a save that failed
    cannot be repeated: instead, all processes save the step that they have come to.
    """

    checkpoints: CheckpointStore
    monitor: JobMonitor  # passes reports of failed saves between processes
    make_meta: Callable[[], dict]  # called right before a save starts: what belongs to the state, as JSON
    saved_step: int | None  # of the newest checkpoint, if there is one
    check_state: Callable[[int, TrainState], None] = lambda step, state: None  # before each save
    _failures: int = 0  # in a row

    def check(self):
        """Reports to the other processes if a save has failed here; cheap."""
        if error := self.checkpoints.error():
            self.monitor.agreement.report_failed_save(str(error))

    def save(self, step: int, state: TrainState):
        """Starts a save, after the one before is durable; does nothing if the step is saved already."""
        if step != self.saved_step:
            self.settle(step, state)  # which saves this step if the save before has failed
        if step != self.saved_step:
            self._start(step, state)

    def save_again(self, step: int, state: TrainState):
        """Saves after a report that a save has failed somewhere. All processes call it at the same step."""
        # Process 0 clears the report after the collective in `settle`, the others before it, so that a new
        # report cannot be mistaken for this one.
        if not sync.is_lead():
            self.monitor.agreement.clear_failed_save()
        self.settle(step, state)
        if sync.is_lead():
            self.monitor.agreement.clear_failed_save()

    def settle(self, step: int, state: TrainState):
        """Returns when the newest save is durable. If it has failed on any process, all save this step."""
        with self.monitor.watchdog.long_task("saving"):
            while self._outcome() == FAILED:
                reason = self.checkpoints.error() or "another process says why"
                if self._failures == len(RETRY_SECONDS):
                    raise SaveError(
                        f"a checkpoint could not be saved in {self._failures + 1} attempts in "
                        f"{self.checkpoints.folder}: {reason}; the one before it is whole"
                    )
                pause = RETRY_SECONDS[self._failures]
                logging.warning("save       failed, tried again in %d s: %s", pause, reason)
                self._failures += 1
                time.sleep(pause)
                if not self.checkpoints.reopen():
                    self._start(step, state)
            self._failures = 0

    def _start(self, step: int, state: TrainState):
        self.check_state(step, state)
        with self.monitor.watchdog.long_task("saving"):
            self.checkpoints.save(step, state, self.make_meta())
        self.saved_step = step

    def _outcome(self) -> int:
        """What has become of the newest save: the worst that any process reports. A collective."""
        # All ask all others again and again: where a part has failed, the save of the rest never ends.
        while True:
            is_busy = self.checkpoints.busy()  # before `error`, which knows all once nothing is under way
            own = FAILED if self.checkpoints.error() else BUSY if is_busy else DURABLE
            if (worst := max(sync.gather(own))) != BUSY:
                return worst
            time.sleep(0.02)
