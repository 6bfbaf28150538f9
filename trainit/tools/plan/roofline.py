"""Estimates the time of a step from the speed of GPUs and of their links, if nothing goes wrong."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from trainit.cluster.hardware import ACCELERATORS, Accelerator
from trainit.config import Config
from trainit.parallel.mesh import RunShape
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics

# The accelerators whose links are known.
GPUS = {gpu.name: gpu for gpu in ACCELERATORS if gpu.node}


@dataclass(frozen=True)
class Times:
    """The seconds of a step, and what follows from them."""

    compute: float
    exposed: float  # exchanges that computation waits for: activations, and gradients at the end of the step
    hidden: float  # exchanges of kernels and gradients that can overlap with computation
    mfu: float  # if these overlap as far as computation lasts

    @property
    def step(self) -> float:
        return self.exposed + max(self.compute, self.hidden)

    @property
    def unhidden(self) -> float:
        """The seconds of the step if nothing overlaps."""
        return self.exposed + self.compute + self.hidden


def times(
    config: Config, shape: RunShape, exchanged: Iterable[Collective], gpu: Accelerator, efficiency: float
) -> Times:
    """Estimates the times of a step.

    Args:
        config: resolved.
        shape: the run's.
        exchanged: a step's collectives.
        gpu: the kind of GPU.
        efficiency: the part of the GPU's peak that computation reaches, between products included.
    """
    # Model FLOPs count for MFU; with full rematerialization the forward pass is computed twice.
    flops = metrics.flops_per_token(config.model) * config.batch_size * config.model.context_length
    computed = flops * (4 / 3 if config.model.remat == "block" else 1)
    devices = math.prod(shape.sizes.values())
    compute = computed / (devices * gpu.flops * efficiency)

    once = shape.accumulates_locally(shape.batch_at(0).micro_steps)
    exposed = hidden = 0.0
    for one in exchanged:
        seconds = one.bytes / bandwidth(one.axes, shape.sizes, gpu)
        # If gradients are summed over data once, at the end, no computation is left to hide it.
        if "tensor" in one.axes or one.kind == "all-to-all" or (once and "data" in one.axes):
            exposed += seconds
        else:
            hidden += seconds
    step = exposed + max(compute, hidden)
    return Times(compute, exposed, hidden, flops / (step * devices * gpu.flops))


def bandwidth(axes: tuple[str, ...], sizes: Mapping[str, int], gpu: Accelerator) -> float:
    """Returns the bytes a second that a device sends if all groups over these axes exchange at once.

    A group's ring leaves a machine once, through the network cards of all its members there.

    Args:
        axes: the mesh axes that a group spans.
        sizes: the mesh's; its last axis varies fastest.
        gpu: the kind of GPU.
    """
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    group = grid[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel()
    in_first_machine = int((group < gpu.node).sum())
    if in_first_machine == len(group):
        return gpu.inside
    return min(gpu.inside, in_first_machine * gpu.across)
