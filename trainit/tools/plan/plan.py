"""Plans a config's train step for a number of GPUs: by formula, and from the compiled step."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from trainit.cluster.hardware import Accelerator
from trainit.config import MESH_AXES, Config
from trainit.parallel.layout import batch_sharding, state_shardings
from trainit.parallel.mesh import RunShape, abstract_mesh, make_mesh, mesh_sizes, run_shape, shape_on
from trainit.parallel.trees import device_bytes
from trainit.tools.plan import formula, hlo, roofline
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics, step


@dataclass(frozen=True)
class Plan:
    """A train step on a number of GPUs."""

    config: Config
    gpu: Accelerator
    efficiency: float  # see `roofline.times`
    shape: RunShape
    parameters: int
    state: int  # bytes of parameters and optimizer state on a device
    temporaries: float  # bytes of everything else on a device, as compiled for the CPU; nan: not compiled
    predicted: list[Collective]
    compiled: list[Collective] | None  # None: not compiled
    times: roofline.Times

    @property
    def error(self) -> float:
        """How far the predicted bytes of all exchanges are from the compiled ones; nan: not compiled."""
        if self.compiled is None:
            return math.nan
        compiled, predicted = (sum(one.bytes for one in some) for some in (self.compiled, self.predicted))
        return predicted / compiled - 1 if compiled else 0.0


def plan(config: Config, devices: int, gpu: Accelerator, efficiency: float, compiles: bool) -> Plan:
    """Plans a step.

    Args:
        config: resolved.
        devices: the job's GPUs.
        gpu: their kind.
        efficiency: see `roofline.times`.
        compiles: whether the step is compiled for that many virtual devices, which JAX must have.
    """
    compiled, temporaries = None, math.nan
    if compiles:
        shape = run_shape(config, jax.devices()[:devices])
        built = step.build(config, shape)
        program, text = hlo.compile_with_text(built.train.lower(built.abstract_state, _batch(shape)))
        compiled = hlo.read(text, shape.sizes)
        memory: Any = program.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:  # the shapes of the state are the same on any mesh
        shape = shape_on(config, abstract_mesh(mesh_sizes(config, devices)))
        one_device = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
        built = step.build(config, shape_on(config, one_device))
    state = built.abstract_state

    # The state as it is split over the mesh, for which there need not be devices.
    layout = state_shardings(state, state.params, abstract_mesh(shape.sizes))
    split = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)

    predicted = formula.predict(config, shape, state.params)
    return Plan(
        config=config,
        gpu=gpu,
        efficiency=efficiency,
        shape=shape,
        parameters=metrics.parameter_count(state.params),
        state=device_bytes(split),
        temporaries=temporaries,
        predicted=predicted,
        compiled=compiled,
        times=roofline.times(config, shape, predicted, gpu, efficiency),
    )


def _batch(shape: RunShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the step's batch, with shardings."""
    micro_steps, rows, length = shape.batch_at(0)
    layout = batch_sharding(shape.mesh)
    return {
        "tokens": jax.ShapeDtypeStruct((micro_steps, rows, length + 1), np.uint16, sharding=layout),
        "lengths": jax.ShapeDtypeStruct((micro_steps, rows), np.int32, sharding=layout),
    }
