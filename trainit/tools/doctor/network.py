"""Checks all-reduces over the job's devices: whether their sums are right, and how fast they are."""

import math
import statistics
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.cluster import sync
from trainit.tools import timing
from trainit.tools.doctor.report import NOTE, Result, judge

REPETITIONS = 5  # of each all-reduce that is timed
MIB_ON_CPUS, MIB_ON_OTHERS = 4, 64  # of each device in an all-reduce


def check_all_reduces(hosts: list[str]) -> list[Result]:
    """Checks all-reduces over all devices, within hosts and between them. A collective.

    `hosts` has the host of each process.
    """
    # A mesh of hosts by devices needs the same number of devices on each host.
    devices, names = jax.devices(), list(dict.fromkeys(hosts))
    by_host = [[d for d in devices if hosts[d.process_index] == name] for name in names]
    if len({len(group) for group in by_host}) > 1:
        return [Result("all-reduce", NOTE, "not timed: the hosts have different numbers of devices")]
    mesh = Mesh(np.array(by_host), ("hosts", "devices"))
    mib = MIB_ON_CPUS if devices[0].platform == "cpu" else MIB_ON_OTHERS

    results = []
    checks = {"all-reduce": mesh.axis_names, "within hosts": ("devices",), "between hosts": ("hosts",)}
    for check, axes in checks.items():
        if len(axes) == 1 and mesh.shape[axes[0]] == 1:
            results.append(Result(check, NOTE, f"there is only one {axes[0].removesuffix('s')}"))
            continue
        correct, rate = _time_all_reduce(mesh, axes, mib << 20)
        # Each process knows of its own devices only.
        all_correct = sync.gather(correct)
        wrong = sorted({host for host, right in zip(hosts, all_correct, strict=True) if not right})
        finding = f"{rate / 1e9:.2f} GB/s bus bandwidth; {mib} MiB of float32 per device"
        failure = f"wrong sums on {', '.join(wrong)}" if wrong else ""
        remedy = "check the network and drivers of these hosts with NCCL_DEBUG=INFO, or run without them"
        results.append(judge(check, finding, failure, remedy))
    return results


def _time_all_reduce(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[bool, float]:
    """Returns whether an all-reduce over these axes is right on this process's devices, and bytes a second.

    These are NCCL's bus bandwidth. Device i holds (i + 1) * (0, 1, 2, ...) in an array of `size` bytes, whose
    sums have a closed form that float32 represents exactly.
    """
    # The factor of each device, and the sum of the factors in its group.
    factors = np.arange(1, mesh.size + 1, dtype=np.float32).reshape(mesh.devices.shape)
    summed_axes = tuple(mesh.axis_names.index(axis) for axis in axes)
    expected = np.broadcast_to(factors.sum(axis=summed_axes, keepdims=True), factors.shape).ravel()
    ramp = np.arange(size // 4, dtype=np.float32) % 61

    def rows(index: Any) -> np.ndarray:
        return factors.ravel()[index[0]][:, None] * ramp

    layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    given = jax.make_array_from_callback((mesh.size, len(ramp)), layout, rows)
    all_reduce = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=layout.spec, out_specs=layout.spec)
    )
    correct = all(
        np.array_equal(shard.data, expected[shard.index[0]][:, None] * ramp)
        for shard in all_reduce(given).addressable_shards
    )

    # Bus bandwidth as NCCL's tests define it: a ring of n sends 2 (n - 1) / n of the array.
    seconds = statistics.median(timing.seconds(lambda: all_reduce(given)) for _ in range(REPETITIONS))
    devices = math.prod(mesh.shape[axis] for axis in axes)
    return correct, 2 * (devices - 1) / devices * size / seconds
