"""Whole matrices of stacked layers, dealt out over the devices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.parallel.layout import logical_axes, matrix_spec, partition_spec


def map_layers(path: str, mesh: Mesh | None, function: Callable, *stacks):
    """function(matrix, ...) -> matrices, for each layer.

    Each device has the whole matrices of one layer at a time; when all have done theirs, the next ones
    follow. Replicas share the work as far as there are layers for them, and else do the same.

    Args:
        path: a stacked parameter that is no vector.
        mesh: over whose devices the layers are dealt out; None: one device.
        function: takes one layer's matrices, on one device; trees of them are nested as those of `stacks`.
        stacks: trees of (layers, rows, columns), of the parameter or of squares that belong to it.

    Returns:
        The results, stacked.
    """
    if mesh is None:
        return jax.lax.map(lambda layer: function(*layer), stacks)
    layers = len(jax.tree.leaves(stacks)[0])
    owners, devices = _owners(path, mesh, layers)
    rounds = -(-layers // devices)

    def local(stacks):
        return jax.tree.map(lambda y: y[None], function(*jax.tree.map(lambda x: x[0], stacks)))

    each = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=PartitionSpec(owners),
        out_specs=PartitionSpec(owners),
        check_vma=False,  # replicas do the same
    )

    def one_each(batch):
        gathered = jax.tree.map(lambda x: _move(x, mesh, _layouts(path, mesh, x.shape, owners)), batch)
        done = each(gathered)
        return jax.tree.map(lambda y: _move(y, mesh, _layouts(path, mesh, y.shape, owners)[::-1]), done)

    def deal(x):
        padded = jnp.pad(x, ((0, rounds * devices - layers), (0, 0), (0, 0)))
        return padded.reshape(rounds, devices, *x.shape[1:])

    done = jax.lax.map(one_each, jax.tree.map(deal, stacks))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:layers], done)


def _owners(path: str, mesh: Mesh, layers: int) -> tuple[tuple[str, ...], int]:
    """The axes over which matrices are dealt out, and the number of devices along them.

    They are those that hold parts of a matrix, times replicas up to `layers`.
    """
    axes = partition_spec(logical_axes(path))
    owners = [axis for axis in mesh.axis_names if axis in axes]
    devices = math.prod(mesh.shape[axis] for axis in owners)
    for axis in mesh.axis_names:
        if axis not in owners and devices * mesh.shape[axis] <= layers:
            owners.append(axis)
            devices *= mesh.shape[axis]
    return tuple(owners), devices


def _layouts(path: str, mesh: Mesh, shape: tuple[int, ...], owners: tuple[str, ...]) -> list[PartitionSpec]:
    """Of as many matrices as devices: from each split over rows and columns to one whole on each device.

    One axis of the mesh moves at a time, which is an exchange among its devices; XLA would gather all
    matrices everywhere if asked for both at once.
    """
    split = matrix_spec(path, shape, mesh)
    _, rows, columns = split
    held = tuple(axis for axis in owners if axis in (rows, columns))
    return [split, PartitionSpec(rows, None, columns), PartitionSpec(held), PartitionSpec(owners)]


def _move(x: jax.Array, mesh: Mesh, layouts: list[PartitionSpec]) -> jax.Array:
    for layout in layouts:
        x = constrain(x, mesh, layout)
    return x


def as_parameter(path: str, matrices: jax.Array, shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    """A parameter's matrices in its own shape and layout."""
    return constrain(matrices.reshape(shape), mesh, partition_spec(logical_axes(path)))


def constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
