"""Measures what blocking saves, processes, optimizers and logits cost."""

import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainit import optimizers
from trainit.checkpoints.store import CheckpointStore
from trainit.cluster import rendezvous
from trainit.cluster.monitor import JobMonitor
from trainit.config import MESH_AXES, Config, ConfigError
from trainit.data.training_data import TrainingData
from trainit.model.cross_entropy import CrossEntropy
from trainit.model.layers import Head
from trainit.parallel.collectives import Parallel
from trainit.parallel.mesh import make_mesh
from trainit.parallel.trees import total_bytes
from trainit.tools.benchmark.step import Bench
from trainit.tools.timing import WARMUP, in_turn, seconds
from trainit.train import step
from trainit.train.automatic import choice

SAVES = 6  # of which the first is reported separately: it allocates and compiles


def measure_save(config: Config) -> Iterator[str]:
    """Yields how long a save blocks the loop and takes to be durable, and what its digests take."""
    config, shape, _ = choice.on_devices(config)
    steps = step.build(config, shape)

    def trained(leaf: jax.Array) -> jax.Array:  # zeros, as of moments, would be compressed to nothing
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype) if is_float else leaf

    layout = jax.tree.map(lambda leaf: leaf.sharding, steps.abstract_state)
    state = jax.jit(lambda state: jax.tree.map(trained, state), out_shardings=layout)(steps.init())
    state = jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(Path(folder), keep=1)
        saves = []  # the seconds for which each blocks, and until it is durable
        for number in range(SAVES):
            blocked = seconds(partial(checkpoints.save, number, state, {}))
            saves.append((blocked, blocked + seconds(checkpoints.wait)))
        compared = seconds(partial(checkpoints.compared.damage, number))
        restored = seconds(partial(checkpoints.restore, number, steps.abstract_state))
        checkpoints.close()
    (first, first_total), *later = saves
    block, total = map(median, zip(*later, strict=True))
    share = median(block / total for block, total in later)
    yield f"{total_bytes(state) / 2**30:7.3f} GiB; the first blocks {first:.3f} s of {first_total:.3f} s"
    yield f"{share:7.1%} of the time of a later one is blocked: {block:.3f} s of {total:.3f} s"
    shares = f"{compared / total:.1%} of a save, {compared / restored:.1%} of a restore ({restored:.3f} s)"
    yield f"{compared:7.3f} s to digest all of it: {shares}"


def _step_seconds(processes: int, steps: int, flags: list[str]) -> list[float]:
    """Returns the seconds of each step of a run on two devices, in one process or two."""
    fields = {"steps": steps + WARMUP + 2, "cpu_devices": 2 // processes}
    fields |= {"mesh.data": 2, "mesh.fsdp": 1, "mesh.tensor": 1, "eval.every_steps": 0, "eval.sequences": 2}
    fields |= {"checkpoint.overwrite_config": True, "checkpoint.save_steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainit", "train", *flags, f"--workdir={folder}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        if processes > 1:
            command += [f"--coordinator=localhost:{rendezvous.free_port()}", f"--num_processes={processes}"]
        token = {"TRAINIT_TOKEN": secrets.token_hex(), "TRAINIT_TOKEN_FILE": ""}
        environment = {**os.environ, **token}
        started = [
            subprocess.Popen(
                [*command, f"--process_id={index}"], env=environment, stderr=subprocess.PIPE, text=True
            )
            for index in range(processes)
        ]
        for process in started:
            errors = process.communicate()[1]
            if process.returncode:
                raise ConfigError(f"a run in {processes} processes failed: {errors.strip().splitlines()[-1]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record["time/step_seconds"] for record in records if "time/step_seconds" in record][WARMUP:]


def measure_processes(steps: int, flags: list[str]) -> Iterator[str]:
    """Yields the step time of two processes with a device each, against one process with both.

    The flags are those of the command line that give the config.
    """
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for count in times:
            times[count] += _step_seconds(count, steps, flags)
    one, two = map(median, times.values())
    yield (
        f"{two / one - 1:+7.1%} of a step when two processes share the two devices of one: "
        f"{1e3 * two:.1f} ms against {1e3 * one:.1f} ms (medians of {len(times[1])}, in three turns)"
    )
    monitor = JobMonitor(0, 1, lambda code: None, 40.0)
    microseconds = 100 * timeit.timeit(monitor.stop_reason, number=10_000)
    yield f"{microseconds:7.1f} µs  a step to learn whether the run should stop"


def measure_optimizer(config: Config, dataset: TrainingData, steps: int) -> Iterator[str]:
    """Yields step time and state of the config's optimizer against AdamW's, on the same batch."""
    name = config.optimizer.name
    if name == "adamw" and not config.parameter_groups:
        raise ConfigError("--only=optimizer compares with adamw: choose another one, as :optimizer=muon")
    adamw = optimizers.choices()["adamw"]().to_dict()
    changed = Config({**config.to_dict(), "optimizer": adamw, "parameter_groups": ()})
    benches = [Bench(config, dataset), Bench(changed, dataset)]
    for bench in benches:
        bench.batches = itertools.repeat(next(bench.batches))
    own, base = map(median, in_turn([bench.run for bench in benches], steps))
    size, base_size = (total_bytes(bench.state.opt_state) / 2**20 for bench in benches)
    yield (
        f"{own / base - 1:+.1%} of a step with {name} instead of adamw: {1e3 * own:.1f} ms against "
        f"{1e3 * base:.1f} ms (medians of {steps}, in turn); state {size:.1f} MiB against {base_size:.1f}"
    )


def measure_loss(config: Config, rounds: int) -> Iterator[str]:
    """Yields the time and memory of GPT-2's head and loss with gradients, against optax's on all logits."""
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.local_devices()[:1])
    config, _, _ = choice.on_devices(config)
    own = CrossEntropy(Parallel(mesh), config.logits_mib)

    def plain(head, x_BLD, targets_BL, mask_BL):
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(head(x_BLD), targets_BL)
        return jnp.sum(losses_BL * mask_BL), None

    draw = np.random.default_rng(0)
    x_BLD, kernel_DV = (draw.standard_normal(shape, np.float32) for shape in ((4, 1024, 768), (768, 50304)))
    targets_BL = draw.integers(0, 50304, (4, 1024), np.int32)
    head = Head(jnp.asarray(0.02 * kernel_DV), None)
    arguments = jax.device_put((head, x_BLD, targets_BL, targets_BL >= 0), mesh.devices.flat[0])
    compiled: list[Any] = [
        jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*arguments).compile()
        for loss in (own.sums, plain)
    ]
    chunks, whole = map(median, in_turn([partial(function, *arguments) for function in compiled], rounds))
    yield f"{chunks / whole:7.2f} of the time of optax's, with gradients: {chunks:.3f} s, not {whole:.3f} s"
    less, more = (function.memory_analysis().temp_size_in_bytes / 2**20 for function in compiled)
    yield f"{less:7.0f} MiB  of temporaries, against {more:.0f}; logits_mib={config.logits_mib:g}"
