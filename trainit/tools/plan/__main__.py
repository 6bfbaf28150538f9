"""What a config's train step costs on so many GPUs: memory, what devices exchange, time, MFU.

    python -m trainit.tools.plan --config=configs/pile_gpt.py:model=llama2_7b --devices=8,64

The real step is compiled for as many virtual devices, and what they exchange in it is compared with the
formula, which serves alone where there are more than --compile_up_to.
"""

import math
import os
from dataclasses import dataclass

import jax
import numpy as np
from absl import flags

from trainit import cli
from trainit import config as config_lib
from trainit.cluster import distributed
from trainit.config import MESH_AXES, Config, ConfigError
from trainit.data.dataset import DatasetError
from trainit.parallel import sharding
from trainit.tools.plan import formula as traffic
from trainit.tools.plan import hlo, roofline
from trainit.tools.plan.hlo import Collective
from trainit.train import metrics, step
from trainit.train.trackers import quantity

_DEVICES = flags.DEFINE_list("devices", ["8"], "GPUs of the job, or several numbers of them")
_ROWS = flags.DEFINE_integer(
    "rows", 0, "sequences of a step on each part of data × fsdp, instead of batch_size", lower_bound=0
)
_GPU = flags.DEFINE_enum("gpu", "H100", list(roofline.GPUS), "kind of GPU, whose bandwidths are known")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.6, "part of the peak that computation reaches", 0.01, 1)
_MOST = flags.DEFINE_integer("compile_up_to", 512, "virtual devices for which the step is compiled at most")

SMALL = 1024  # bytes: what is exchanged in such pieces needs no plan
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Planned:
    """A step on one mesh."""

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


def plan(config: Config, devices: int) -> Planned:
    """Plans a step; compiles it where there are not too many devices."""
    sizes = sharding.mesh_sizes(config, devices)
    compiled, temporaries = None, math.nan
    if devices <= _MOST.value:
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
    planned = traffic.predict(config, sizes, shapes.params)
    times = roofline.times(config, sizes, planned, roofline.GPUS[_GPU.value], _EFFICIENCY.value)
    parameters = metrics.parameter_count(shapes.params)
    return Planned(sizes, parameters, _state(shapes, sizes), temporaries, planned, compiled, times)


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


def tell(p: Planned, config: Config):
    """Prints a plan, a line for each topic."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in p.sizes.items() if size > 1) or "one device"
    micro_steps, rows, length = sharding.batch_shape(config, p.sizes)
    share = rows // (p.sizes["data"] * p.sizes["fsdp"])
    print(
        f"mesh       {mesh}; {micro_steps} × {share} sequences of {length} on a part of data × fsdp, "
        f"{quantity(p.parameters)} parameters, remat {config.model.remat}"
    )
    text = f"memory     {p.state / GIB:.2f} GiB of parameters and optimizer state on a device"
    if p.compiled is not None:
        text += f", {p.temporaries / GIB:.2f} of temporaries on a CPU, where bfloat16 is computed in float32"
    print(text)
    planned = hlo.total(p.planned)
    there = hlo.total(p.compiled or ())
    for kind, axes in sorted(planned.keys() | there.keys()):
        small = (kind, axes) not in planned and all(
            one.size <= SMALL for one in p.compiled or () if (one.kind, one.axes) == (kind, axes)
        )
        if not small:
            compiled = f"{there.get((kind, axes), 0.0) / MIB:.5g}" if p.compiled is not None else "not"
            print(
                f"exchanged  {kind} over {' × '.join(axes)}: {planned.get((kind, axes), 0.0) / MIB:.5g} MiB "
                f"a device and step by formula, {compiled} compiled"
            )
    t = p.times
    print(
        f"time       {t.step:.4g} s on {_GPU.value}: computation {t.compute:.4g} at {_EFFICIENCY.value:g} of "
        f"the peak, exchanges {t.exposed:.4g} that it waits for and {t.hidden:.4g} beside it "
        f"({t.unhidden:.4g} s with these behind it); MFU {t.mfu:.1%} ({t.mfu * t.step / t.unhidden:.1%})",
        flush=True,
    )


def table(plans: list[Planned]) -> str:
    """All of them, in Markdown."""
    lines = [
        "| parameters | GPUs | mesh | state + rest, GiB a device | exchanged, GiB a device and "
        "step | off by | step, s: exchanges beside computation, behind it | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in plans:
        mesh = " × ".join(f"{axis} {size}" for axis, size in p.sizes.items() if size > 1)
        error = "not compiled" if math.isnan(p.error) else f"{abs(p.error):.2%}"
        memory = " + ".join(f"{n / GIB:.1f}" for n in (p.state, p.temporaries) if not math.isnan(n))
        exchanged, t = sum(one.bytes for one in p.planned) / GIB, p.times
        lines.append(
            f"| {quantity(p.parameters)} | {math.prod(p.sizes.values())} | {mesh} | {memory} | "
            f"{exchanged:.2f} | {error} | {t.step:.3g}, {t.unhidden:.3g} | {t.mfu:.0%}, "
            f"{t.mfu * t.step / t.unhidden:.0%} |"
        )
    return "\n".join(lines)


def _config(devices: int) -> Config:
    """The resolved config; a vocabulary that it names needs no dataset."""
    config = cli.unresolved()
    if _ROWS.value:
        config.batch_size = _ROWS.value * devices  # which every mesh can share
        sizes = sharding.mesh_sizes(config, devices)
        config.batch_size = _ROWS.value * sizes["data"] * sizes["fsdp"]
    if config.model.vocab_size:
        return config_lib.resolve(config, config.model.vocab_size)
    return cli.read()[0]


def main() -> int:
    try:
        if not all(number.isdigit() and int(number) for number in _DEVICES.value):
            raise ConfigError(f"--devices={','.join(_DEVICES.value)}: write numbers above 0, as 8,64")
        numbers = [int(number) for number in _DEVICES.value]
        virtual = max([number for number in numbers if number <= _MOST.value], default=1)
        distributed.configure("cpu", virtual, cli.cache())
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
        plans = []
        for number in numbers:
            config = _config(number)
            plans.append(plan(config, number))
            tell(plans[-1], config)
        if len(plans) > 1:
            print(table(plans))
    except (ConfigError, DatasetError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    return 0


if __name__ == "__main__":
    cli.run(main)
