"""Factors of matrix products, scaled ones in float8 among them (Micikevicius et al., arXiv 2209.05433)."""

import math
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
    """An array in another type. In float8 it is scaled so that its largest number is near the type's largest.

    Inside shard_map, parts that are split over these mesh axes get the same scale; over others, each device
    has its own. Scales are powers of two, so that another one changes nothing except numbers below 2^-15
    of the largest (gradients: 2^-29), which float8 rounds coarsely. What is not finite stays so.
    """
    if dtype not in (FORWARD, BACKWARD):
        return Factor(x.astype(dtype), None)
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    # With a larger fraction than the type's largest number, the power is one less. It is bounded, so that it
    # stays finite for tiny numbers.
    fraction, exponent = jnp.frexp(largest)
    most, highest = math.frexp(float(jnp.finfo(dtype).max))
    power = jnp.minimum(highest - exponent - (fraction > most), 60)
    scale = jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), power), 1.0)
    return Factor((x.astype(jnp.float32) * scale).astype(dtype), scale)


def dot(a: Factor, b: Factor, axes: tuple[Sequence[int], Sequence[int]], dtype: DTypeLike) -> jax.Array:
    """The product of two factors, summed over the given axes of each; float8 is summed in float32."""
    if a.scale is None or b.scale is None:
        return jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=dtype)
    y = jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=jnp.float32)
    return (y / (a.scale * b.scale)).astype(dtype)
