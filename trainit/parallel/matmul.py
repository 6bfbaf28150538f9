"""The blocks' matrix products on the mesh, with everything that devices exchange for them.

Where is a kernel gathered? Kernels are split over fsdp by the model's width (and over tensor, by heads or MLP
width: `layout.RULES`). `_gather_kernel` makes the width whole, in the compute type, right before the product
that needs it: once in the forward pass and once more in the backward pass, so that no device keeps a whole
kernel in between. (If layers are unrolled without rematerialization, XLA joins the two.) The head's kernel is
gathered in `model/cross_entropy.py`, once for all chunks; the embedding's table is not (`embedding.py`).

Between attention and MLP, the residual stream is split by length over tensor, so that norms, dropout and sums
are computed once (sequence parallelism: Korthikanti et al. 2022, arXiv 2205.05198). Each half of a block

1. gathers the length and multiplies with kernels whose outputs are split over tensor (`column_parallel`),
2. multiplies with a kernel whose inputs are split over tensor, sums the results of all devices, and splits
   the length again by reduce-scatter (`row_parallel`).

The backward pass does the same in the other direction. A kernel's gradient is computed, reduce-scattered over
fsdp and summed over data in float32. In names of arrays, b is a device's part of B, l of L.
"""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from trainit.parallel.collectives import MaybeArray, Parallel, gather, scatter_sum, sum_over
from trainit.parallel.cpu_workarounds import computed_after, keep, product, products, sum_outer_products
from trainit.parallel.float8 import BACKWARD, FORWARD, Factor, dot, factor

PRODUCT = "product"  # the checkpoint name of what remat may keep: results of matrix products, attention's too
Weights = tuple[jax.Array, MaybeArray]  # a kernel and its bias
Arrays = tuple[jax.Array, ...]


def column_parallel(parallel: Parallel, x_BLD: jax.Array, *weights: Weights, float8: bool = False) -> Arrays:
    """x @ kernel + bias for kernels (D, F, ...) whose F is split over tensor (Megatron-LM).

    x has its length split like the residual stream's; results (B, L, F, ...) have it whole. Weights are
    float32, as are their gradients, and are gathered in the type of x, or in float8 and multiplied in it.
    """
    return keep(_column_parallel(parallel, float8, x_BLD, weights), PRODUCT, parallel.mesh)


def row_parallel(
    parallel: Parallel, x: jax.Array, kernel: jax.Array, bias: MaybeArray, float8: bool = False
) -> jax.Array:
    """x (B, L, F, ...) @ kernel (F, ..., D) + bias, where F is split over tensor (Megatron-LM): (B, L, D).

    The result's length is split like the residual stream's. Remat keeps it if an exchange was needed for it,
    and otherwise computes it again: attention's output is the cheapest product for its size, and the MLP's is
    not needed in the backward pass.
    """
    y_BLD = _row_parallel(parallel, float8, x, kernel, bias)
    return keep(y_BLD, PRODUCT, parallel.mesh) if parallel.sequence_axes else y_BLD


def _gather_kernel(p: Parallel, kernel: jax.Array, dtype: DTypeLike, dimension: int) -> Factor:
    """A kernel with its width whole, from the part that this device has; it travels in the compute type."""
    part = factor(kernel, dtype, p.axes("embed"))
    return Factor(gather(part.values, p.axes("embed"), dimension), part.scale)


# How arguments and results are split; axes that are left out are whole. Heads are split like the MLP's width.
RESIDUAL, WIDE = ("batch", "residual_length"), ("batch", "length", "mlp")  # (B, L, D) and (B, L, F, ...)


def _column_specs(p: Parallel, weights: Sequence[Weights]) -> tuple:
    """Of x (B, L, D), and of kernels (D, F, ...) and biases (F, ...)."""
    return p.spec(*RESIDUAL), ((p.spec("embed", "mlp"), p.spec("mlp")),) * len(weights)


def _row_specs(p: Parallel, kernel: jax.Array) -> tuple:
    """Of x (B, L, F, ...), its kernel (F, ..., D) and bias (D,)."""
    return p.spec(*WIDE), p.spec("mlp", *[None] * (kernel.ndim - 2), "embed"), PartitionSpec()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _column_parallel(p: Parallel, float8: bool, x_BLD: jax.Array, weights: tuple[Weights, ...]) -> Arrays:
    def on_device(x_blD: jax.Array, weights: tuple[Weights, ...]) -> Arrays:
        # The length is gathered once for all kernels.
        dtype = FORWARD if float8 else x_blD.dtype
        x_bLD = factor(gather(x_blD, p.sequence_axes, 1), dtype)
        kernels = [_gather_kernel(p, kernel, dtype, 0) for kernel, _ in weights]
        ys = products(x_bLD, kernels, x_blD.dtype, p.mesh, p.kernel_parts)
        pairs = zip(ys, (bias for _, bias in weights), strict=True)
        return tuple(y if bias is None else y + bias.astype(y.dtype) for y, bias in pairs)

    return p.shard_map_if_needed(on_device, _column_specs(p, weights), p.spec(*WIDE))(x_BLD, weights)


