"""Where a step's time goes and what its memory is for, from the compiled program and a profile of it."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from trainit.tools.plan import hlo
from trainit.train.state import TrainState

PARTS = ("attention", "mlp", "head", "embedding", "optimizer")  # named scopes of model and step
LABELS = {"mlp": "MLP", "head": "head and loss"}
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_COMMUNICATION = re.compile(rf"({'|'.join(hlo.KINDS)})\b")
# Instructions that only run others, whose own times are there too.
_CONTROL = re.compile(r"(while|call|conditional|async-(start|update|done))\b")


def instructions(text: str) -> dict[str, str]:
    """Which part each instruction of a compiled program belongs to, "" for none.

    Args:
        text: HLO, in which instructions carry the scopes that they come from.
    """
    found = {}
    for name, scopes in _INSTRUCTION.findall(text):
        named = re.findall(rf"\b({'|'.join(PARTS)})\b", scopes)
        found[name] = named[0] if named else ""
    return found


def shares(events: Iterable[tuple[str, float]], parts: Mapping[str, str]) -> dict[str, float]:
    """Each part's share of the time of all instructions that ran, largest first.

    Args:
        events: names and durations of what ran; what is no instruction of the program does not count.
        parts: from `instructions`.
    """
    times: Counter[str] = Counter()
    for name, duration in events:
        if _COMMUNICATION.match(name):
            times["communication"] += duration
        elif name in parts and not _CONTROL.match(name):
            times[parts[name] or "other"] += duration
    total = sum(times.values())
    return {part: time / total for part, time in times.most_common()} if total else {}


def profile(run: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, nanoseconds) of all that ran on this process's devices meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        planes = [plane for plane in planes if plane.name.startswith(("/device:", "/host:CPU"))]
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        return [
            (event.name, event.duration_ns)
            for plane in devices or planes
            for line in plane.lines
            for event in line.events
        ]


def report(compiled: jax.stages.Compiled, run: Callable[[], object]) -> str:
    """A line about time: "attention 31%, MLP 40%, ..." of the instructions' time.

    Args:
        compiled: the step.
        run: runs it once.
    """
    found = shares(profile(run), instructions(compiled.as_text()))
    return ", ".join(f"{LABELS.get(part, part)} {share:.0%}" for part, share in found.items())


def memory(
    state: TrainState, compiled: jax.stages.Compiled, forward: jax.stages.Compiled
) -> dict[str, float]:
    """GiB on a device, by what they are for.

    Args:
        state: of a run; its leaves are sharded.
        compiled: the step.
        forward: the same batch's forward pass and loss alone.

    Returns:
        "parameters", "optimizer" state and "gradients" (as many as parameters) are exact. "temporaries" are
        those that the forward pass needs by itself; "activations" what the step holds beside all that at
        its fullest: what is kept for the backward pass, and its own temporaries.
    """

    def size(tree) -> int:
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    parameters, temporary = size(state.params), compiled.memory_analysis().temp_size_in_bytes
    workspace = min(forward.memory_analysis().temp_size_in_bytes, temporary)
    sizes = {
        "parameters": parameters,
        "optimizer": size(state.opt_state),
        "gradients": min(parameters, temporary - workspace),
        "activations": max(temporary - workspace - parameters, 0),
        "temporaries": workspace,
    }
    return {name: value / 2**30 for name, value in sizes.items()}
