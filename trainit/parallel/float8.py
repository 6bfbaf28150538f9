"""Factors of matrix products, scaled ones in float8 among them (Micikevicius et al., arXiv 2209.05433)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2  # for activations and kernels; for gradients


class Factor(NamedTuple):
    """An array as it is multiplied: values / scale."""

    values: jax.Array
    scale: jax.Array | None  # a float32 scalar; None: 1


def factor(x: jax.Array, dtype: DTypeLike, axes: tuple[str, ...] = ()) -> Factor:
    """An array in another type. In float8 it is scaled so that its largest number is the type's largest.

    Inside shard_map, all parts of an array that is split over mesh axes get the same scale. Infinities and
    NaN become NaN in float8.
    """
    if dtype not in (FORWARD, BACKWARD):
        return Factor(x.astype(dtype), None)
    # The scale is bounded, so that it stays finite for tiny numbers, and 1 for zeros.
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    scale = jnp.where(largest > 0, jnp.minimum(float(jnp.finfo(dtype).max) / largest, 2.0**60), 1.0)
    return Factor((x.astype(jnp.float32) * scale).astype(dtype), scale)


def dot(a: Factor, b: Factor, axes: tuple[Sequence[int], Sequence[int]], dtype: DTypeLike) -> jax.Array:
    """The product of two factors, summed over the given axes of each; float8 is summed in float32."""
    if a.scale is None or b.scale is None:
        return jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=dtype)
    y = jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=jnp.float32)
    return (y / (a.scale * b.scale)).astype(dtype)