def _column_backward(p: Parallel, float8: bool, saved: tuple, dys: tuple) -> tuple:
    def on_device(x_blD: jax.Array, weights: tuple[Weights, ...], dys: tuple) -> tuple:
        # The length of x was not kept whole: it is gathered again.
        dtype, backward = (FORWARD, BACKWARD) if float8 else (x_blD.dtype,) * 2
        x_bLD = factor(gather(x_blD, p.sequence_axes, 1), dtype)

        def to_inputs(kernel: jax.Array, dy: Factor) -> jax.Array:
            axes = tuple(range(2, dy.values.ndim)), tuple(range(1, kernel.ndim))
            return product(dy, _gather_kernel(p, kernel, dtype, 0), axes, x_blD.dtype, p.mesh)

        def to_weights(bias: MaybeArray, dy: jax.Array, dy_factor: Factor) -> Weights:
            d_kernel = dot(x_bLD, dy_factor, ((0, 1), (0, 1)), jnp.float32)
            d_bias = None if bias is None else jnp.sum(dy, (0, 1), dtype=jnp.float32)
            return p.sum_gradient(d_kernel, 0), sum_over(d_bias, p.axes("batch", "length"))

        # The gradient by x adds up over the kernels, and over tensor, which splits their outputs.
        factors = tuple(factor(dy, backward) for dy in dys)
        dx_bLD = sum(to_inputs(kernel, dy) for (kernel, _), dy in zip(weights, factors, strict=True))
        d_weights = tuple(to_weights(pair[1], *dy) for pair, *dy in zip(weights, dys, factors, strict=True))
        dx_bLD = computed_after(cast(jax.Array, dx_bLD), d_weights, p.mesh)
        return scatter_sum(dx_bLD, p.sequence_axes, 1), d_weights

    x_BLD, weights = saved
    specs = _column_specs(p, weights)
    return p.shard_map_if_needed(on_device, (*specs, p.spec(*WIDE)), specs)(x_BLD, weights, dys)


# The forward passes are the plain functions, which JAX can also differentiate forwards, as Hessian-vector
# products need.
_column_parallel.defvjp(
    lambda p, float8, *args: (_column_parallel.fun(p, float8, *args), args), _column_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row_parallel(p: Parallel, float8: bool, x: jax.Array, kernel: jax.Array, bias: MaybeArray) -> jax.Array:
    def on_device(x: jax.Array, kernel: jax.Array, bias: MaybeArray) -> jax.Array:
        dtype, inputs = FORWARD if float8 else x.dtype, kernel.ndim - 1
        x_factor = factor(x, dtype)
        axes = tuple(range(2, x.ndim)), tuple(range(inputs))
        # Each device has a part of the sum over F; the reduce-scatter adds them and splits the length.
        y_bLD = product(
            x_factor, _gather_kernel(p, kernel, dtype, inputs), axes, x.dtype, p.mesh, p.kernel_parts
        )
        y_blD = scatter_sum(y_bLD, p.sequence_axes, 1)
        return y_blD if bias is None else y_blD + bias.astype(y_blD.dtype)

    return p.shard_map_if_needed(on_device, _row_specs(p, kernel), p.spec(*RESIDUAL))(x, kernel, bias)


def _row_backward(p: Parallel, float8: bool, saved: tuple, dy_BLD: jax.Array) -> tuple:
    def on_device(x: jax.Array, kernel: jax.Array, bias: MaybeArray, dy_blD: jax.Array) -> tuple:
        dtype, backward = (FORWARD, BACKWARD) if float8 else (x.dtype,) * 2
        d_bias = None if bias is None else jnp.sum(dy_blD, (0, 1), dtype=jnp.float32)
        dy_bLD = factor(gather(dy_blD, p.sequence_axes, 1), backward)

        # By x, which needs the kernel; then by the kernel, which needs x.
        last = kernel.ndim - 1
        dx = product(dy_bLD, _gather_kernel(p, kernel, dtype, last), ((2,), (last,)), x.dtype, p.mesh)
        x_factor = factor(x, dtype)
        d_kernel = p.sum_gradient(sum_outer_products(x_factor, dy_bLD), last)
        d_bias = sum_over(d_bias, p.axes("batch", "residual_length"))
        return computed_after(dx, (d_kernel, d_bias), p.mesh), d_kernel, d_bias

    specs = _row_specs(p, saved[1])
    return p.shard_map_if_needed(on_device, (*specs, p.spec(*RESIDUAL)), specs)(*saved, dy_BLD)


_row_parallel.defvjp(lambda p, float8, *args: (_row_parallel.fun(p, float8, *args), args), _row_backward)
