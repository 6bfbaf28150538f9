"""Finds out what takes a step's time and memory, from the compiled program and a profile of it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from trainit.checkpoints.state import TrainState
from trainit.parallel.trees import device_bytes
from trainit.train.profiling import parts


def profile(run: Callable[[], object]) -> list[parts.Event]:
    """Returns everything that runs on this process's devices during `run`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return list(parts.read(Path(folder)))


def report(compiled: jax.stages.Compiled, run: Callable[[], object]) -> str:
    """Returns "attention 31%, MLP 40%, ...": shares of the time of a compiled step, which `run` runs once."""
    return parts.describe(parts.shares(profile(run), parts.instructions(compiled.as_text() or "")))


def memory(state: TrainState, compiled: Any, forward: Any) -> dict[str, float]:
    """Returns the GiB on a device, by what they are for.

    "parameters", "optimizer" (its state) and "gradients" (as large as parameters) are exact. "temporaries"
    are those that the compiled forward pass and loss of the batch need by themselves. "activations" are the
    rest of the compiled step's peak: what is kept for the backward pass, and its own temporaries.
    """
    parameters, temporary = device_bytes(state.params), compiled.memory_analysis().temp_size_in_bytes
    workspace = min(forward.memory_analysis().temp_size_in_bytes, temporary)
    sizes = {
        "parameters": parameters,
        "optimizer": device_bytes(state.opt_state),
        "gradients": min(parameters, temporary - workspace),
        "activations": max(temporary - workspace - parameters, 0),
        "temporaries": workspace,
    }
    return {name: size / 2**30 for name, size in sizes.items()}
