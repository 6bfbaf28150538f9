"""A config's train step planned for a number of GPUs: by formula, and as it is compiled."""

import math
from dataclasses import dataclass

import jax
import numpy as np

from trainit.config import MESH_AXES, Config
from trainit.parallel import sharding
from trainit.tools.plan import formula, hlo, roofline
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics, step


@dataclass(frozen=True)
class Planned:
    """A step on one mesh."""

    gpu: str
    efficiency: float
    sizes: dict[str, int]
    parameters: int
    state: float  # bytes of parameters and optimizer state on a device
    temporaries: float  # bytes of all else, as compiled for the CPU; nan: not compiled
    planned: list[Collective]
    compiled: list[Collective] | None
    times: roofline.Times

    @property
    def error(self) -> float:
        """Of the plan's bytes against the compiled step's; nan: not compiled."""
        if self.compiled is None:
            return math.nan
        there, planned = (sum(one.bytes for one in some) for some in (self.compiled, self.planned))
        return planned / there - 1 if there else 0.0


def plan(config: Config, devices: int, gpu: roofline.Gpu, efficiency: float, compiled_too: bool) -> Planned:
    """Plans a step.

    Args:
        config: resolved.
        devices: of the job.
        gpu: their kind.
        efficiency: see `roofline.times`.
        compiled_too: whether the step is compiled for as many virtual devices, which JAX must have.
    """
    sizes = sharding.mesh_sizes(config, devices)
    compiled, temporaries = None, math.nan
    if compiled_too:
        mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
        built = step.build(config, mesh)
        program, text = hlo.compile_with_text(built.train.lower(built.abstract_state, _batch(config, mesh)))
        compiled = hlo.read(text, sizes)
        memory = program.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:  # its shapes, from any mesh
        alone = dict.fromkeys(MESH_AXES, 1)
        built = step.build(config, sharding.make_mesh(alone, jax.devices()[:1]))
    shapes = built.abstract_state
    planned = formula.predict(config, sizes, shapes.params)
    times = roofline.times(config, sizes, planned, gpu, efficiency)
    parameters = metrics.parameter_count(shapes.params)
    return Planned(
        gpu.kind, efficiency, sizes, parameters, _state(shapes, sizes), temporaries, planned, compiled, times
    )


def _batch(config: Config, mesh) -> dict:
    micro_steps, rows, length = sharding.batch_shape(config, mesh.shape)
    layout = sharding.batch_sharding(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((micro_steps, rows, *shape), dtype, sharding=layout)

    return {"tokens": array(np.uint16, length + 1), "lengths": array(np.int32)}


def _state(shapes: step.TrainState, sizes: dict[str, int]) -> float:
    """Bytes of a state on one device."""
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    layout = sharding.state_shardings(shapes, shapes.params, mesh)
    return sum(
        math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    )
