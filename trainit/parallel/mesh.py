"""The mesh of devices, and `RunShape`: everything about a run that follows from its config and its devices.

The mesh has four axes. `data` holds replicas of the model; `fsdp` splits parameters and optimizer state;
`tensor` splits heads, MLP width and vocabulary; `context` splits sequences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from trainit.config import MESH_AXES, BatchSizes, Config, batch_sizes, check_mesh, require

MULTIPLE = 128  # positions of a chunk of logits
GATHERED = 16384  # most tokens of a sequence whose keys and values all devices along context have at once
MASK_MIB = 256  # most of a mask of documents for a device, with which cuDNN attention reads 2 bytes a pair


class BatchShape(NamedTuple):
    """The shape of a global batch: its tokens are an array (micro_steps, rows, length + 1)."""

    micro_steps: int  # G: gradients of that many parts of the batch are added up in one optimizer step
    rows: int  # sequences of one micro-step, counted over the whole job
    length: int  # tokens of a sequence that the model reads


@dataclass(frozen=True)
class RunShape:
    """How a run is laid out on its devices. `run_shape` makes it, once, when the devices are known."""

    mesh: Mesh | AbstractMesh  # with axes `config.MESH_AXES`; abstract where a step is only planned
    batch_sizes: BatchSizes  # sequences of each optimizer step
    device_batch_size: int  # most sequences that a device takes in one micro-step; 0: no bound
    attention: str  # the attention kernel: "plain", "blockwise", "cudnn"; over context "gather" or "ring"
    logits_chunk: int  # positions whose logits a device has in memory at once, for the first batch size
    sums_once: bool  # whether gradients may be summed over data once a step: see `accumulates_locally`

    @property
    def device_mesh(self) -> Mesh:
        """The mesh of a run that is more than planned."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices along each mesh axis."""
        return dict(self.mesh.shape)

    @property
    def shares(self) -> int:
        """Into how many parts a batch's rows are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def batch_at(self, step: int) -> BatchShape:
        """The shape of the batch of the optimizer step that follows `step` others."""
        return self.batch_of(self.batch_sizes.at(step))

    def batch_of(self, batch_size: int) -> BatchShape:
        """The shape of a batch of this many sequences, with the fewest micro-steps that fit the devices."""
        count = _micro_steps(batch_size // self.shares, self.device_batch_size)
        return BatchShape(count, batch_size // count, self.batch_sizes.context_length)

    def accumulates_locally(self, micro_steps: int) -> bool:
        """Whether each replica adds up its own gradients over the micro-steps, to be summed over data once.

        Not where each micro-step's own is asked for, nor with float8.
        """
        return self.sums_once and micro_steps > 1


def run_shape(config: Config, devices: Sequence[jax.Device], shrink_to_fit: bool = False) -> RunShape:
    """The shape of a run on all of the job's devices; errors as of `mesh_sizes`."""
    return shape_on(config, make_mesh(mesh_sizes(config, len(devices), shrink_to_fit), devices))


def shape_on(config: Config, mesh: Mesh | AbstractMesh) -> RunShape:
    """The shape of a run on a mesh, whatever `config.mesh` says. An abstract one has this machine's devices.

    Raises ConfigError if they lack the attention kernel that is asked for.
    """
    assert "auto" not in (config.logits_mib, config.model.remat, config.model.scan_layers)  # train/automatic
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    # cuDNN's attention kernel needs bfloat16 units, which came with compute capability 8 (Ampere); for the
    # gradient with a mask, 9 (Hopper).
    capability = float(device.compute_capability) if "NVIDIA" in device.device_kind else 0
    precision = compute_type(config.precision_of["attention"], config.precision)
    context, platform = mesh.shape["context"], "cuda" if capability >= 8 else device.platform
    share = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = share // _micro_steps(share, config.device_batch_size)
    masked = rows if capability >= 9 else 0
    attention = choose_attention(config.model, platform, precision, context, masked)

    # Chunks of logits for the first batch size; others have their own if they have other micro-steps.
    positions = rows * config.model.context_length // context
    chunk = chunk_size(positions, config.model.vocab_size // mesh.shape["tensor"], config.logits_mib)
    float8 = "float8" in config.precision_of.values()
    sums_once = mesh.shape["data"] > 1 and not wants_squares(config) and not float8
    return RunShape(mesh, batch_sizes(config), config.device_batch_size, attention, chunk, sums_once)


def _micro_steps(share: int, bound: int) -> int:
    """The fewest equal parts of `share` sequences of which none has more than `bound`; 0: no bound."""
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= (bound or share))


