"""Which precision each part of a model computes in."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from trainit.config import require
from trainit.parallel.mesh import compute_type

PARTS = ("attention", "mlp", "head")


@dataclass(frozen=True)
class PartPrecision:
    """How a part of a model computes."""

    dtype: jnp.dtype  # of its activations
    float8: bool = False  # whether activations and kernels are multiplied in float8


def part_precisions(own_of: Mapping[str, str], default: str, device: jax.Device) -> dict[str, PartPrecision]:
    """The precision of each part, from its own ("": the model's, in which float8 parts have activations).

    Raises ConfigError if the device has no float8, and is no CPU, which emulates it.
    """
    in_float8 = [f"precision_of.{part}=float8" for part, own in own_of.items() if own == "float8"]
    has_it = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.9
    require(
        not in_float8 or has_it or device.platform == "cpu",
        f"{' and '.join(in_float8)}: it needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, "
        f"Hopper), not {device.device_kind}; leave it empty",
    )
    types = {part: jnp.dtype(compute_type(own, default)) for part, own in own_of.items()}
    return {part: PartPrecision(types[part], own == "float8") for part, own in own_of.items()}
