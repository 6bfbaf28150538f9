"""Global batches of token ids: which sequences make batch t, and how each process reads its rows.

Law: for a given config and dataset, global batch t depends on t alone. These fields of the config count:
seed, model.context_length, batch_size, batch_schedule, spikes.skip_data, and of `dataset` order, block_tokens
and mixture; for JSON lines also streams and window. Prepared data have one endless order of sequences, called
rows here, and batch t is the next `batch_sizes.at(t)` of them after those of batches 0 to t - 1 and what is
left out. Hosts, devices, workers, micro-steps and restarts only decide who reads which of them. The
position is one integer: rows consumed. A run with load_path continues where that run stopped in the data.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from trainit.cluster.process import end_with_parent
from trainit.data.documents.targets import Targets
from trainit.data.rows import order
from trainit.data.rows.mixture import Mixture
from trainit.data.rows.order import Ordered

Shape = tuple[int, int, int]  # of a global batch: micro-steps G, rows of a micro-step b, length L


class DataPosition(NamedTuple):
    """How far a run is in its training data."""

    rows: int = 0  # sequences consumed
    streams: list[list[int]] | None = None  # of streamed data: the state of each stream after these rows
    tokens: int = 0  # targets in these rows, without the padding of short sequences

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], length: int) -> "DataPosition":
        """Reads the position from a checkpoint's meta data, for sequences of `length` targets.

        The checkpoint may have had sequences of another length. Rows are then counted in the new length, and
        each stream begins its window of sequences again, since windows are cut differently.
        """
        before = meta["config"]["model"]["context_length"]
        rows, streams = meta["rows"] * before // length, meta.get("streams")
        if streams and before != length:
            streams = [[*state, 0] for *state, _ in streams]
        return cls(rows, streams, meta.get("tokens", meta["rows"] * before))

    def to_meta(self) -> dict[str, Any]:
        """Returns the entries of a checkpoint's meta data that `from_meta` and `has_same_order` read."""
        return {**self._asdict(), "order": order.VERSION}


START = DataPosition()


def has_same_order(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's position means the same sequences now: its shuffles have the present version.

    Data in the order of the disk has no shuffles. Version 3 has changed those of mixtures only.
    """
    dataset = meta["config"]["dataset"]
    sequential = "streams" not in dataset and dataset["order"] == "sequential"
    oldest = order.VERSION if dataset.get("mixture") else 2
    return sequential or meta.get("order", 1) >= oldest


@dataclass(frozen=True)
class BatchSource:
    """What Grain reads. Record j is this process's rows of the j-th global batch after row `first_row`.

    A record is as `batches` describes them, with ids in the dataset's small type.
    """

    source: Ordered | Mixture
    first_row: int
    shape: Shape  # of the global batch
    rows: slice  # those of each micro-step that this process reads
    batches: int
    targets: Targets | None = None

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, record: int) -> dict[str, np.ndarray]:
        micro_steps, rows, length = self.shape
        in_batch = np.arange(micro_steps * rows).reshape(micro_steps, rows)[:, self.rows]
        positions = self.first_row + int(record) * micro_steps * rows + in_batch.ravel()
        ids, lengths = self.source.read(positions, length)
        batch = {
            "tokens": ids.reshape(*in_batch.shape, length + 1),
            "lengths": lengths.reshape(in_batch.shape),
        }
        if self.targets:
            assert isinstance(self.source, Ordered)  # a mixture is not for validation
            about = self.targets.read(self.source.order(positions), length)
            batch["subsets"], batch["bytes"] = (x.reshape(*in_batch.shape, length) for x in about)
        return batch


def batches(
    source: Ordered | Mixture,
    shape: Shape,
    sharding: jax.sharding.NamedSharding,
    first_row: int = 0,
    count: int = 1 << 40,
    workers: int = 0,
    prefetch: int = 2,
    targets: Targets | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Yields `count` global batches on the devices, from row `first_row` of the source on.

    A batch is {"tokens": (G, b, L + 1) ids, "lengths": (G, b) int32, how many targets of each row count}, and
    with `targets` "subsets" and "bytes" of each target, (G, b, L); only `Ordered` sources have these.
    `sharding` may split the second axis only. Each of `workers` processes, or a thread for 0, reads
    `prefetch` batches ahead. Raises RuntimeError if a worker died.
    """
    own_rows = local_rows(shape, sharding)
    rows_read = BatchSource(source, first_row, shape, own_rows, count, targets)
    reader = grain.MapDataset.source(rows_read).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    )
    if workers:
        reader = reader.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            end_with_parent,
        )
    yield from on_devices(reader, own_rows, shape, sharding)


def local_rows(shape: Shape, sharding: jax.sharding.NamedSharding) -> slice:
    """Returns the rows of each micro-step that this process reads: from its devices' first to their last."""
    micro_steps, rows, _ = shape
    local = sharding.addressable_devices_indices_map((micro_steps, rows)).values()
    ranges = [index[1].indices(rows)[:2] for index in local if index is not None]
    return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def on_devices(
    records: Iterable[dict[str, np.ndarray]],
    own_rows: slice,
    shape: Shape,
    sharding: jax.sharding.NamedSharding,
) -> Iterator[dict[str, jax.Array]]:
    """Yields global arrays (G, b, ...) made of records of this process's rows, arrays (G, rows, ...)."""

    def place(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(shape[1])
            return local[:, start - own_rows.start : stop - own_rows.start]

        return jax.make_array_from_callback((*shape[:2], *local.shape[2:]), sharding, part)

    for record in records:
        yield {name: place(local) for name, local in record.items()}
