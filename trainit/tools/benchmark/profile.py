"""Finds out what takes a step's time and memory, from the compiled program and a profile of it."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from trainit.checkpoints.state import TrainState
from trainit.experiments.plan import hlo
from trainit.parallel.trees import device_bytes

LABELS = {"mlp": "MLP", "head": "head and loss"}
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_COMMUNICATION = re.compile(rf"({'|'.join(hlo.KINDS)})\b")
# Instructions that only run others, whose own times are in the profile, too.
_CONTROL = re.compile(r"(while|call|conditional|async-(start|update|done))\b")


def instructions(text: str) -> dict[str, str]:
    """Returns the part that each instruction of a compiled program (HLO) belongs to, or ""."""
    return {name: hlo.part_of(scopes) for name, scopes in _INSTRUCTION.findall(text)}


def shares(events: Iterable[tuple[str, float]], parts: Mapping[str, str]) -> dict[str, float]:
    """Returns each part's share of the time of all instructions that ran, largest first.

    Events are names and durations of what ran; names that are not among `instructions` do not count.
    """
    times: defaultdict[str, float] = defaultdict(float)
    for name, duration in events:
        if _COMMUNICATION.match(name):
            times["communication"] += duration
        elif name in parts and not _CONTROL.match(name):
            times[parts[name] or "other"] += duration
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {part: time / total for part, time in ordered} if total else {}


def profile(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Returns (name, nanoseconds) of everything that runs on this process's devices during `run`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        cpus = [plane for plane in planes if plane.name.startswith("/host:CPU")]
        lines = [line for plane in devices or cpus for line in plane.lines]
        return [(event.name, event.duration_ns) for line in lines for event in line.events]


def report(compiled: jax.stages.Compiled, run: Callable[[], object]) -> str:
    """Returns "attention 31%, MLP 40%, ...": shares of the time of a compiled step, which `run` runs once."""
    found = shares(profile(run), instructions(compiled.as_text() or ""))
    return ", ".join(f"{LABELS.get(part, part)} {share:.0%}" for part, share in found.items())


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
