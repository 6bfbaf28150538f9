"""Code that is written in an unusual way because of XLA's compiler for CPUs, and for no other reason.

None of it changes a result, and none is needed on GPUs. Each says what it is worth and when it may go.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from trainit.parallel.float8 import Factor, dot


def wide(dtype: DTypeLike, mesh: Mesh | None) -> DTypeLike:
    """The type of what is computed or put together on a CPU in a 16-bit type: float32; elsewhere, the type.

    XLA:CPU multiplies in bfloat16 two to four times as fast if the result is float32. And to write a layer's
    part of an array of all layers, it converts all: a seventh of a step. May go when neither is so.
    """
    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return jnp.float32 if on_cpu and jnp.dtype(dtype).itemsize == 2 else dtype


def product(a: Factor, b: Factor, axes: tuple, dtype: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """The product of two factors, summed over the given axes of each, rounded to this type."""
    return dot(a, b, axes, wide(dtype, mesh)).astype(dtype)


def sum_outer_products(x: Factor, dy_BLD: Factor) -> jax.Array:
    """A kernel's gradient x^T dy (F, ..., D), summed over positions, from x (B, L, F, ...); float32."""
    if x.values.dtype == jnp.float32:  # as (dy^T x)^T, since XLA:CPU transposes the first: a ninth of a step
        return jnp.moveaxis(dot(dy_BLD, x, ((0, 1), (0, 1)), jnp.float32), 0, -1)
    return dot(x, dy_BLD, ((0, 1), (0, 1)), jnp.float32)


def keep(x: Any, name: str, mesh: Mesh | None) -> Any:
    """Gives arrays the checkpoint name of what a loop over layers keeps, in the type in which it is kept."""
    return jax.tree.map(lambda y: checkpoint_name(y.astype(wide(y.dtype, mesh)), name).astype(y.dtype), x)


def computed_after(x: jax.Array, others: Any, mesh: Mesh | None) -> jax.Array:
    """Returns x unchanged, but makes XLA:CPU compute `others` before anything that uses x.

    XLA would compute bias gradients at a layer's end and keep their inputs: 5 % more memory. On CPUs it drops
    barriers, but not 0 * other, as 0 * NaN is NaN: the step does not count. May go when it keeps barriers.
    """
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return x
    return x + sum(0 * other.ravel()[0] for other in jax.tree.leaves(others)).astype(x.dtype)
