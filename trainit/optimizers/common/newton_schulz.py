"""Newton-Schulz on the matrices that parameters are, and their largest singular value."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from trainit.parallel import per_layer
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind
from trainit.parallel.trees import path_name

COEFFICIENTS = {  # of the quintic; under Jordan's, singular values end in about [0.7, 1.2]
    "jordan": (3.4445, -4.7750, 2.0315),
    "convergent": (2.0, -1.5, 0.5),  # they end at 1
}
POWER_STEPS = 12


def newton_schulz(x: jax.Array, steps: int, dtype: str, eps: float, coefficients="jordan") -> jax.Array:
    """Nearly the orthogonal factor U V^T of the float32 matrix x = U S V^T.

    `steps` times the quintic, with products in `dtype` (Jordan 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = COEFFICIENTS[coefficients]
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


def orthogonalize(path: str, x: jax.Array, mesh: Mesh | None, blocks: int = 1, **options) -> jax.Array:
    """`newton_schulz` of a parameter's matrix, times sqrt(max(1, fan_out / fan_in)).

    An embedding counts as its table is stored: its rows over its width. Stacked layers in x are dealt out
    over the mesh. With several blocks of columns, each is a matrix by itself.
    """
    rows, columns = matrix_shape(path, x.shape[1:] if is_stacked(path) else x.shape)
    ratio = rows / columns if parameter_kind(path) == "embedding" else columns / blocks / rows

    def one(matrix):
        parts = jnp.moveaxis(matrix.reshape(rows, blocks, -1), 1, 0)
        done = jax.vmap(lambda part: newton_schulz(part, **options))(parts)
        return jnp.moveaxis(done, 0, 1).reshape(rows, columns)

    if is_stacked(path):
        done = per_layer.map_layers(path, mesh, one, x.reshape(-1, rows, columns))
    else:
        done = one(per_layer.constrain(x.reshape(rows, columns), mesh, PartitionSpec()))
    return per_layer.as_parameter(path, done * math.sqrt(max(1.0, ratio)), x.shape, mesh)


def scale_by_newton_schulz(
    mesh: Mesh | None, split_heads: bool = False, **options
) -> optax.GradientTransformation:
    """`orthogonalize` for every parameter that the updates have, whole or for each head."""

    def one(path, u):
        return orthogonalize(path_name(path), u, mesh, u.shape[-2] if split_heads else 1, **options)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates))
