"""The real train step on the real loader."""

import statistics
import time

import jax

from trainit import collectives, command_line, metrics, sharding, sources, step
from trainit.config import Config
from trainit.data.streaming import Streamed
from trainit.data.tokens import Dataset


def build(config: Config) -> tuple[step.Steps, tuple[int, int, int], jax.sharding.Mesh]:
    sizes = sharding.mesh_sizes(config, jax.device_count(), shrink_to_fit=command_line.is_debug())
    mesh = sharding.make_mesh(sizes)
    return step.build(config, mesh), sharding.batch_shape(config, sizes), mesh


def measure(config: Config, dataset: Dataset | Streamed, count: int):
    """Compile time, step time over `count` steps, tokens/s, MFU, memory, what devices exchange."""
    steps, shape, mesh = build(config)
    batches = sources.reader(config, dataset, shape, sharding.batch_sharding(mesh)).batches()
    state = jax.block_until_ready(steps.init())
    start = time.perf_counter()
    lowered = steps.train.lower(state, next(batches))
    compiled = lowered.compile()
    print(
        f"step    {time.perf_counter() - start:7.1f} s  to compile (or to read back what was compiled before)"
    )
    times, waits = [], []
    for _ in range(count + 2):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        state, result = compiled(state, batch)
        jax.block_until_ready(result)
        times.append(time.perf_counter() - start)
    times, waits = sorted(times[2:]), waits[2:]
    median = statistics.median(times)
    tokens = config.batch_size * config.model.context_length
    flops = metrics.flops_per_token(config.model) * tokens / median
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    fastest, slowest = 1e3 * times[0], 1e3 * times[-1]
    print(f"step    {1e3 * median:7.1f} ms  median of {len(times)}; {fastest:.1f} to {slowest:.1f}")
    print(f"step    {tokens / median:7.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s by formula")
    if peak:
        print(f"step    {flops / peak / jax.device_count():7.1%} MFU  of {peak / 1e12:.0f} TFLOP/s a device")
    print(f"step    {sum(waits) / sum(times):7.2%} of the time spent waiting for data")
    memory = compiled.memory_analysis()
    print(
        f"step    {memory.argument_size_in_bytes / 2**30:7.3f} GiB  a device for state and batch, "
        f"{memory.temp_size_in_bytes / 2**30:.3f} for temporaries"
    )
    for line in collectives.lines(collectives.read(collectives.compile_with_text(lowered)[1], mesh.shape)):
        print(f"step    exchanged: {line}")
