"""Measures the loader, the train step, blocking saves, and what processes, optimizers and logits cost.

    python -m trainit.benchmark --config=configs/debug.py [--only=loader,step,save,processes,optimizer,loss]
    python -m trainit.benchmark --only=prepare --corpus=FILES

Times are medians over repetitions on this machine as it is; what counts is the ratios within one run.
"""

import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from trainit import (
    command_line,
    distributed,
    losses,
    metrics,
    optimizers,
    rendezvous,
    sharding,
    sources,
    step,
    trackers,
)
from trainit import config as config_lib
from trainit.checkpoint import Checkpoints
from trainit.config import Config, ConfigError
from trainit.data import loader, speed
from trainit.data.order import Ordered, Shuffled
from trainit.data.streaming import Streamed
from trainit.data.tokens import Dataset, DatasetError, Split
from trainit.model import Head
from trainit.peers import Peers

PARTS = ("loader", "step", "save", "processes", "optimizer", "loss")
_ONLY = flags.DEFINE_list("only", list(PARTS[:3]), f"which of {', '.join(PARTS)} to measure")
_TOKENS = flags.DEFINE_integer("tokens", 1 << 27, "tokens of the synthetic dataset; a quarter GB by default")
_CORPUS = flags.DEFINE_string("corpus", "", "files of documents to prepare, for --only=prepare")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of what prepare and loss compare", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "train steps that are timed", lower_bound=3)

LOADER_BATCH, LOADER_LENGTH, LOADER_SECONDS = 64, 1024, 1.5
HUGE = 300_000_000_000  # tokens, as of the Pile


def _rate(batches: Iterator, tokens: int) -> float:
    """Tokens per second of an iterator over batches, after its first ones."""
    for _ in range(10):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < LOADER_SECONDS:
        next(batches)
        count += 1
    return count * tokens / (time.perf_counter() - start)


def _shuffled(path: str, tokens: int) -> Ordered:
    split = Split("train", (path,), (tokens,), "<u2", 4 * tokens)
    return Ordered(split, Shuffled(split.sequences(LOADER_LENGTH), 0))


def _batches(path: str, tokens: int, first_row: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Shuffled batches of a file of uint16 ids, on one device."""
    mesh = sharding.make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    source = _shuffled(path, tokens)
    shape = (1, LOADER_BATCH, LOADER_LENGTH)
    return loader.batches(source, shape, sharding.batch_sharding(mesh), first_row)


def _random_crops(path: str, draw: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What nanoGPT's get_batch does: inputs and targets at random places, stacked, as int64."""
    ids = np.memmap(path, np.uint16, "r")
    while True:
        starts = draw.integers(0, len(ids) - LOADER_LENGTH, LOADER_BATCH)
        yield tuple(
            np.stack([ids[i + shift : i + shift + LOADER_LENGTH].astype(np.int64) for i in starts])
            for shift in (0, 1)
        )


def _seconds_to_first(path: str, tokens: int, first_row: int) -> float:
    start = time.perf_counter()
    next(_batches(path, tokens, first_row))
    return time.perf_counter() - start


def _cold_rates(path: str, tokens: int) -> tuple[float, float]:
    """Tokens per second from the disk: of the loader, and of the same rows read one after another."""
    row, rates = np.empty(LOADER_LENGTH + 1, np.uint16), []

    def together(source: Ordered, positions: np.ndarray):
        source.read(positions, LOADER_LENGTH)

    def one_by_one(source: Ordered, positions: np.ndarray):
        for sequence in source.order(positions).tolist():
            source.split.copy(row, min(sequence * LOADER_LENGTH, tokens - len(row)))

    for read in (together, one_by_one):
        source = _shuffled(path, tokens)  # anew, since pages that are mapped stay
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for batch in range(20):
            read(source, np.arange(batch * LOADER_BATCH, (batch + 1) * LOADER_BATCH))
        rates.append(20 * LOADER_BATCH * LOADER_LENGTH / (time.perf_counter() - start))
    return tuple(rates)


def _memory(path: str, tokens: int) -> tuple[int, int]:
    """MiB of this process's own, and of files mapped, when it has read batches of the file."""
    jax.config.update("jax_platforms", "cpu")
    batches = _batches(path, tokens)
    for _ in range(100):
        next(batches)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))


