"""Measures the real train step on the real loader, also with other settings."""

import math
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from trainit.cluster import hardware
from trainit.config import Config, ConfigDict
from trainit.data.training_data import TrainingData
from trainit.experiments.plan import hlo
from trainit.parallel.layout import batch_sharding
from trainit.tools.benchmark import profile
from trainit.tools.timing import WARMUP, in_turn
from trainit.train import step
from trainit.train.automatic import choice
from trainit.train.reports import metrics

# What --sweep tries, one field after the other, starting from the config's settings and continuing with the
# fastest. None of them changes what a run computes.
SETTINGS = {
    "model.attention": ("plain", "blockwise", "cudnn"),
    "model.remat": ("none", "attention", "dots", "block", "offload"),
    "model.scan_layers": (True, False),
    "device_batch_size": (1, 2, 4, 8, 16, 32, 64),
}


class Bench:
    """A config's train step, compiled for all devices, with its state and its batches."""

    def __init__(self, config: Config, dataset: TrainingData):
        config, self.shape, self.computing = choice.on_devices(config)
        self.steps = step.build(config, self.shape)
        layout = batch_sharding(self.shape.mesh)
        self.batches = dataset.reader(self.shape.batch_at(0), layout).batches()
        self.state = jax.block_until_ready(self.steps.init())
        self.waits: list[float] = []  # seconds that each step has waited for data
        start = time.perf_counter()
        self.lowered = self.steps.train.lower(self.state, next(self.batches))
        self.compiled = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> dict:
        """Starts a step on the next batch; returns its metrics."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.waits.append(time.perf_counter() - start)
        self.state, result = self.compiled(self.state, batch)
        return result


def measure(config: Config, dataset: TrainingData, count: int) -> Iterator[str]:
    """Yields compile time, time of `count` steps, tokens/s, MFU, memory, exchanges, and shares of time."""
    bench = Bench(config, dataset)
    [times] = in_turn([bench.run], count)
    seconds, tokens = median(times), config.batch_size * config.model.context_length
    flops = metrics.flops_per_token(config.model) * tokens / seconds
    yield f"computing {bench.computing}"
    yield f"{bench.compile_seconds:7.1f} s  to compile, or to read what was compiled before"
    yield f"{1e3 * seconds:7.1f} ms  median of {count}; {1e3 * min(times):.1f} to {1e3 * max(times):.1f}"
    yield (
        f"{tokens / seconds:7.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s; a token counts as 6 * weights in "
        f"products + 12 * layers * length * width"
    )
    if peak := hardware.peak_flops(jax.devices()[0].device_kind):
        mfu = flops / peak / jax.device_count()
        yield f"{mfu:7.1%} MFU  of {peak / 1e12:.0f} dense bfloat16 TFLOP/s a device (data sheet)"
    yield f"{sum(bench.waits[WARMUP:]) / sum(times):7.2%} of the time spent waiting for data"

    # Memory, also that of the forward pass and loss of one micro-step; exchanges; a profile.
    micro_step = jax.tree.map(lambda x: x[:1], next(bench.batches))
    token_bytes = jnp.zeros(config.model.vocab_size)
    forward = bench.steps.evaluate.lower(bench.state.params, micro_step, token_bytes, 1).compile()
    sizes = profile.memory(bench.state, bench.compiled, forward)
    kinds = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    yield f"{sum(sizes.values()):7.3f} GiB  on a device at most: {kinds}"
    exchanged = hlo.total(hlo.read(hlo.compile_with_text(bench.lowered)[1], bench.shape.sizes))
    for (kind, axes), size in sorted(exchanged.items(), key=lambda item: -item[1]):
        yield f"exchanged: {kind} over {' × '.join(axes)}: {size / 2**20:.5g} MiB a device and step"
    yield f"time: {profile.report(bench.compiled, bench.run)}"


class _Trial(NamedTuple):
    """The step with some settings changed, and the line about it."""

    changes: dict
    line: str
    seconds: float = math.inf  # of a step; inf: it cannot run
    bytes: float = math.inf  # on a device: state and temporaries


def _try(config: Config, dataset: TrainingData, changes: dict, count: int) -> _Trial:
    """Times the step with these fields changed."""
    changed = ConfigDict(config.to_dict(), type_safe=False)  # "auto" may become a number
    changed.update_from_flattened_dict(changes)
    try:
        bench = Bench(Config(changed), dataset)
        [times] = in_turn([bench.run], count)
    except (ValueError, JaxRuntimeError) as error:
        return _Trial(changes, f"{changes} cannot be: {str(error).splitlines()[0][:150]}")
    memory: Any = bench.compiled.memory_analysis()
    seconds, size = median(times), memory.argument_size_in_bytes + memory.temp_size_in_bytes
    fields = " ".join(f"{name.removeprefix('model.')}={value}" for name, value in changes.items())
    line = f"{1e3 * seconds:8.1f} ms  {size / 2**30:7.3f} GiB  {bench.compile_seconds:5.1f} s to compile  "
    return _Trial(changes, line + (fields or "as the config has it"), seconds, size)


def sweep(config: Config, dataset: TrainingData, count: int) -> Iterator[str]:
    """Tries other settings that change neither batch nor result; yields each, and the best of them."""
    trials = [_try(config, dataset, {}, count)]
    yield trials[0].line
    for field, values in SETTINGS.items():
        fastest = min(trials, key=lambda trial: trial.seconds)
        for value in values:
            if field == "device_batch_size" and value > config.batch_size:
                continue  # the same program as without a bound
            trials.append(_try(config, dataset, {**fastest.changes, field: value}, count))
            yield trials[-1].line
    yield from ("fastest of all:", min(trials, key=lambda trial: trial.seconds).line)
    yield from ("smallest of all:", min(trials, key=lambda trial: trial.bytes).line)
