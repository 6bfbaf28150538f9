"""Plans a config's train step for a number of GPUs: by formula, and from the compiled step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from trainit.config import MESH_AXES, Config
from trainit.experiments.plan import formula, gpu, hlo, roofline
from trainit.experiments.plan.gpu import Program
from trainit.experiments.plan.hlo import Collective
from trainit.experiments.plan.schedule import Schedule
from trainit.experiments.plan.targets import TARGETS
from trainit.parallel.layout import state_shardings
from trainit.parallel.mesh import RunShape, abstract_mesh, make_mesh, mesh_sizes, shape_on
from trainit.parallel.trees import device_bytes
from trainit.train import step
from trainit.train.automatic import choice
from trainit.train.reports import metrics


@dataclass(frozen=True)
class Plan:
    """A train step on a number of GPUs."""

    config: Config
    gpu: str  # one of TARGETS
    efficiency: float  # see `roofline.times`
    shape: RunShape
    parameters: int
    state: int  # bytes of parameters and optimizer state on a device
    temporaries: float  # bytes of everything else on a device, as compiled; nan: not compiled
    predicted: list[Collective]
    compiled: list[Collective] | None  # None: not compiled
    times: roofline.Times
    computing: str  # what was chosen for the GPUs, and why
    program: Program | None  # as compiled for the GPUs; None: for the CPU, or not at all
    schedule: Schedule | None  # of the program

    @property
    def seconds(self) -> tuple[float, float]:
        """Those of a step with exchanges during computation, and after it."""
        if self.schedule is None:
            return self.times.step, self.times.unhidden
        return self.schedule.seconds, self.schedule.total.seconds + sum(self.schedule.busy.values())

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization of both."""
        return self.times.at_peak / self.seconds[0], self.times.at_peak / self.seconds[1]


def plan(
    config: Config, devices: int, name: str, efficiency: float, compiles: str, environment: Mapping[str, str]
) -> Plan:
    """Plans a step of a resolved config on this many GPUs of TARGETS.

    It is compiled for the "GPU", with the user's environment; for the "CPU", of which JAX must have as many
    virtual devices; or not at all. Errors as of `gpu.compile_for`.
    """
    compiled, temporaries, program, schedule = None, math.nan, None, None
    config, computing = settle(config, devices, name)
    if compiles == "CPU":
        shape, built, on_cpu, text = hlo.compile_step(config, jax.devices()[:devices])
        compiled = hlo.read(text, shape.sizes)
        memory: Any = on_cpu.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    else:  # the shapes of the state are the same on any mesh, and with any attention kernel
        kernel = config.model.attention
        model = {**config.model.to_dict(), "attention": "auto" if kernel == "cudnn" else kernel}
        anywhere = Config({**config.to_dict(), "model": model})
        shape = shape_on(anywhere, abstract_mesh(mesh_sizes(config, devices)))
        one_device = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
        built = step.build(anywhere, shape_on(anywhere, one_device))
    state = built.abstract_state

    # The state as it is split over the mesh, for which there need not be devices.
    layout = state_shardings(state, state.params, abstract_mesh(shape.sizes))
    split = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    parameters, state_bytes = metrics.parameter_count(state.params), device_bytes(split)

    if compiles == "GPU":
        program = gpu.compile_for(config, devices, name, environment)
        compiled = hlo.read(program.partitioned, shape.sizes)
        schedule = Schedule(program.scheduled, shape.sizes, TARGETS[name])
        temporaries = program.assigned - state_bytes
    predicted = formula.predict(config, shape, state.params)
    times = roofline.times(config, shape, predicted, TARGETS[name].accelerator, efficiency)
    return Plan(
        config,
        name,
        efficiency,
        shape,
        parameters,
        state_bytes,
        temporaries,
        predicted,
        compiled,
        times,
        computing,
        program,
        schedule,
    )


def settle(config: Config, devices: int, name: str) -> tuple[Config, str]:
    """The config as a run on these GPUs has it, and what was chosen."""
    return choice.settle(config, mesh_sizes(config, devices), "cuda", TARGETS[name].part(devices))