def measure_loader():
    """One process on one core, shuffled, from the page cache: speed, resuming, memory."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    tokens = LOADER_BATCH * LOADER_LENGTH
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        draw = np.random.default_rng(0)
        draw.integers(0, 50257, _TOKENS.value, np.uint16).tofile(file.name)
        Path(file.name).read_bytes()  # into the page cache
        rates = {"crops": [], "ours": []}
        for _ in range(3):  # in turn
            rates["crops"].append(_rate(_random_crops(file.name, draw), tokens))
            rates["ours"].append(_rate(_batches(file.name, _TOKENS.value), tokens))
        crops, ours = (statistics.median(rates[name]) for name in ("crops", "ours"))
        later = 1_000_000 * LOADER_BATCH
        seconds = {row: [] for row in (0, later)}
        for _ in range(7):
            for row, times in seconds.items():
                times.append(_seconds_to_first(file.name, _TOKENS.value, row))
        cold, one_by_one = _cold_rates(file.name, _TOKENS.value)
    os.sched_setaffinity(0, cores)
    print(f"loader  {ours / 1e6:7.1f} M tokens/s  through Grain to the device; one core, batches of {tokens}")
    print(
        f"loader  {ours / crops:7.2f} times the speed of random crops from a memmap, stacked as int64 "
        f"({crops / 1e6:.1f} M tokens/s)"
    )
    print(
        f"loader  {cold / 1e6:7.1f} M tokens/s  read from the disk; {cold / one_by_one:.1f} times the speed "
        f"of one row after another"
    )
    first, millionth = (statistics.median(times) for times in seconds.values())
    print(
        f"loader  {1e3 * millionth:7.1f} ms  to the first batch of a resume at step 1,000,000; "
        f"{1e3 * first:.1f} at step 0 (medians of 7)"
    )
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        os.truncate(file.name, 2 * HUGE)  # of nothing
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            own, mapped = pool.apply(_memory, (file.name, HUGE))
    print(
        f"loader  {own:7d} MiB  of a whole process that reads of {HUGE / 1e9:.0f} billion tokens; {mapped} "
        f"more are pages of files, which the system may take back"
    )


def _build(config: Config) -> tuple[step.Steps, tuple[int, int, int], jax.sharding.Mesh]:
    sizes = sharding.mesh_sizes(config, jax.device_count(), shrink_to_fit=command_line.is_debug())
    mesh = sharding.make_mesh(sizes)
    return step.build(config, mesh), sharding.batch_shape(config, sizes), mesh


def measure_step(config: Config, dataset: Dataset | Streamed):
    """The real train step on the real loader: compile time, step time, tokens/s, MFU, memory."""
    steps, shape, mesh = _build(config)
    batches = sources.reader(config, dataset, shape, sharding.batch_sharding(mesh)).batches()
    state = jax.block_until_ready(steps.init())
    start = time.perf_counter()
    compiled = steps.train.lower(state, next(batches)).compile()
    print(
        f"step    {time.perf_counter() - start:7.1f} s  to compile (or to read back what was compiled before)"
    )
    times, waits = [], []
    for _ in range(_STEPS.value + 2):
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


def measure_save(config: Config):
    """How long a save blocks the loop, and how long it takes to be durable; the first apart."""
    steps, _, _ = _build(config)
    state = jax.block_until_ready(steps.init())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        blocks, totals = [], []
        for number in range(6):
            start = time.perf_counter()
            checkpoints.save(number, state, {})
            blocks.append(time.perf_counter() - start)
            checkpoints.wait()
            totals.append(time.perf_counter() - start)
        checkpoints.close()
    print(f"save    {size / 2**30:7.3f} GiB; the first blocks {blocks[0]:.3f} s of {totals[0]:.3f} s")
    ratios = sorted(block / total for block, total in zip(blocks[1:], totals[1:], strict=True))
    print(
        f"save    {statistics.median(ratios):7.1%} of the time that a later one takes is blocked: "
        f"{statistics.median(blocks[1:]):.3f} s of {statistics.median(totals[1:]):.3f} s (medians of 5)"
    )


def _trained(count: int, rounds: int) -> list[float]:
    """Seconds of each step of a run of this command's config on two devices, in so many processes."""
    address = f"localhost:{rendezvous.free_port()}"
    given = [argument for argument in sys.argv[1:] if re.match(r"--?(config\b|debug)", argument)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainit.main", *given, f"--workdir={folder}"]
        command += [f"--config.steps={rounds}", "--config.checkpoint.overwrite_config=True"]
        command += ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
        command += ["--config.checkpoint.save_steps=0", "--config.eval.every_steps=0"]
        command += ["--config.eval.sequences=2", f"--config.cpu_devices={2 // count}"]
        if count > 1:
            command += [f"--coordinator={address}", f"--num_processes={count}"]
        processes = [
            subprocess.Popen([*command, f"--process_id={number}"], stderr=subprocess.PIPE, text=True)
            for number in range(count)
        ]
        for process in processes:
            errors = process.communicate()[1]
            if process.returncode:
                raise ConfigError(f"a run in {count} processes failed: {errors.strip().splitlines()[-1]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record["time/step_seconds"] for record in records if "time/step_seconds" in record][2:]


def measure_processes():
    """Step time of two processes of one device each, against one process with two, in turn."""
    times = {1: [], 2: []}
    for _ in range(3):
        for count in times:
            times[count] += _trained(count, _STEPS.value + 4)
    one, two = (statistics.median(times[count]) for count in (1, 2))
    print(
        f"process {two / one - 1:+7.1%} of a step when two processes share the two devices of one: "
        f"{1e3 * two:.1f} ms against {1e3 * one:.1f} ms (medians of {len(times[1])}, in three turns)"
    )
    peers = Peers(0, 1, lambda code: None, 40.0)
    start = time.perf_counter()
    for _ in range(10_000):
        peers.stop()
    print(f"process {100 * (time.perf_counter() - start):7.1f} µs  a step to hear if the run should stop")


def _in_turn(calls: list[Callable], rounds: int) -> list[float]:
    """Median seconds of each call, all made in turn `rounds` times behind two that do not count."""
    times = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def measure_optimizer(config: Config):
    """Step time and state of the config's optimizer against AdamW's, in turn, on ids drawn at random."""
    name = config.optimizer.name
    adamw = Config(
        {**config.to_dict(), "optimizer": optimizers.choices()["adamw"]().to_dict(), "parameter_groups": ()}
    )
    if name == "adamw" and not config.parameter_groups:
        raise ConfigError("--only=optimizer compares with adamw: choose another one, as :optimizer=muon")
    built, states, sizes = {}, {}, {}
    for label, c in ((name, config), ("adamw", adamw)):
        built[label], shape, mesh = _build(c)
        states[label] = built[label].init()
        sizes[label] = metrics.facts(c.model, states[label])["optimizer_bytes"] / 2**20
    micro_steps, rows, length = shape
    ids = np.random.default_rng(0).integers(0, 256, (micro_steps, rows, length + 1)).astype(np.uint16)
    batch = {"tokens": ids, "lengths": np.full((micro_steps, rows), length, np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def train(label: str) -> dict:
        states[label], result = built[label].train(states[label], batch)
        return result

    mine, base = _in_turn([partial(train, label) for label in built], _STEPS.value)
    print(
        f"optimizer {mine / base - 1:+.1%} of a step with {name} instead of adamw: {1e3 * mine:.1f} ms "
        f"against {1e3 * base:.1f} ms (medians of {_STEPS.value}, in turn); state {sizes[name]:.1f} MiB "
        f"against {sizes['adamw']:.1f}"
    )


def measure_loss(config: Config):
    """GPT-2's head, loss and gradient in float32 on a device: as a step does it, and optax on all logits."""
    mesh = sharding.make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    ours = losses.CrossEntropy(mesh, config.logits_mib)

    def plain(head, x_BLD, targets_BL, mask_BL):
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(head(x_BLD), targets_BL)
        return jnp.sum(losses_BL * mask_BL), None

    draw = np.random.default_rng(0)
    x_BLD, kernel_DV = (draw.standard_normal(shape, np.float32) for shape in ((4, 1024, 768), (768, 50304)))
    targets_BL = draw.integers(0, 50304, (4, 1024), np.int32)
    arguments = jax.device_put(
        (Head(0.02 * kernel_DV, None, 0.0), x_BLD, targets_BL, targets_BL >= 0), mesh.devices.flat[0]
    )
    compiled = [
        jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
        for loss in (ours.sums, plain)
    ]
    chunks, whole = _in_turn([partial(function, *arguments) for function in compiled], _ROUNDS.value)
    print(
        f"loss    {chunks / whole:7.2f} of the time of optax's loss on all logits, with gradients: "
        f"{chunks:.3f} s against {whole:.3f} s (medians of {_ROUNDS.value}, in turn)"
    )
    less, more = (function.memory_analysis().temp_size_in_bytes / 2**20 for function in compiled)
    print(f"loss    {less:7.0f} MiB  of temporaries, against {more:.0f}; logits_mib={config.logits_mib:g}")


def measure_prepare() -> int:
    """Preparing beside the bare tokenizers, without a config and without JAX; the exit code."""
    if _ONLY.value != ["prepare"] or not _CORPUS.value:
        raise ConfigError("--only=prepare stands alone and needs --corpus=FILES")
    try:
        for line in speed.measure(_CORPUS.value, rounds=_ROUNDS.value):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    return 0


def main() -> int:
    try:
        unknown = set(_ONLY.value) - {*PARTS, "prepare"}
        if unknown:
            raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(PARTS)}, prepare")
        if "prepare" in _ONLY.value:
            return measure_prepare()
        trackers.log_to_terminal(lead=True)
        config, dataset = command_line.read()
        distributed.configure(config.platform, config.cpu_devices, command_line.cache())
        distributed.initialize(config.platform, distributed.Place("alone"))
        device = jax.devices()[0]
        print(f"{jax.device_count()} × {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")
        if "loader" in _ONLY.value:
            measure_loader()
        if "step" in _ONLY.value:
            measure_step(config, dataset)
        if "save" in _ONLY.value:
            measure_save(config)
        if "processes" in _ONLY.value:
            measure_processes()
        if "optimizer" in _ONLY.value:
            measure_optimizer(config)
        if "loss" in _ONLY.value:
            measure_loss(config)
    except (ConfigError, DatasetError) as error:
        command_line.say(error)
        return command_line.USAGE_ERROR
    return 0


if __name__ == "__main__":
    command_line.run(main, needs_config="--only=prepare" not in sys.argv)
