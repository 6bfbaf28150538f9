"""Plans a config's train step for a number of GPUs: by formula, and from the compiled step."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from trainit.cluster.hardware import Accelerator
from trainit.config import MESH_AXES, Config
from trainit.data.training_data import abstract_batch
from trainit.parallel.layout import batch_sharding, state_shardings
from trainit.parallel.mesh import RunShape, abstract_mesh, make_mesh, mesh_sizes, run_shape, shape_on
from trainit.parallel.trees import device_bytes
from trainit.tools.plan import formula, hlo, roofline
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics, step
from trainit.train.automatic import choice


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
    computing: str  # what was chosen for the GPUs, and why


def plan(config: Config, devices: int, gpu: Accelerator, efficiency: float, compiles: bool) -> Plan:
    """Plans a step of a resolved config on this many GPUs.

    If it is to be compiled, JAX must have that many virtual devices.
    """
    compiled, temporaries = None, math.nan
    config, computing = _settle(config, devices, gpu)
    if compiles:
        shape = run_shape(config, jax.devices()[:devices])
        built = step.build(config, shape)
        batch = abstract_batch(np.dtype(np.uint16), shape.batch_at(0), batch_sharding(shape.mesh))
        program, text = hlo.compile_with_text(built.train.lower(built.abstract_state, batch))
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
    times = roofline.times(config, shape, predicted, gpu, efficiency)
    parameters, state_bytes = metrics.parameter_count(state.params), device_bytes(split)
    return Plan(
        config,
        gpu,
        efficiency,
        shape,
        parameters,
        state_bytes,
        temporaries,
        predicted,
        compiled,
        times,
        computing,
    )


def _settle(config: Config, devices: int, gpu: Accelerator) -> tuple[Config, str]:
    """The config as a run on these GPUs has it. JAX takes this part of their memory: `xla_flags.SETTINGS`."""
    part = 0.9 if devices <= gpu.node else 0.85
    return choice.settle(config, mesh_sizes(config, devices), "cuda", part * gpu.memory)
