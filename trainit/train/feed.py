"""The training batches of a run, read while the devices compute."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import InitVar, dataclass

import jax

from trainit.cluster.monitor import JobMonitor
from trainit.data.loader import DataPosition
from trainit.data.training_data import TrainingData
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train.reports.metrics import Meter

POLL_SECONDS = 0.2  # how often a process that waits for data looks whether the job stops


@dataclass
class BatchFeed:
    """Training batches from the current step on; each process reads its own rows of them.

    A thread fetches the next batch while a step runs. Batches are read up to the next change of batch size or
    the next that are left out; there, a new reader takes over, since streamed data know their position only
    when they have come that far.
    """

    data: TrainingData
    shape: RunShape
    monitor: JobMonitor
    meter: Meter  # learns how long steps wait for data
    step: int  # steps done
    begin: InitVar[DataPosition]  # after these steps

    def __post_init__(self, begin: DataPosition):
        self._rows = begin.rows
        # This pool is never closed: closing would wait for data that may never come.
        self._thread = ThreadPoolExecutor(1, "data")
        self._read_from(begin)
        self._next = self._thread.submit(next, self._batches)

    def _read_from(self, position: DataPosition):
        """Reads on from this position, with the batch size of the current step, after what it leaves out."""
        # The reader gets just as many batches as have this size. None are left after the last step.
        sizes, self._begin = self.shape.batch_sizes, (self.step, position)
        ahead = sizes.stretches(self.step, sizes.run_steps)
        left_out, size, count = ahead[0] if ahead else (0, sizes.sizes[-1], 0)
        self._rows += left_out * size
        layout = batch_sharding(self.shape.device_mesh)
        self._reader = self.data.reader(self.shape.batch_of(size), layout, position)
        self._batches = itertools.islice(self._reader.batches(left_out + count), left_out, None)

    def next(self) -> dict[str, jax.Array] | None:
        """The batch of the current step, or an error of reading; None if the job stops before it has come."""
        # A process that waits must neither look like one that stalls nor miss a request to stop.
        begun = time.perf_counter()
        self.monitor.watchdog.doing = "waiting for data"
        while not self.monitor.stop_is_due():
            if wait([self._next], timeout=POLL_SECONDS).done:
                batch = self._next.result()
                self.meter.waited_for_data(time.perf_counter() - begun)
                self.monitor.watchdog.doing = "training"
                return batch
        return None

    def advance(self):
        """Counts the batch from `next` as consumed, and fetches the one after it. All processes call it."""
        self._rows += self.shape.batch_sizes.at(self.step)
        self.step += 1
        if self.step in {*self.shape.batch_sizes.starts, *dict(self.shape.batch_sizes.skipped)}:
            self._read_from(self.position())
        self._next = self._thread.submit(next, self._batches)

    def position(self) -> DataPosition:
        """The position after the current step, before what is left out. All processes call it together."""
        begun_at, position = self._begin
        return position if self.step == begun_at else self._reader.position(self._rows)
