"""Estimates the time of a step from the speed of GPUs and of their links, if nothing goes wrong."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from trainit.cluster.hardware import Accelerator
from trainit.config import Config
from trainit.experiments.plan.hlo import Collective
from trainit.parallel.mesh import RunShape
from trainit.train.reports import metrics


class Times(NamedTuple):
    """The seconds of a step, and what follows from them."""

    compute: float
    exposed: float  # exchanges that computation waits for: activations, and gradients at the end of the step
    hidden: float  # exchanges of kernels and gradients that can overlap with computation
    at_peak: float  # the model's FLOPs at the peak of all GPUs; MFU is its share of the step

    @property
    def step(self) -> float:
        """The seconds of the step if exchanges overlap as far as computation lasts."""
        return self.exposed + max(self.compute, self.hidden)

    @property
    def unhidden(self) -> float:
        """The seconds of the step if nothing overlaps."""
        return self.exposed + self.compute + self.hidden

    @property
    def mfu(self) -> float:
        return self.at_peak / self.step

    @property
    def mfu_unhidden(self) -> float:
        return self.at_peak / self.unhidden


def times(
    config: Config, shape: RunShape, exchanged: Iterable[Collective], gpu: Accelerator, efficiency: float
) -> Times:
    """Estimates the times of a step.

    Computation, between products included, reaches `efficiency` of the GPU's peak.
    """
    # Model FLOPs count for MFU; with full rematerialization the forward pass is computed twice.
    flops = metrics.flops_per_token(config.model) * config.batch_size * config.model.context_length
    at_peak = flops / (math.prod(shape.sizes.values()) * gpu.flops)
    compute = at_peak * (4 / 3 if config.model.remat == "block" else 1) / efficiency

    once = shape.accumulates_locally(shape.batch_at(0).micro_steps)
    exposed = hidden = 0.0
    for one in exchanged:
        seconds = one.bytes / bandwidth(one.axes, shape.sizes, gpu)
        # If gradients are summed over data once, at the end, no computation is left to hide it.
        whole_keys = one.axes == ("context",) and one.kind in ("all-gather", "reduce-scatter")
        if "tensor" in one.axes or one.kind == "all-to-all" or whole_keys or (once and "data" in one.axes):
            exposed += seconds
        else:
            hidden += seconds
    return Times(compute, exposed, hidden, at_peak)


def bandwidth(axes: tuple[str, ...], sizes: Mapping[str, int], gpu: Accelerator) -> float:
    """Returns the bytes a second that a device sends if all groups over these axes exchange at once.

    Devices are numbered along the mesh, whose last axis varies fastest.
    """
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return ring_bandwidth(grid[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel(), gpu)


def ring_bandwidth(group: np.ndarray, gpu: Accelerator) -> float:
    """Returns the bytes a second that a device of this group sends around its ring.

    The ring leaves a machine once, through the network cards of all members that are there.
    """
    in_first_machine = int((group // gpu.node == group[0] // gpu.node).sum())
    return gpu.inside if in_first_machine == len(group) else min(gpu.inside, in_first_machine * gpu.across)
