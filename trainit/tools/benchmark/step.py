"""The real train step on the real loader, and under other settings of it."""

import statistics
import time
from dataclasses import dataclass

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

# What --sweep tries, one field after the other from the config's own settings, each time going on with the
# fastest. None changes what a run computes.
SETTINGS = {
    "model.attention": ("plain", "blockwise", "cudnn"),
    "model.remat": ("none", "attention", "dots", "block", "offload"),
    "model.scan_layers": (True, False),
    "device_batch_size": (1, 2, 4, 8, 16, 32, 64),
}


def build(config: Config) -> tuple[step.CompiledSteps, RunShape]:
    shape = run_shape(config, jax.devices())
    return step.build(config, shape), shape


class _Bench:
    """A step that is compiled, with its state, and batches for it."""

    def __init__(self, config: Config, dataset: TrainingData):
        self.config = config
        self.steps, shape = build(config)
        self.mesh, layout = shape.mesh, batch_sharding(shape.mesh)
        self._batches = dataset.reader(shape.batch_at(0), layout).batches()
        self.state = jax.block_until_ready(self.steps.init())
        start = time.perf_counter()
        self.lowered = self.steps.train.lower(self.state, next(self._batches))
        self.compiled = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> tuple[dict, float]:
        """A step to its end; its metrics, and how long it waited for data."""
        start = time.perf_counter()
        batch = next(self._batches)
        waited = time.perf_counter() - start
        self.state, result = self.compiled(self.state, batch)
        return jax.block_until_ready(result), waited

    def times(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds of steps, and of waiting in each, behind two that do not count."""
        times, waits = [], []
        for _ in range(count + 2):
            start = time.perf_counter()
            waits.append(self.run()[1])
            times.append(time.perf_counter() - start)
        return times[2:], waits[2:]

    def forward(self) -> jax.stages.Compiled:
        """The forward pass and loss of a micro-step alone."""
        micro_step = jax.tree.map(lambda x: x[:1], next(self._batches))
        token_bytes = jnp.zeros(self.config.model.vocab_size)
        return self.steps.evaluate.lower(self.state.params, micro_step, token_bytes, 1).compile()


def measure(config: Config, dataset: TrainingData, count: int):
    """Compile time, step time over `count` steps, tokens/s, MFU, memory, exchanges, where the time goes."""
    bench = _Bench(config, dataset)
    times, waits = bench.times(count)
    median = statistics.median(times)
    tokens = config.batch_size * config.model.context_length
    flops = metrics.flops_per_token(config.model) * tokens / median
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    lines = [
        f"{bench.compile_seconds:7.1f} s  to compile (or to read back what was compiled before)",
        f"{1e3 * median:7.1f} ms  median of {len(times)}; {1e3 * min(times):.1f} to {1e3 * max(times):.1f}",
        f"{tokens / median:7.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s, a token's being 6 * weights "
        f"in products + 12 * layers * length * width",
    ]
    if peak:
        lines.append(
            f"{flops / peak / jax.device_count():7.1%} MFU  of {peak / 1e12:.0f} TFLOP/s a device, which its "
            f"maker states for dense bfloat16"
        )
    lines.append(f"{sum(waits) / sum(times):7.2%} of the time spent waiting for data")
    sizes = profile.memory(bench.state, bench.compiled, bench.forward())
    kinds = ", ".join(f"{name} {size:.3f}" for name, size in sizes.items())
    lines.append(f"{sum(sizes.values()):7.3f} GiB  on a device at most: {kinds}")
    read = hlo.read(hlo.compile_with_text(bench.lowered)[1], bench.mesh.shape)
    for (kind, axes), size in sorted(hlo.total(read).items(), key=lambda item: -item[1]):
        over = " × ".join(axes)
        lines.append(f"exchanged: {kind} over {over}: {size / 2**20:.5g} MiB a device and step")
    lines.append(f"time: {profile.report(bench.compiled, lambda: bench.run()[0])}")
    print("\n".join(f"step    {line}" for line in lines), flush=True)


@dataclass(frozen=True)
class _Tried:
    changes: dict
    seconds: float  # of a step
    bytes: int  # on a device: state and temporaries
    compile_seconds: float

    def __str__(self) -> str:
        named = " ".join(f"{name.removeprefix('model.')}={value}" for name, value in self.changes.items())
        return (
            f"sweep   {1e3 * self.seconds:8.1f} ms  {self.bytes / 2**30:7.3f} GiB  "
            f"{self.compile_seconds:5.1f} s to compile  {named or 'as the config has it'}"
        )


def _try(config: Config, dataset: TrainingData, changes: dict, count: int) -> _Tried | None:
    """The config's step with these fields changed; None where it cannot be, which it says."""
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
    memory = bench.compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    tried = _Tried(changes, seconds, size, bench.compile_seconds)
    print(tried, flush=True)
    return tried


def sweep(config: Config, dataset: TrainingData, count: int):
    """Step time and memory under other settings that change neither batch nor result; the best of them."""
    found = [_try(config, dataset, {}, count)]
    best = found[0]
    for field, values in SETTINGS.items():
        for value in values:
            if field == "device_batch_size" and value > config.batch_size:
                continue  # the same program as all at once
            changes = (best.changes if best else {}) | {field: value}
            found.append(_try(config, dataset, changes, count))
        done = [tried for tried in found if tried]
        best = min(done, key=lambda tried: tried.seconds) if done else None
    if best:
        smallest = min(done, key=lambda tried: tried.bytes)
        print(f"fastest of all:\n{best}\nsmallest of all:\n{smallest}", flush=True)
