"""Global batches of token ids: which sequences make batch t, and how each process reads its rows.

Law: global batch t is a pure function of (dataset, seed, t). Row r of the job is row number
`row` in one endless order of sequences, epoch after epoch, each epoch shuffled anew by Grain's
index shuffle; batch t is rows [t*B, (t+1)*B). Hosts, devices, workers, micro-steps and restarts
only decide who reads which of these rows. The position in the data is one integer: rows consumed.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import grain
import jax
import numpy as np

# Grain's public shuffle wraps this function at 16 us a record, where a batch of rows wants 3.
from grain._src.python.experimental.index_shuffle.python.index_shuffle_module import index_shuffle

from trainit.data.tokens import Split


@dataclass(frozen=True)
class Shuffled:
    """Position in the endless order -> sequence; every epoch is a permutation of all sequences."""

    sequences: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        n = self.sequences
        return np.array(
            [
                index_shuffle(p % n, max_index=n - 1, seed=(self.seed + p // n) % 2**32, rounds=4)
                for p in positions.tolist()
            ],
            np.int64,
        )


@dataclass(frozen=True)
class Spaced:
    """`chosen` of all sequences, evenly spaced, in order, and nothing (-1) behind them."""

    sequences: int
    chosen: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < self.chosen, positions * self.sequences // self.chosen, -1)


@dataclass(frozen=True)
class BatchSource:
    """Record j: this process's rows of the j-th global batch behind row `first_row`.

    A record is {"tokens": (G, rows, L + 1) ids in the dataset's narrow type, "lengths": (G, rows)
    int32, how many targets of each row count}.
    """

    split: Split
    order: Callable[[np.ndarray], np.ndarray]
    first_row: int
    shape: tuple[int, int, int]  # of the global batch: micro-steps G, rows of one b, L
    rows: slice  # of each micro-step, those that this process reads
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        micro_steps, rows, length = self.shape
        in_batch = np.arange(micro_steps * rows).reshape(micro_steps, rows)[:, self.rows]
        positions = self.first_row + int(record) * micro_steps * rows + in_batch.ravel()
        ids, lengths = self.split.read(self.order(positions), length)
        return {
            "tokens": ids.reshape(*in_batch.shape, length + 1),
            "lengths": lengths.reshape(in_batch.shape),
        }


def batches(
    split: Split,
    order: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, int, int],
    sharding: jax.sharding.NamedSharding,
    first_row: int = 0,
    count: int = 1 << 40,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches on the devices, read ahead by a thread or by worker processes.

    Args:
        split: where the tokens lie.
        order: position in the endless order -> sequence number.
        shape: (micro-steps G, rows of a micro-step b, length L); a batch is G * b rows.
        sharding: of arrays (G, b, ...); only the second axis may be split.
        first_row: rows consumed before the first batch.
        count: how many batches there are to come.
        workers: processes that read; 0: a thread of this process.
        prefetch: batches read ahead (by each worker).

    Yields:
        {"tokens": (G, b, L + 1) ids, "lengths": (G, b) int32}, global arrays.

    Raises:
        RuntimeError: a worker process died.
    """
    mine = local_rows(shape, sharding)
    source = BatchSource(split, order, first_row, shape, mine, count)
    reader = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    )
    if workers:
        reader = reader.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            end_with_parent,
        )
    yield from on_devices(reader, mine, shape, sharding)


def end_with_parent(worker: int, workers: int):
    """Called by Grain in each worker process, which ends when its parent has, even by kill -9."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def local_rows(shape: tuple[int, int, int], sharding: jax.sharding.NamedSharding) -> slice:
    """The rows of each micro-step that this process reads: from its devices' first to their last."""
    micro_steps, rows, _ = shape
    local = sharding.addressable_devices_indices_map((micro_steps, rows)).values()
    mine = [index[1].indices(rows)[:2] for index in local]
    return slice(min(start for start, _ in mine), max(stop for _, stop in mine))


def on_devices(
    records: Iterable[dict[str, np.ndarray]],
    mine: slice,
    shape: tuple[int, int, int],
    sharding: jax.sharding.NamedSharding,
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays (G, b, ...) out of records of this process's rows, arrays (G, rows, ...)."""
    _, rows, _ = shape

    def place(local: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[1].indices(rows)
            return local[:, start - mine.start : stop - mine.start]

        return jax.make_array_from_callback((local.shape[0], rows, *local.shape[2:]), sharding, part)

    for record in records:
        yield {name: place(local) for name, local in record.items()}
