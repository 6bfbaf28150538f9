"""Measures the real train step on the real loader, also with other settings."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from trainit.cluster import hardware
from trainit.config import Config
from trainit.data.training_data import TrainingData
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape, run_shape
from trainit.tools.benchmark import profile
from trainit.tools.plan import hlo
from trainit.train import metrics, step

WARMUP = 2  # steps before those that are timed
# What --sweep tries, one field after the other, starting from the config's settings and continuing with the
# fastest. None of them changes what a run computes.
SETTINGS = {
    "model.attention": ("plain", "blockwise", "cudnn"),
    "model.remat": ("none", "attention", "dots", "block", "offload"),
    "model.scan_layers": (True, False),
    "device_batch_size": (1, 2, 4, 8, 16, 32, 64),
}


def build(config: Config) -> tuple[step.CompiledSteps, RunShape]:
    """Returns the step of a config on all devices, and the run's shape."""
    shape = run_shape(config, jax.devices())
    return step.build(config, shape), shape


class _Bench:
    """A compiled step with its state and its batches."""

    def __init__(self, config: Config, dataset: TrainingData):
        self.config = config
        self.steps, self.shape = build(config)
        layout = batch_sharding(self.shape.mesh)
        self._batches = dataset.reader(self.shape.batch_at(0), layout).batches()
        self.state = jax.block_until_ready(self.steps.init())
        start = time.perf_counter()
        self.lowered = self.steps.train.lower(self.state, next(self._batches))
        self.compiled = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> tuple[dict, float]:
        """Runs a step until it has finished; returns its metrics and the seconds it waited for data."""
        start = time.perf_counter()
        batch = next(self._batches)
        waited = time.perf_counter() - start
        self.state, result = self.compiled(self.state, batch)
        return jax.block_until_ready(result), waited

    def times(self, count: int) -> tuple[list[float], list[float]]:
        """Returns the seconds of `count` steps, and the seconds each has waited for data."""
        times, waits = [], []
        for _ in range(count + WARMUP):
            start = time.perf_counter()
            waits.append(self.run()[1])
            times.append(time.perf_counter() - start)
        return times[WARMUP:], waits[WARMUP:]

    def forward(self) -> jax.stages.Compiled:
        """Compiles the forward pass and loss of one micro-step."""
        micro_step = jax.tree.map(lambda x: x[:1], next(self._batches))
        token_bytes = jnp.zeros(self.config.model.vocab_size)
        return self.steps.evaluate.lower(self.state.params, micro_step, token_bytes, 1).compile()


def measure(config: Config, dataset: TrainingData, count: int):
    """Prints compile time, time of `count` steps, tokens/s, MFU, memory, exchanges, and shares of time."""
    bench = _Bench(config, dataset)
    times, waits = bench.times(count)
    median = statistics.median(times)
    tokens = config.batch_size * config.model.context_length
    flops = metrics.flops_per_token(config.model) * tokens / median
    lines = [
        f"{bench.compile_seconds:7.1f} s  to compile, or to read what was compiled before",
        f"{1e3 * median:7.1f} ms  median of {len(times)}; {1e3 * min(times):.1f} to {1e3 * max(times):.1f}",
        f"{tokens / median:7.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s; a token counts as 6 * weights in "
        f"products + 12 * layers * length * width",
    ]
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    if peak:
        mfu = flops / peak / jax.device_count()
        lines.append(f"{mfu:7.1%} MFU  of {peak / 1e12:.0f} dense bfloat16 TFLOP/s a device (data sheet)")
    lines.append(f"{sum(waits) / sum(times):7.2%} of the time spent waiting for data")

    sizes = profile.memory(bench.state, bench.compiled, bench.forward())
    kinds = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    lines.append(f"{sum(sizes.values()):7.3f} GiB  on a device at most: {kinds}")

    exchanged = hlo.total(hlo.read(hlo.compile_with_text(bench.lowered)[1], bench.shape.sizes))
    for (kind, axes), size in sorted(exchanged.items(), key=lambda item: -item[1]):
        over = " × ".join(axes)
        lines.append(f"exchanged: {kind} over {over}: {size / 2**20:.5g} MiB a device and step")

    lines.append(f"time: {profile.report(bench.compiled, lambda: bench.run()[0])}")
    print("\n".join(f"step    {line}" for line in lines), flush=True)


@dataclass(frozen=True)
class _Trial:
    """The step with some settings changed."""

    changes: dict
    seconds: float  # of a step
    bytes: int  # on a device: state and temporaries
    compile_seconds: float

    def __str__(self) -> str:
        changes = " ".join(f"{name.removeprefix('model.')}={value}" for name, value in self.changes.items())
        return (
            f"sweep   {1e3 * self.seconds:8.1f} ms  {self.bytes / 2**30:7.3f} GiB  "
            f"{self.compile_seconds:5.1f} s to compile  {changes or 'as the config has it'}"
        )


def _try(config: Config, dataset: TrainingData, changes: dict, count: int) -> _Trial | None:
    """Times and prints the step with these fields changed; returns None, and prints why, if it cannot run."""
    changed = config.to_dict()
    for field, value in changes.items():
        *path, name = field.split(".")
        part = changed
        for key in path:
            part = part[key]
        part[name] = value
    try:
        bench = _Bench(Config(changed), dataset)
        seconds = statistics.median(bench.times(count)[0])
    except (ValueError, JaxRuntimeError) as error:
        print(f"sweep   {changes} cannot be: {str(error).splitlines()[0][:150]}", flush=True)
        return None
    memory: Any = bench.compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    trial = _Trial(changes, seconds, size, bench.compile_seconds)
    print(trial, flush=True)
    return trial


def sweep(config: Config, dataset: TrainingData, count: int):
    """Tries other settings that change neither batch nor result; prints each, and the best of them."""
    trials = [trial for trial in [_try(config, dataset, {}, count)] if trial]
    for field, values in SETTINGS.items():
        fastest = min(trials, key=lambda trial: trial.seconds, default=None)
        for value in values:
            if field == "device_batch_size" and value > config.batch_size:
                continue  # the same program as without a bound
            trial = _try(config, dataset, (fastest.changes if fastest else {}) | {field: value}, count)
            trials += [trial] if trial else []
    if trials:
        print(f"fastest of all:\n{min(trials, key=lambda trial: trial.seconds)}")
        print(f"smallest of all:\n{min(trials, key=lambda trial: trial.bytes)}", flush=True)
