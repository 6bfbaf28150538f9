"""Finds devices that compute or keep wrong numbers without an error (`check.every_steps`).

Replicas of the parameters and of the optimizer's state must be equal, bit for bit, after every step. And the
gradient of a batch, computed twice by one program from the same parameters, must be the same: that repeats a
step except for its update, and so needs no second state. What is compared are hashes, of which each device
computes its own; nothing is copied.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.cluster.watchdog import Watchdog
from trainit.config.exit_codes import DAMAGED

CHUNK = 1 << 18  # numbers that are hashed at once


class DamageError(RuntimeError):
    """A device has computed or kept other numbers than it must."""

    exit_code = DAMAGED

    def __init__(self, step: int, devices: np.ndarray, what: str) -> None:
        """After `step` steps, these devices do or have something wrong."""
        names = (f"device {d.id} ({d.device_kind}) of process {d.process_index}" for d in devices.flat)
        super().__init__(
            f"after step {step}, {', '.join(names)} {what}: this state is not saved, and that of the newest "
            f"checkpoint was compared; run the same command again, without that device's host"
        )


@dataclass
class DeviceCheck:
    """The checks of a run, due every N steps (0: none), and those of replicas also before each save.

    Both raise DamageError. All processes call them together.
    """

    every_steps: int
    steps: Any  # the run's `CompiledSteps`
    watchdog: Watchdog
    checkpoints: Any  # the run's `CheckpointStore`

    def __post_init__(self) -> None:
        state = self.steps.abstract_state
        layout = [leaf.sharding for leaf in jax.tree.leaves((state.params, state.opt_state))]
        self.mesh, specs = layout[0].mesh, [sharding.spec for sharding in layout]
        # Along these axes of the mesh, devices have the same parts of all arrays.
        split = set(jax.tree.leaves([list(spec) for spec in specs]))
        self._axes = [index for index, axis in enumerate(self.mesh.axis_names) if axis not in split]
        if self.every_steps:
            count = math.prod(self.mesh.devices.shape[axis] for axis in self._axes)
            logging.info("check      every %d steps: %d replicas, a gradient twice", self.every_steps, count)

    def __call__(self, step: int, state: Any, batch: Any) -> None:
        """Does what is due after `step` steps; `batch` is the next one."""
        if self.every_steps and step and step % self.every_steps == 0:
            self.replicas(step, state)
            with self.watchdog.long_task("computing a gradient twice"):
                twice = [self.steps.hashes["gradient"](state.params, batch, state.step) for _ in range(2)]
                first, second = map(np.asarray, twice)
            self._require_none(first != second, step, "compute another gradient when they do it again")

    def replicas(self, step: int, state: Any) -> None:
        """Compares the replicas of the state after `step` steps."""
        if self.every_steps and self._axes:
            with self.watchdog.long_task("comparing replicas"):
                found = np.asarray(self.steps.hashes["replicas"]((state.params, state.opt_state)))
            wrong = odd_ones(found, self._axes)
            self._require_none(wrong, step, "have another state than their replicas")

    def _require_none(self, wrong: np.ndarray, step: int, what: str) -> None:
        if wrong.any():
            with contextlib.suppress(Exception):  # that save is of a state that was compared
                self.checkpoints.wait()
            raise DamageError(step, self.mesh.devices[wrong], what)


def hashes(mesh: Mesh, layout: Any, tree: Any) -> jax.Array:
    """A hash of each device's parts of the arrays in a tree: uint32 in the shape of the mesh.

    `layout` has their shardings. One changed number always changes it, since all factors are odd.
    """

    def own(leaves: list[jax.Array]) -> jax.Array:
        total = jnp.uint32(0)
        for leaf in leaves:
            total = 31 * total + (_hash(leaf.reshape(-1)) if leaf.size else 0)
        return total.reshape([1] * len(mesh.axis_names))

    # Without the check of varying axes: what must be equal is hashed on each device all the same.
    inputs = ([sharding.spec for sharding in jax.tree.leaves(layout)],)
    outputs = PartitionSpec(*mesh.axis_names)
    on_each = jax.shard_map(own, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return on_each(jax.tree.leaves(tree))


def _hash(array: jax.Array) -> jax.Array:
    """The sum of the bits of an array's numbers, as uint32, each times an odd number of its own.

    It takes CHUNK numbers at a time: on CPUs, the products of all of them would be in memory at once.
    """
    count = min(array.size, CHUNK)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        # The last chunk ends with the array, and leaves out what it shares with the one before.
        first = jnp.minimum(index * count, array.size - count)
        part = jax.lax.dynamic_slice(array, (first,), (count,))
        part = part.astype(jnp.uint8) if part.dtype == bool else part
        bits = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}").astype(jnp.uint32)
        places = first + jnp.arange(count)
        factors = jnp.where(places >= index * count, 2 * places.astype(jnp.uint32) + 1, 0)
        return total + jnp.sum(bits * factors, dtype=jnp.uint32)

    return jax.lax.fori_loop(0, -(-array.size // count), add, jnp.uint32(0))


def functions(mesh: Mesh, params: Any, opt_state: Any, gradient: Callable) -> dict[str, Callable]:
    """What is compared: "replicas" of a pair of params and opt_state, and "gradient" of its arguments.

    Both return `hashes`. Params and opt_state are shardings; `gradient` returns a gradient and sums.
    """

    def gradient_hashes(*arguments: Any) -> jax.Array:
        grads, sums = gradient(*arguments)
        everywhere = dict.fromkeys(sums, NamedSharding(mesh, PartitionSpec()))
        return hashes(mesh, (params, everywhere), (grads, sums))

    return {
        "replicas": lambda state: hashes(mesh, (params, opt_state), state),
        "gradient": gradient_hashes,
    }


def odd_ones(found: np.ndarray, axes: list[int]) -> np.ndarray:
    """Which devices differ from most of those along these axes; where there is no majority, all of them."""
    moved = np.moveaxis(found, axes, range(len(axes)))
    replicas = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
    agreeing = (replicas[:, None] == replicas[None]).sum(1)
    odd = (2 * agreeing <= len(replicas)) & (agreeing < len(replicas))
    return np.moveaxis(odd.reshape(moved.shape), range(len(axes)), axes)
