"""A config's train step planned for a number of GPUs: by formula, and as it is compiled."""

import math
from dataclasses import dataclass

import jax
import numpy as np

from trainit.cluster.hardware import Accelerator
from trainit.config import MESH_AXES, Config
from trainit.parallel.layout import batch_sharding, state_shardings
from trainit.parallel.mesh import RunShape, abstract_mesh, make_mesh, mesh_sizes, run_shape, shape_on
from trainit.tools.plan import formula, hlo, roofline
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics, step
from trainit.train.state import TrainState


@dataclass(frozen=True)
class Planned:
    """A step on one mesh."""

    gpu: str
    efficiency: float
    shape: RunShape
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


def plan(config: Config, devices: int, gpu: Accelerator, efficiency: float, compiled_too: bool) -> Planned:
    """Plans a step.

    Args:
        config: resolved.
        devices: of the job.
        gpu: their kind.
        efficiency: see `roofline.times`.
        compiled_too: whether the step is compiled for as many virtual devices, which JAX must have.
    """
    compiled, temporaries = None, math.nan
    if compiled_too:
        shape = run_shape(config, jax.devices()[:devices])
        built = step.build(config, shape)
        program, text = hlo.compile_with_text(built.train.lower(built.abstract_state, _batch(shape)))
        compiled = hlo.read(text, shape.sizes)
        memory = program.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:  # its shapes, from any mesh
        shape = shape_on(config, abstract_mesh(mesh_sizes(config, devices)))
        one = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
        built = step.build(config, shape_on(config, one))
    shapes = built.abstract_state
    planned = formula.predict(config, shape, shapes.params)
    times = roofline.times(config, shape, planned, gpu, efficiency)
    parameters = metrics.parameter_count(shapes.params)
    return Planned(
        gpu.kind,
        efficiency,
        shape,
        parameters,
        _state(shapes, shape.sizes),
        temporaries,
        planned,
        compiled,
        times,
    )


def _batch(shape: RunShape) -> dict:
    micro_steps, rows, length = shape.batch_at(0)
    layout = batch_sharding(shape.mesh)

    def array(dtype, *rest):
        return jax.ShapeDtypeStruct((micro_steps, rows, *rest), dtype, sharding=layout)

    return {"tokens": array(np.uint16, length + 1), "lengths": array(np.int32)}


def _state(shapes: TrainState, sizes: dict[str, int]) -> float:
    """Bytes of a state on one device."""
    layout = state_shardings(shapes, shapes.params, abstract_mesh(sizes))
    return sum(
        math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    )
