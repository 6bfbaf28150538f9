"""GPUs' links, and the time that a step takes with them, if nothing goes wrong."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from trainit.cluster.hardware import ACCELERATORS, Accelerator
from trainit.config import Config
from trainit.parallel.mesh import RunShape
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics

# Those whose links are known.
GPUS = {gpu.name: gpu for gpu in ACCELERATORS if gpu.node}


@dataclass(frozen=True)
class Times:
    """Seconds of a step, and what follows from them."""

    compute: float
    exposed: float  # of exchanges that are waited for: tensor's, the embedding's, data's behind micro-steps
    hidden: float  # of kernels' and gradients' exchanges, which can go on beside the products
    mfu: float  # if as much of these is hidden as fits beside the products

    @property
    def step(self) -> float:
        return self.exposed + max(self.compute, self.hidden)

    @property
    def unhidden(self) -> float:
        """If nothing at all were hidden."""
        return self.exposed + self.compute + self.hidden


def times(
    config: Config, shape: RunShape, exchanged: Iterable[Collective], gpu: Accelerator, efficiency: float
) -> Times:
    """The times of a step.

    Args:
        config: resolved.
        shape: of the run.
        exchanged: a step's collectives.
        gpu: of the table.
        efficiency: the part of the GPU's peak that all products and what is between them reach together.
    """
    sizes = shape.sizes
    flops = metrics.flops_per_token(config.model) * config.batch_size * config.model.context_length
    done = flops * (4 / 3 if config.model.remat == "block" else 1)
    devices = math.prod(sizes.values())
    compute = done / (devices * gpu.flops * efficiency)
    apart = shape.accumulates_locally(shape.batch_at(0).micro_steps)
    exposed = hidden = 0.0
    for one in exchanged:
        seconds = one.bytes / bandwidth(one.axes, sizes, gpu)
        if "tensor" in one.axes or one.kind == "all-to-all" or (apart and "data" in one.axes):
            exposed += seconds
        else:
            hidden += seconds
    step = exposed + max(compute, hidden)
    return Times(compute, exposed, hidden, flops / (step * devices * gpu.flops))


def bandwidth(axes: tuple[str, ...], sizes: Mapping[str, int], gpu: Accelerator) -> float:
    """Bytes a second that a device of a group sends, if all groups over these axes exchange at once.

    The ring of a group leaves a machine once, through the network cards of all of its members there.

    Args:
        axes: of the group.
        sizes: of the mesh, whose last axis varies fastest.
        gpu: of the table.
    """
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    group = grid[tuple(slice(None) if axis in axes else 0 for axis in sizes)].ravel()
    here = int((group < gpu.node).sum())
    return gpu.inside if here == len(group) else min(gpu.inside, here * gpu.across)
