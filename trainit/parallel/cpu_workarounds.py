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

    XLA:CPU multiplies in bfloat16 two to six times as fast if the result is float32 (`trainit benchmark
    --only=products`). And to write a layer's part of an array of all layers, it converts the whole array to
    float32 and back: a seventh of the time of a step with six. May go when neither is so.
    """
    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return jnp.float32 if on_cpu and jnp.dtype(dtype).itemsize == 2 else dtype


def product(a: Factor, b: Factor, axes: tuple, dtype: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """The product of two factors, summed over the given axes of each, rounded to this type."""
    return dot(a, b, axes, wide(dtype, mesh)).astype(dtype)


def keep(x: Any, name: str, mesh: Mesh | None) -> Any:
    """Gives arrays the checkpoint name of what a loop over layers keeps, in the type in which it is kept."""
    return jax.tree.map(lambda y: checkpoint_name(y.astype(wide(y.dtype, mesh)), name).astype(y.dtype), x)


def computed_after(x: jax.Array, others: Any, mesh: Mesh | None) -> jax.Array:
    """Returns x unchanged, but makes XLA:CPU compute `others` before anything that uses x.

    XLA would otherwise compute e.g. bias gradients at the end of a layer and keep their inputs alive: GPT-2's
    step takes 5 % more memory. XLA:CPU drops optimization barriers, hence `x + 0 * other`, which it may not
    drop, as 0 * NaN is NaN. (Then the gradient is not finite, and the step does not count anyway.) May go
    when XLA:CPU keeps `jax.lax.optimization_barrier`. A no-op elsewhere, and without a mesh.
    """
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return x
    return x + sum(0 * other.ravel()[0] for other in jax.tree.leaves(others)).astype(x.dtype)
