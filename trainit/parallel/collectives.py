"""`Parallel`: how a model's functions run on a mesh, and what devices exchange in them.

Functions that exchange something run on each device inside `jax.shard_map`: they see this device's part of
each array, and call what is below. Nothing is left to XLA's partitioner, which would reduce gradients in the
compute type, by all-reduce, and where it likes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.parallel.layout import mesh_axes

Axes = tuple[str, ...]  # of the mesh
MaybeArray = jax.Array | None


def gather(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """All-gather: makes a dimension whole that is split over mesh axes."""
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def scatter_sum(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """Reduce-scatter: the sum over mesh axes, of which each device keeps its part along a dimension."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x


def exchange(x: jax.Array, axes: Axes, split: int, join: int) -> jax.Array:
    """All-to-all: splits dimension `split`, which was whole, over mesh axes, and joins dimension `join`."""
    return jax.lax.all_to_all(x, axes, split, join, tiled=True) if axes else x


def sum_over(tree: Any, axes: Axes) -> Any:
    """All-reduce: the sum over mesh axes of each array in a tree."""
    return jax.lax.psum(tree, axes) if axes else tree


@dataclass(frozen=True)
class Parallel:
    """The mesh that a model runs on, and how its functions are mapped over it."""

    mesh: Mesh | None = None  # None: one device
    accumulate_locally: bool = False  # inside `sum_over_replicas`: nothing is exchanged over data
    kernel_parts: int = 1  # if above 1, kernels have their inputs last; see `cpu_workarounds.product`

    def axes(self, *logical: str | None, but: Axes = ()) -> Axes:
        """The mesh axes of more than one device, except `but`, over which these logical axes are split."""
        shape = self.mesh.shape if self.mesh else {}
        taken = (*but, "data") if self.accumulate_locally else but
        return tuple(axis for axis in mesh_axes(*logical) if shape.get(axis, 1) > 1 and axis not in taken)

    def parts(self, logical: str) -> int:
        """Into how many parts this logical axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical)) if self.mesh else 1

    @property
    def sequence_axes(self) -> Axes:
        """The mesh axes that split the length of the residual stream, but not of attention's inputs."""
        return self.axes("residual_length", but=self.axes("length"))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """How an array with these logical axes is split, one for each dimension."""
        return PartitionSpec(*(self.axes(axis) for axis in logical))

    def constrain(self, array: jax.Array, *logical: str | None) -> jax.Array:
        """The same array, laid out by its logical axes: constrain(array, "batch", "length", None)."""
        return array if self.mesh is None else self.constrain_to(array, self.spec(*logical))

    def constrain_to(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The same array, laid out as a spec says."""
        assert self.mesh is not None
        layout = spec if self.accumulate_locally else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(array, layout)

    def shard_map(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """A function of whole arrays that runs `function` on each device's parts, by specs for both sides."""
        if not self.accumulate_locally:
            return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs)
        assert self.mesh is not None
        # Inside the shard_map over data, whose mesh is taken. With the check of varying axes, JAX 0.10 and
        # 0.11 would split what is kept for the backward pass over data a second time.
        rest = {axis for axis in self.mesh.axis_names if axis != "data"}
        return jax.shard_map(function, in_specs=inputs, out_specs=outputs, axis_names=rest, check_vma=False)

    def shard_map_if_needed(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """What `shard_map` gives, but the function itself on one device."""
        if self.mesh is None or self.mesh.size == 1:
            return function
        return self.shard_map(function, inputs, outputs)

    def varying(self, tree: Any, *logical: str | None) -> Any:
        """Inside shard_map: marks arrays that are equal on all devices as different along these axes."""
        return tree if self.accumulate_locally else jax.lax.pcast(tree, self.axes(*logical), to="varying")

    def sum_gradient(self, gradient: jax.Array, dimension: int) -> jax.Array:
        """Inside shard_map: sums a kernel's gradient over all positions; fsdp splits it along a dimension."""
        fsdp = self.axes("embed")
        return sum_over(scatter_sum(gradient, fsdp, dimension), self.axes("batch", "length", but=fsdp))

    def sum_over_replicas(self, function: Callable, batch: Any, *shared: Any) -> Any:
        """function(batch, *shared) of each replica's part of the batch, summed over the replicas at the end.

        It uses a `Parallel` with `accumulate_locally`. The second axis of the batch's arrays is split over
        data; the trees in `shared` are the same for all replicas.
        """
        return jax.shard_map(
            lambda *arguments: jax.lax.psum(function(*arguments), "data"),
            mesh=self.mesh,
            in_specs=(PartitionSpec(None, "data"), *[PartitionSpec()] * len(shared)),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,
        )(batch, *shared)

    def first_row(self, micro_step: jax.Array | int, rows: int) -> jax.Array | int:
        """The row of the global batch with which a micro-step of this size, or a replica's part, begins."""
        if not self.accumulate_locally:
            return micro_step * rows
        assert self.mesh is not None
        return (micro_step * self.mesh.shape["data"] + jax.lax.axis_index("data")) * rows


ONE_DEVICE = Parallel()
