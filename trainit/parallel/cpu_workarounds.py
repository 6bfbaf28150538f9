"""Code that is written in an unusual way because of XLA's compiler for CPUs, and for no other reason.

None of it changes a result, and none is needed on GPUs. Each says what it is worth and when it may go.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from trainit.parallel.float8 import Factor, dot


def on_cpu(mesh: Mesh | None) -> bool:
    """Whether the devices of a mesh are CPUs; without a mesh, that is not known."""
    return mesh is not None and mesh.devices.flat[0].platform == "cpu"


def wide(dtype: DTypeLike, mesh: Mesh | None) -> DTypeLike:
    """The type of what is computed or put together on a CPU in a 16-bit type: float32; elsewhere, the type.

    XLA:CPU multiplies in bfloat16 two to four times as fast if the result is float32. And to write a layer's
    part of an array of all layers, it converts all: a seventh of a step. May go when neither is so.
    """
    return jnp.float32 if on_cpu(mesh) and jnp.dtype(dtype).itemsize == 2 else dtype


def product(
    a: Factor, b: Factor, axes: tuple, dtype: DTypeLike, mesh: Mesh | None, parts: int = 1
) -> jax.Array:
    """The product of two factors, summed over the given axes of each, rounded to this type.

    With several `parts`, b is a kernel with its inputs last in memory, as the decoder keeps it.
    """
    if _is_in_parts(a.values, axes[0], parts):
        return _product_of_parts(a.values, b.values, axes, wide(dtype, mesh), parts).astype(dtype)
    return dot(a, b, axes, wide(dtype, mesh)).astype(dtype)


def products(
    x_BLD: Factor, kernels: Sequence[Factor], dtype: DTypeLike, mesh: Mesh | None, parts: int
) -> list[jax.Array]:
    """The products (B, L, F, ...) of x with kernels (D, F, ...); those of few rows are made at once.

    Each costs 20 us, of a decoder's step of 30 ms. May go when it does not.
    """
    if len(kernels) == 1 or not _is_in_parts(x_BLD.values, (2,), parts):
        return [product(x_BLD, kernel, ((2,), (0,)), dtype, mesh, parts) for kernel in kernels]
    # XLA sees that these slices are one array, if they are put together along its first axis.
    joined = jnp.concatenate([jnp.moveaxis(kernel.values, 0, -1) for kernel in kernels])
    y = product(x_BLD, Factor(jnp.moveaxis(joined, -1, 0), None), ((2,), (0,)), dtype, mesh, parts)
    ends = itertools.accumulate(kernel.values.shape[1] for kernel in kernels[:-1])
    return jnp.split(y, list(ends), axis=2)


def _is_in_parts(x: jax.Array, axes: Sequence[int], parts: int) -> bool:
    return parts > 1 and math.prod(size for axis, size in enumerate(x.shape) if axis not in axes) <= 64


def _product_of_parts(x: jax.Array, kernel: jax.Array, axes: tuple, dtype: DTypeLike, n: int) -> jax.Array:
    """A product of at most n parts of a kernel, which XLA:CPU computes at once, as those of a batch.

    It would multiply a decoder's few rows on one core, where reading the kernel is what takes time: a quarter
    of a step. With the kernel as the first factor it takes a fifth less time. In 16 bits it is slow for less
    than 16 rows, to which zeros are added: two thirds. May go when none of it is so.
    """
    summed = len(axes[1])
    last, shape = range(-summed, 0), [size for axis, size in enumerate(kernel.shape) if axis not in axes[1]]
    x, kernel = jnp.moveaxis(x, axes[0], last), jnp.moveaxis(kernel, axes[1], last)
    x_RI = x.reshape(-1, math.prod(x.shape[-summed:]))
    (rows, inputs), outputs = x_RI.shape, math.prod(shape)
    if kernel.dtype.itemsize == 2:
        x_RI = jnp.pad(x_RI, ((0, max(0, 16 - rows)), (0, 0)))
    parts = next(count for count in range(n, 0, -1) if outputs % count == 0)
    x_pRI = jnp.broadcast_to(x_RI, (parts, *x_RI.shape))
    kernel_pOI = kernel.reshape(parts, outputs // parts, inputs)
    y_pOR = jax.lax.dot_general(kernel_pOI, x_pRI, (((2,), (2,)), ((0,), (0,))), preferred_element_type=dtype)
    return y_pOR.reshape(outputs, -1).T[:rows].reshape(*x.shape[:-summed], *shape)


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
    if not on_cpu(mesh):
        return x
    return x + sum(0 * other.ravel()[0] for other in jax.tree.leaves(others)).astype(x.dtype)


def computed_again(function: Callable, needed: jax.Array, mesh: Mesh | None, *args: Any) -> jax.Array:
    """The scalar function(*args) if it is needed, else NaN, computed apart from what else is made of `args`.

    A barrier keeps the two apart. XLA:CPU drops it, but not a branch, without which AdamW's step on GPT-2
    would take 6.2 GiB and not 4.0. On GPUs a branch makes the host wait. May go when CPUs keep barriers.
    """
    if on_cpu(mesh):
        return jax.lax.cond(needed, function, lambda *_: jnp.float32(jnp.nan), *args)
    return jnp.where(needed, function(*jax.lax.optimization_barrier(args)), jnp.nan)
