"""What blocking saves, processes, optimizers and logits cost."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from trainit.tools.benchmark.step import build
from trainit.train import metrics
from trainit.train.checkpoint import CheckpointStore


def measure_save(config: Config):
    """How long a save blocks the loop, and how long it takes to be durable; the first apart."""
    steps, _ = build(config)
    state = jax.block_until_ready(steps.init())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(Path(folder), keep=1)
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


def _trained(count: int, rounds: int, flags: list[str]) -> list[float]:
    """Seconds of each step of a run of this command's config on two devices, in so many processes."""
    address = f"localhost:{rendezvous.free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainit", "train", *flags, f"--workdir={folder}"]
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


def measure_processes(steps: int, flags: list[str]):
    """Step time of two processes of one device each, against one process with two, in turn.

    Args:
        steps: train steps that are timed.
        flags: of the command line, which say the config.
    """
    times = {1: [], 2: []}
    for _ in range(3):
        for count in times:
            times[count] += _trained(count, steps + 4, flags)
    one, two = (statistics.median(times[count]) for count in (1, 2))
    print(
        f"process {two / one - 1:+7.1%} of a step when two processes share the two devices of one: "
        f"{1e3 * two:.1f} ms against {1e3 * one:.1f} ms (medians of {len(times[1])}, in three turns)"
    )
    monitor = JobMonitor(0, 1, lambda code: None, 40.0)
    start = time.perf_counter()
    for _ in range(10_000):
        monitor.stop_reason()
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


def measure_optimizer(config: Config, steps: int):
    """Step time and state of the config's optimizer against AdamW's, in turn, on ids drawn at random."""
    name = config.optimizer.name
    adamw = Config(
        {**config.to_dict(), "optimizer": optimizers.choices()["adamw"]().to_dict(), "parameter_groups": ()}
    )
    if name == "adamw" and not config.parameter_groups:
        raise ConfigError("--only=optimizer compares with adamw: choose another one, as :optimizer=muon")
    built, states, sizes = {}, {}, {}
    for label, c in ((name, config), ("adamw", adamw)):
        built[label], shape = build(c)
        states[label] = built[label].init()
        sizes[label] = metrics.facts(c.model, states[label])["optimizer_bytes"] / 2**20
    micro_steps, rows, length = shape.batch_at(0)
    ids = np.random.default_rng(0).integers(0, 256, (micro_steps, rows, length + 1)).astype(np.uint16)
    batch = {"tokens": ids, "lengths": np.full((micro_steps, rows), length, np.int32)}
    batch = jax.device_put(batch, batch_sharding(shape.mesh))

    def train(label: str) -> dict:
        states[label], result = built[label].train(states[label], batch)
        return result

    mine, base = _in_turn([partial(train, label) for label in built], steps)
    print(
        f"optimizer {mine / base - 1:+.1%} of a step with {name} instead of adamw: {1e3 * mine:.1f} ms "
        f"against {1e3 * base:.1f} ms (medians of {steps}, in turn); state {sizes[name]:.1f} MiB "
        f"against {sizes['adamw']:.1f}"
    )


def measure_loss(config: Config, rounds: int):
    """GPT-2's head, loss and gradient in float32 on a device: as a step does it, and optax on all logits."""
    mesh = make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    ours = cross_entropy.CrossEntropy(Parallel(mesh), config.logits_mib)

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
    chunks, whole = _in_turn([partial(function, *arguments) for function in compiled], rounds)
    print(
        f"loss    {chunks / whole:7.2f} of the time of optax's loss on all logits, with gradients: "
        f"{chunks:.3f} s against {whole:.3f} s (medians of {rounds}, in turn)"
    )
    less, more = (function.memory_analysis().temp_size_in_bytes / 2**20 for function in compiled)
    print(f"loss    {less:7.0f} MiB  of temporaries, against {more:.0f}; logits_mib={config.logits_mib:g}")
