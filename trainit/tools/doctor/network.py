"""All-reduces over the job's devices: whether their sums are right, and how fast they are."""

import statistics
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.cluster import distributed
from trainit.tools.doctor.report import FAIL, NOTE, OK, Row

REDUCE_BYTES = {"cpu": 1 << 22}  # of each device in an all-reduce that is timed
REDUCE_BYTES_DEFAULT = 1 << 26


def _reduce_over(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[bool, float]:
    """Whether an all-reduce over these axes is right, and its bus bandwidth in bytes per second.

    Each device holds its number + 1 times 0, 1, 2, ...; sums have a closed form that float32 has exactly.
    """
    shape = mesh.devices.shape
    numbers = np.arange(1, mesh.size + 1, dtype=np.float32).reshape(shape)
    over = tuple(mesh.axis_names.index(axis) for axis in axes)
    sums = np.broadcast_to(numbers.sum(axis=over, keepdims=True), shape).ravel()
    ramp = np.arange(size // 4, dtype=np.float32) % 61
    layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    given = jax.make_array_from_callback(
        (mesh.size, len(ramp)), layout, lambda index: numbers.ravel()[index[0]][:, None] * ramp
    )
    reduce = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=layout.spec, out_specs=layout.spec)
    )
    summed = reduce(given)
    right = all(
        np.array_equal(part.data, sums[part.index[0]][:, None] * ramp) for part in summed.addressable_shards
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(reduce(given))
        seconds.append(time.perf_counter() - start)
    count = int(np.prod([shape[i] for i in over]))
    return right, 2 * (count - 1) / count * size / statistics.median(seconds)


def reduce_rows(hosts: list[str]) -> list[Row]:
    """All-reduces within hosts and between them. A collective.

    Args:
        hosts: of each process.
    """
    devices = jax.devices()
    names = list(dict.fromkeys(hosts))
    by_host = [[d for d in devices if hosts[d.process_index] == name] for name in names]
    if len({len(group) for group in by_host}) > 1:
        return [Row("all-reduce", NOTE, "not timed: the hosts have different numbers of devices")]
    mesh = Mesh(np.array(by_host), ("hosts", "devices"))
    size = REDUCE_BYTES.get(devices[0].platform, REDUCE_BYTES_DEFAULT)
    rows = []
    for name, axes, several in (
        ("all-reduce", ("hosts", "devices"), True),
        ("within hosts", ("devices",), len(by_host[0]) > 1),
        ("between hosts", ("hosts",), len(names) > 1),
    ):
        if not several:
            rows.append(Row(name, NOTE, f"there is one {axes[0].removesuffix('s')} only"))
            continue
        right, rate = _reduce_over(mesh, axes, size)
        wrong = [host for host, good in zip(hosts, distributed.gather(right), strict=True) if not good]
        seen = f"{rate / 1e9:.2f} GB/s bus bandwidth over {size >> 20} MiB of float32 a device"
        if wrong:
            remedy = "see the network and drivers of these hosts; try NCCL_DEBUG=INFO, or without them"
            rows.append(Row(name, FAIL, f"wrong sums on {', '.join(sorted(set(wrong)))}", remedy))
        else:
            rows.append(Row(name, OK, seen))
    return rows