def wants_squares(config: Config) -> bool:
    """Whether the squares of the micro-steps' gradients are asked for, to measure the noise scale."""
    return config.diagnostics.every_steps > 0 and config.diagnostics.noise_scale


def compute_type(own: str, precision: str) -> str:
    """The type of a part's activations, from the part's own precision and the model's."""
    return precision if own in ("", "float8") else own


def choose_attention(
    config: Config, platform: str, precision: str, context: int = 1, masked_rows: int = 0
) -> str:
    """The kernel that `model.attention` stands for, with activations of this precision.

    Where sequences are split over `context` devices, it is a way to exchange keys and values. To gather them
    takes one exchange and memory for those of the whole sequence; a ring takes no such memory.

    The platform is "cuda" only for NVIDIA's GPUs with bfloat16 units. A micro-step has `masked_rows` on a
    device; 0: its cuDNN takes no masks. Raises ConfigError where cudnn is asked for and cannot run.
    """
    size, mask_mib = config.head_dim, masked_rows * config.context_length**2 / 2**19
    fits = precision == "bfloat16" and size % 8 == 0 and size <= 128  # larger ones not on every card
    plain = not config.attn_dropout and not config.attention_softcap
    plain = plain and (not config.document_mask or (0 < mask_mib <= MASK_MIB and not config.window))
    possible = platform == "cuda" and fits and plain
    require(
        config.attention != "cudnn" or possible,
        f"model.attention=cudnn needs an NVIDIA GPU, precision=bfloat16, a head size that 8 divides up to "
        f"128, no attention_softcap, with documents Hopper or newer, no window and {MASK_MIB} MiB of mask at "
        f"most; here are platform={platform}, precision={precision}, head size {size}, attention_softcap="
        f"{config.attention_softcap:g}, document_mask={config.document_mask}, {mask_mib:g} MiB, window="
        f"{config.window}; take model.attention=auto",
    )
    if context > 1:
        automatic = "gather" if config.context_length <= GATHERED else "ring"
        return config.attention if config.attention in ("gather", "ring") else automatic
    automatic = "cudnn" if possible and config.attention == "auto" else "blockwise"
    return config.attention if config.attention in ("plain", "cudnn") else automatic


def chunk_size(positions: int, vocab_size: int, logits_mib: float) -> int:
    """How many of a device's positions to take at once, a multiple of 128, which matrix units like.

    Their float32 logits, for a device's part of the vocabulary, are `logits_mib` at most (0: no bound), or
    those of 128 positions. All chunks are about equally large, so that little of the last is padding.
    """
    maximum = max(1, int(logits_mib * 2**20 / (4 * vocab_size * MULTIPLE))) * MULTIPLE
    if not logits_mib or positions <= maximum:
        return positions
    count = -(-positions // maximum)
    return MULTIPLE * -(-positions // (MULTIPLE * count))


def mesh_sizes(config: Config, devices: int, shrink_to_fit: bool = False) -> dict[str, int]:
    """The number of devices along each mesh axis, with -1 filled in, and with `--debug` shrunk to fit.

    Raises ConfigError if they do not cover the devices, or if a size does not divide what it splits.
    """
    sizes = {axis: config.mesh[axis] for axis in MESH_AXES}
    given = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    # One axis takes the devices that the others leave: the one set to -1, or data if the mesh may shrink.
    free = next((axis for axis, size in sizes.items() if size == -1), "data" if shrink_to_fit else None)
    if free:
        left = devices
        for axis in [axis for axis in reversed(MESH_AXES) if axis != free]:
            if shrink_to_fit and left % sizes[axis]:
                sizes[axis] = 1
            left //= sizes[axis]
        sizes[free] = max(left, 1)
    require(
        math.prod(sizes.values()) == devices,
        f"mesh=({given}) covers {math.prod(sizes.values())} devices, but there are {devices}; let the sizes "
        f"multiply to that, or set one to -1",
    )
    check_mesh(sizes, config)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all of the job's) in their own order, process after process."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices).reshape([sizes[axis] for axis in MESH_AXES]), MESH_AXES)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices, to plan for more of them than there are."""
    return AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES)


def describe_devices(mesh: Mesh, process: int) -> str:
    """How many devices a process has, and where they are in the mesh: "8 devices, data 2, fsdp 0-7, ..."."""
    own = [index for index, device in np.ndenumerate(mesh.devices) if device.process_index == process]
    ranges = [(axis, min(i), max(i)) for axis, i in zip(mesh.axis_names, zip(*own, strict=True), strict=True)]
    texts = (f"{axis} {first}" + f"-{last}" * (first < last) for axis, first, last in ranges)
    return f"{len(own)} devices, {', '.join(texts)}"
