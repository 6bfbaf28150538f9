"""Newton-Schulz on the matrices that parameters are, and the layout in which it runs."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit import sharding
from trainit.sharding import is_stacked, matrix_shape

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, singular values end in about [0.7, 1.2]

POWER_STEPS = 12


def newton_schulz(x: jax.Array, steps: int, dtype: str, eps: float) -> jax.Array:
    """Nearly the orthogonal factor U V^T of x = U S V^T (Jordan 2024, kellerjordan.github.io/posts/muon).

    Args:
        x: (rows, columns), float32.
        steps: of the quintic iteration.
        dtype: of its products.
        eps: added to the Frobenius norm by which x is divided first.
    """
    a, b, c = COEFFICIENTS
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = (wide / (jnp.linalg.norm(wide) + eps)).astype(dtype)
    for _ in range(steps):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.astype(x.dtype)
    return y.T if x.shape[0] > x.shape[1] else y


def spectral_norm(x: jax.Array) -> jax.Array:
    """The largest singular value of a matrix, by POWER_STEPS power iterations from a fixed start.

    They cost two products with a vector each, where an SVD would take longer than the step. Too small by a
    few percent where the largest values are close to each other.
    """
    v = jax.random.normal(jax.random.key(0), (x.shape[1],))
    for _ in range(POWER_STEPS):
        v = x.T @ (x @ (v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(x.dtype).tiny)))
    return jnp.linalg.norm(x @ (v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(x.dtype).tiny)))


def orthogonalize(path: str, x: jax.Array, mesh: Mesh | None, **options) -> jax.Array:
    """`newton_schulz` of a parameter's matrix, times sqrt(max(1, fan_out / fan_in)).

    An embedding counts as its table is stored: its rows over its width. Of stacked layers each device
    has one whole matrix at a time; when all have done theirs, the next ones follow. Replicas share the
    work as far as there are layers for them, and else do the same.

    Args:
        path: of a parameter that is no vector.
        x: shaped as the parameter, layers axis included.
        mesh: over whose devices the layers are dealt out; None: one device.
        options: of `newton_schulz`.
    """
    shape = x.shape[1:] if is_stacked(path) else x.shape
    rows, columns = matrix_shape(path, shape)
    ratio = rows / columns if sharding.kind(path) == "embedding" else columns / rows
    matrices = x.reshape(-1, rows, columns)
    layouts, devices = _layouts(path, mesh, len(matrices)) if is_stacked(path) else ([PartitionSpec()], 1)

    def one_each(batch):
        for layout in layouts:
            batch = _constrain(batch, mesh, layout)
        batch = jax.vmap(lambda matrix: newton_schulz(matrix, **options))(batch)
        for layout in reversed(layouts):
            batch = _constrain(batch, mesh, layout)
        return batch

    if is_stacked(path):
        rounds = -(-len(matrices) // devices)
        padded = jnp.pad(matrices, ((0, rounds * devices - len(matrices)), (0, 0), (0, 0)))
        done = jax.lax.map(one_each, padded.reshape(rounds, devices, rows, columns))
        done = done.reshape(-1, rows, columns)[: len(matrices)]
    else:
        done = one_each(matrices)
    done = done.reshape(x.shape) * math.sqrt(max(1.0, ratio))
    return _constrain(done, mesh, sharding.spec(sharding.logical_axes(path)))


def _layouts(path: str, mesh: Mesh | None, layers: int) -> tuple[list[PartitionSpec], int]:
    """Of as many matrices as devices: from each split over rows and columns to one whole on each device.

    And the number of these devices: those that hold parts of a matrix, times replicas up to `layers`.

    One axis of the mesh moves at a time, which is an exchange among its devices; XLA would gather all
    matrices everywhere if asked for both at once.
    """
    if mesh is None:
        return [], 1
    axes = sharding.spec(sharding.logical_axes(path)[1:])
    inputs = 1 if sharding.logical_axes(path)[1] == "embed" else len(axes) - 1
    rows, columns = axes[0], axes[inputs]
    owners = [axis for axis in (rows, columns) if axis is not None]
    devices = math.prod(mesh.shape[axis] for axis in owners)
    for axis in mesh.axis_names:
        if axis not in owners and devices * mesh.shape[axis] <= layers:
            owners.append(axis)
            devices *= mesh.shape[axis]
    layouts = [
        PartitionSpec(None, rows, columns),
        PartitionSpec(rows, None, columns),
        PartitionSpec(tuple(axis for axis in (rows, columns) if axis is not None)),
        PartitionSpec(tuple(owners)),
    ]
    return layouts, devices


def scale_by_newton_schulz(mesh: Mesh | None, **options) -> optax.GradientTransformation:
    """`orthogonalize` for every parameter that the updates have."""

    def update(updates, params=None):
        del params
        return jax.tree.map_with_path(
            lambda path, u: orthogonalize(sharding.path_name(path), u, mesh, **options), updates
        )

    return optax.stateless(update)


def _constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec | None) -> jax.Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
