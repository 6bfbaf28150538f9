"""Whole matrices of stacked layers, dealt out over the devices."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.parallel.layout import logical_axes, matrix_spec, partition_spec


def map_layers(path: str, mesh: Mesh | None, function: Callable, *stacks: Any) -> Any:
    """function(matrix, ...) -> matrices, for each layer of a parameter's `stacks`; its results are stacked.

    These are trees of (layers, rows, columns), of the parameter or of squares that belong to it. Each device
    has the whole matrices of one layer at a time; when all have done theirs, the next ones follow. Replicas
    share the work as far as there are layers for them, and else do the same. Mesh None is one device.
    """
    if mesh is None:
        return jax.lax.map(lambda layer: function(*layer), stacks)
    layers = len(jax.tree.leaves(stacks)[0])
    owners, devices = _owners(path, mesh, layers)
    rounds = -(-layers // devices)

    def local(stacks: Any) -> Any:
        return jax.tree.map(lambda y: y[None], function(*jax.tree.map(lambda x: x[0], stacks)))

    spec = PartitionSpec(owners)
    each = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)  # for replicas

    def one_each(batch: Any) -> Any:
        way = functools.partial(_layouts, path, mesh, owners)
        done = each(jax.tree.map(lambda x: constrain(x, mesh, *way(x.shape)), batch))
        return jax.tree.map(lambda y: constrain(y, mesh, *way(y.shape)[::-1]), done)

    def deal(x: jax.Array) -> jax.Array:
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


def _layouts(path: str, mesh: Mesh, owners: tuple[str, ...], shape: tuple[int, ...]) -> list[PartitionSpec]:
    """Of as many matrices as devices: from each split over rows and columns to one whole on each device.

    One axis of the mesh moves at a time, which is an exchange among its devices; XLA would gather all
    matrices everywhere if asked for both at once.
    """
    split = matrix_spec(path, shape, mesh)
    _, rows, columns = split
    held = tuple(axis for axis in owners if axis in (rows, columns))
    return [split, PartitionSpec(rows, None, columns), PartitionSpec(held), PartitionSpec(owners)]


def as_parameter(path: str, matrices: jax.Array, shape: tuple[int, ...], mesh: Mesh | None) -> jax.Array:
    """A parameter's matrices in its own shape and layout."""
    return constrain(matrices.reshape(shape), mesh, partition_spec(logical_axes(path)))


def constrain(x: jax.Array, mesh: Mesh | None, *specs: PartitionSpec) -> jax.Array:
    """x in each of these layouts, one after the other."""
    shardings = [] if mesh is None else [NamedSharding(mesh, spec) for spec in specs]
    return functools.reduce(jax.lax.with_sharding_constraint, shardings, x)
