"""Factors of matrix products, in types that each part of a model may have for itself; float8 among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2  # Micikevicius et al. 2022, arXiv 2209.05433


@dataclass(frozen=True)
class Part:
    """How a part of a model computes."""

    dtype: jnp.dtype  # of its activations
    float8: bool = False  # whether these and its kernels are multiplied in float8


def parts(precision_of: Mapping[str, str], precision: str, device: jax.Device) -> dict[str, Part]:
    """How each part computes.

    Args:
        precision_of: bfloat16, float16, float32, float8, or "" for `precision`.
        precision: the model's, which is also of a float8 part's activations.
        device: that it is to run on.

    Raises:
        ValueError: the device has no float8, and does not emulate it as CPUs do.
    """
    asking = [f"precision_of.{name}=float8" for name, own in precision_of.items() if own == "float8"]
    has_it = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.9
    if asking and not has_it and device.platform != "cpu":
        raise ValueError(
            f"{' and '.join(asking)}: it needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, "
            f"Hopper), not {device.device_kind}; leave it empty"
        )
    return {
        name: Part(jnp.dtype(precision if own in ("", "float8") else own), own == "float8")
        for name, own in precision_of.items()
    }


class Factor(NamedTuple):
    """An array as it is multiplied."""

    values: jax.Array  # times the scale
    scale: jax.Array | None  # None: 1


def factor(x: jax.Array, dtype, axes: tuple[str, ...] = ()) -> Factor:
    """An array in another type; in float8 scaled so that its largest number is the type's.

    Args:
        x: within shard_map a device's part. What is not finite gives NaN.
        dtype: of its values.
        axes: of the mesh, over which the array is split.
    """
    if dtype not in (FORWARD, BACKWARD):
        return Factor(x.astype(dtype), None)
    most = jnp.max(jnp.abs(x)).astype(jnp.float32)
    most = jax.lax.pmax(most, axes) if axes else most
    scale = jnp.where(most > 0, jnp.minimum(float(jnp.finfo(dtype).max) / most, 2.0**60), 1.0)
    return Factor((x.astype(jnp.float32) * scale).astype(dtype), scale)


def dot(a: Factor, b: Factor, axes: tuple[Sequence[int], Sequence[int]], dtype) -> jax.Array:
    """Sums over axes of both; of float8 in float32, and `dtype` afterwards."""
    if a.scale is None:
        return jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=dtype)
    y = jax.lax.dot_general(a.values, b.values, (axes, ((), ())), preferred_element_type=jnp.float32)
    return (y / (a.scale * b.scale)).astype(dtype)
