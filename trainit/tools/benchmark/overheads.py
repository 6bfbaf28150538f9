"""Measures what blocking saves, processes, optimizers and logits cost."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainit import config as config_lib
from trainit import optimizers
from trainit.cluster import rendezvous
from trainit.cluster.monitor import JobMonitor
from trainit.config import Config, ConfigError
from trainit.model import cross_entropy
from trainit.model.layers import Head
from trainit.parallel.collectives import Parallel
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh
from trainit.parallel.trees import total_bytes
from trainit.tools.benchmark.step import WARMUP, build
from trainit.train.checkpoint import CheckpointStore

SAVES = 6  # of which the first is reported separately: it allocates and compiles


def measure_save(config: Config):
    """Prints how long a save blocks the loop, and how long it takes to be durable."""
    steps, _ = build(config)
    state = jax.block_until_ready(steps.init())
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(Path(folder), keep=1)
        blocks, totals = [], []
        for step in range(SAVES):
            start = time.perf_counter()
            checkpoints.save(step, state, {})
            blocks.append(time.perf_counter() - start)
            checkpoints.wait()
            totals.append(time.perf_counter() - start)
        checkpoints.close()
    size = total_bytes(state) / 2**30
    print(f"save    {size:7.3f} GiB; the first blocks {blocks[0]:.3f} s of {totals[0]:.3f} s")
    ratios = sorted(block / total for block, total in zip(blocks[1:], totals[1:], strict=True))
    print(
        f"save    {statistics.median(ratios):7.1%} of the time that a later one takes is blocked: "
        f"{statistics.median(blocks[1:]):.3f} s of {statistics.median(totals[1:]):.3f} s "
        f"(medians of {SAVES - 1})"
    )


def _step_seconds(processes: int, steps: int, flags: list[str]) -> list[float]:
    """Returns the seconds of each step of a run on two devices, in one process or two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainit", "train", *flags, f"--workdir={folder}"]
        command += [f"--config.steps={steps + WARMUP + 2}", "--config.checkpoint.overwrite_config=True"]
        command += ["--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
        command += ["--config.checkpoint.save_steps=0", "--config.eval.every_steps=0"]
        command += ["--config.eval.sequences=2", f"--config.cpu_devices={2 // processes}"]
        if processes > 1:
            address = f"localhost:{rendezvous.free_port()}"
            command += [f"--coordinator={address}", f"--num_processes={processes}"]
        started = [
            subprocess.Popen([*command, f"--process_id={index}"], stderr=subprocess.PIPE, text=True)
            for index in range(processes)
        ]
        for process in started:
            errors = process.communicate()[1]
            if process.returncode:
                raise ConfigError(f"a run in {processes} processes failed: {errors.strip().splitlines()[-1]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    times = [record["time/step_seconds"] for record in records if "time/step_seconds" in record]
    return times[WARMUP:]


def measure_processes(steps: int, flags: list[str]):
    """Prints the step time of two processes with a device each, against one process with both.

    Args:
        steps: how many train steps are timed.
        flags: those of the command line that give the config.
    """
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for count in times:
            times[count] += _step_seconds(count, steps, flags)
    one, two = (statistics.median(times[count]) for count in (1, 2))
    print(
        f"process {two / one - 1:+7.1%} of a step when two processes share the two devices of one: "
        f"{1e3 * two:.1f} ms against {1e3 * one:.1f} ms (medians of {len(times[1])}, in three turns)"
    )
    monitor = JobMonitor(0, 1, lambda code: None, 40.0)
    start = time.perf_counter()
    for _ in range(10_000):
        monitor.stop_reason()
    microseconds = 1e6 * (time.perf_counter() - start) / 10_000
    print(f"process {microseconds:7.1f} µs  a step to learn whether the run should stop")


def _in_turn(calls: list[Callable], rounds: int) -> list[float]:
    """Returns the median seconds of each call. They are made in turn, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + WARMUP):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[WARMUP:]) for seconds in times]


def measure_optimizer(config: Config, steps: int):
    """Prints step time and state of the config's optimizer against AdamW's, on ids drawn at random."""
    name = config.optimizer.name
    if name == "adamw" and not config.parameter_groups:
        raise ConfigError("--only=optimizer compares with adamw: choose another one, as :optimizer=muon")
    adamw = optimizers.choices()["adamw"]().to_dict()
    changed = Config({**config.to_dict(), "optimizer": adamw, "parameter_groups": ()})
    built, states, sizes = {}, {}, {}
    for label, c in ((name, config), ("adamw", changed)):
        built[label], shape = build(c)
        states[label] = built[label].init()
        sizes[label] = total_bytes(states[label].opt_state) / 2**20
    micro_steps, rows, length = shape.batch_at(0)
    ids = np.random.default_rng(0).integers(0, 256, (micro_steps, rows, length + 1)).astype(np.uint16)
    batch = {"tokens": ids, "lengths": np.full((micro_steps, rows), length, np.int32)}
    batch = jax.device_put(batch, batch_sharding(shape.mesh))

    def train(label: str) -> dict:
        states[label], result = built[label].train(states[label], batch)
        return result

    own, base = _in_turn([partial(train, label) for label in built], steps)
    print(
        f"optimizer {own / base - 1:+.1%} of a step with {name} instead of adamw: {1e3 * own:.1f} ms "
        f"against {1e3 * base:.1f} ms (medians of {steps}, in turn); state {sizes[name]:.1f} MiB "
        f"against {sizes['adamw']:.1f}"
    )


def measure_loss(config: Config, rounds: int):
    """Prints the time and memory of GPT-2's head and loss with gradients, against optax's on all logits."""
    mesh = make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    own = cross_entropy.CrossEntropy(Parallel(mesh), config.logits_mib)

    def plain(head, x_BLD, targets_BL, mask_BL):
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(head(x_BLD), targets_BL)
        return jnp.sum(losses_BL * mask_BL), None

    draw = np.random.default_rng(0)
    x_BLD, kernel_DV = (draw.standard_normal(shape, np.float32) for shape in ((4, 1024, 768), (768, 50304)))
    targets_BL = draw.integers(0, 50304, (4, 1024), np.int32)
    head = Head(jnp.asarray(0.02 * kernel_DV), None, 0.0)
    arguments = jax.device_put((head, x_BLD, targets_BL, targets_BL >= 0), mesh.devices.flat[0])
    compiled: list[Any] = [
        jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
        for loss in (own.sums, plain)
    ]
    chunks, whole = _in_turn([partial(function, *arguments) for function in compiled], rounds)
    print(
        f"loss    {chunks / whole:7.2f} of the time of optax's loss on all logits, with gradients: "
        f"{chunks:.3f} s against {whole:.3f} s (medians of {rounds}, in turn)"
    )
    less, more = (function.memory_analysis().temp_size_in_bytes / 2**20 for function in compiled)
    print(f"loss    {less:7.0f} MiB  of temporaries, against {more:.0f}; logits_mib={config.logits_mib:g}")
