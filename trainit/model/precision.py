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


def part_precisions(
    precision_of: Mapping[str, str], precision: str, device: jax.Device
) -> dict[str, PartPrecision]:
    """The precision of each part that `precision_of` names.

    Args:
        precision_of: by part bfloat16, float16, float32, float8, or "" for `precision`.
        precision: the model's own. A part in float8 has its activations in it, too.
        device: that the model runs on.

    Raises:
        ConfigError: the device has no float8, and is no CPU, which emulates it.
    """
    in_float8 = [f"precision_of.{part}=float8" for part, own in precision_of.items() if own == "float8"]
    has_it = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.9
    require(
        not in_float8 or has_it or device.platform == "cpu",
        f"{' and '.join(in_float8)}: it needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, "
        f"Hopper), not {device.device_kind}; leave it empty",
    )
    return {
        part: PartPrecision(jnp.dtype(compute_type(own, precision)), own == "float8")
        for part, own in precision_of.items()
    }
