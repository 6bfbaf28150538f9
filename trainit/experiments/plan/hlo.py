"""Reads from a compiled program what its devices exchange.

The text is the one after XLA has partitioned the program over the devices; later passes depend on the
platform (the CPU's, for example, turns bfloat16 into float32). A program has several computations; the body
of a loop counts once for each iteration. Equal collectives of a computation count once, since XLA computes
equal instructions once.
"""

import functools
import itertools
import logging
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from trainit.config import Config
from trainit.data.training_data import abstract_batch
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape, run_shape
from trainit.train import step
from trainit.train.profiling.parts import KINDS

_NAME = re.compile(r"%[\w.-]+")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, from the view of a device that takes part in it."""

    kind: str  # one of KINDS
    dtype: str  # XLA's name; several joined by +
    axes: tuple[str, ...]  # mesh axes that the exchange spans; ("?",) if its groups are no whole axes
    devices: int  # in a group
    size: int  # bytes of the whole array: after it is gathered, or before it is reduced or scattered
    times: int  # in a run of the program

    @property
    def bytes(self) -> float:
        """Bytes that a device sends in a run of the program, and receives, if groups are rings.

        Ring algorithms as in Thakur, Rabenseifner & Gropp 2005: each device sends its share of the array to
        all others, and an all-reduce is a reduce-scatter and an all-gather.
        """
        if self.kind == "collective-permute":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return self.size * (self.devices - 1) / self.devices * passes * self.times


def total(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns the bytes that a device sends, by kind and axes."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    for one in collectives:
        sums[one.kind, one.axes] = sums.get((one.kind, one.axes), 0.0) + one.bytes
    return sums


def compile_step(
    config: Config, devices: Sequence[jax.Device]
) -> tuple[RunShape, Any, jax.stages.Compiled, str]:
    """Compiles the train step of a resolved config for these devices.

    Returns its shape, what `step.build` gives, the program, and its text after partitioning.
    """
    shape = run_shape(config, devices)
    built = step.build(config, shape)
    batch = abstract_batch(np.dtype(np.uint16), shape.batch_at(0), batch_sharding(shape.mesh))
    return shape, built, *compile_with_text(built.train.lower(built.abstract_state, batch))


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compiles a program; returns it and its text after partitioning.

    The cache of compiled programs is not used, since what comes from it has no text. Raises RuntimeError if
    this version of XLA has not written the text.
    """
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partition|call-inliner"}
        try:
            _enable_cache(False)
            compiled = lowered.compile(compiler_options={**options})
        finally:
            _enable_cache(enabled)
        first = next(Path(folder).glob("*.before_optimizations.txt")).read_text()
        if "num_partitions" not in first.partition("\n")[0]:
            return compiled, first  # a program for one device is not partitioned
        files = sorted(Path(folder).glob("*.spmd-partitioner.after_*.txt"))
        if not any("after_spmd-partitioning" in file.name for file in files):
            raise RuntimeError("XLA has written no partitioned program: this version names it otherwise")
        return compiled, files[-1].read_text()


def _enable_cache(enabled: bool):
    jax.config.update("jax_enable_compilation_cache", enabled)
    # JAX remembers whether it uses the cache until the cache is reset, and logs each reset.
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)
    compilation_cache.reset_cache()


class Instruction(NamedTuple):
    """A line of a computation."""

    root: str | None  # whether its result is the computation's
    name: str
    result: str  # its type
    operation: str
    rest: str  # operands and attributes
    scope: str  # where the program's source has it, by JAX's names

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return _NAME.findall(self.rest.partition(")")[0])

    def calls(self, attribute: str) -> str:
        """The name of the computation that it runs, by the attribute: body, calls, to_apply."""
        return match_or_raise(rf"\b{attribute}=(%[\w.-]+)", self.rest)[1]


def arrays(result: str) -> list[tuple[str, list[int]]]:
    """Returns the types and dimensions of the arrays that a type is made of."""
    return [(dtype, numbers(dims)) for dtype, dims in _ARRAY.findall(result)]


def size_of(result: str) -> int:
    """Returns the bytes of all arrays of a type. pred has 8 bits."""
    return sum(math.prod(dims) * (*numbers(dtype), 8)[0] // 8 for dtype, dims in arrays(result))


def read(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Returns all collectives of a program over more than one device, on a mesh of these sizes, in its order.

    Raises ValueError if one is asynchronous, or is in a loop that does not count from 0 up to a constant, as
    those of JAX's scans do.
    """
    program, entry = computations(text)

    @functools.cache
    def collectives(computation: str) -> tuple[Collective, ...]:
        found: list[Collective] = []
        for _, _, result, operation, rest, _ in _distinct(program[computation]):
            if operation in KINDS:
                found.append(_collective(operation, result, rest, sizes))
            elif operation.removesuffix("-start") in KINDS:
                raise ValueError(f"{operation}: give the text after partitioning, where none is asynchronous")
            elif operation == "while":
                if body := collectives(match_or_raise(r"\bbody=(%[\w.-]+)", rest)[1]):
                    count = iterations(program[match_or_raise(r"\bcondition=(%[\w.-]+)", rest)[1]])
                    found += [replace(one, times=one.times * count) for one in body]
            elif operation in ("call", "conditional"):  # the branch counts that exchanges most
                called = [name for name in _NAME.findall(rest[rest.index(")") :]) if name in program]
                found += max(
                    map(collectives, called), key=lambda each: sum(x.bytes for x in each), default=()
                )
        return tuple(found)

    return [one for one in collectives(entry) if one.devices > 1]


def match_or_raise(pattern: str | re.Pattern, text: str) -> re.Match:
    """Returns the first match. If there is none, this version of XLA writes programs in another form."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"HLO of an unknown form: {text.strip()[:80]}")
    return match


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of each computation, and the name of the one that runs first."""
    found: dict[str, list[Instruction]] = {}
    entry, instructions = "", []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?(%[\w.-]+) .*\{$", line):
            instructions = found[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith("  "):
            scope = _SCOPE.search(line)
            parts = match_or_raise(_INSTRUCTION, re.sub(r", (metadata=\{.*?\}|channel_id=\d+)", "", line))
            instructions.append(Instruction._make((*parts.groups(), scope[1] if scope else "")))
    return found, entry


def _distinct(instructions: list[Instruction]) -> list[Instruction]:
    """Returns the instructions without those that equal an earlier one. Operands come before their users."""
    representative: dict[str, str] = {}  # of each name: the first name with the same value
    first: dict[tuple, str] = {}
    distinct = []
    for one in instructions:
        rest = _NAME.sub(lambda match: representative.get(match[0], match[0]), one.rest)
        value = (one.result, one.operation, one.name if one.operation == "parameter" else rest)
        representative[one.name] = first.setdefault(value, one.name)
        if representative[one.name] == one.name:
            distinct.append(one)
    return distinct


def iterations(condition: list[Instruction]) -> int:
    """Returns how often a loop runs whose condition is i < constant, for i from 0."""
    constants: dict[str, str] = {}
    for root, name, result, operation, rest, _ in condition:
        if operation == "constant" and result in ("s32[]", "s64[]"):
            constants[name] = rest.partition(")")[0]
        elif operation == "copy":
            constants[name] = constants.get(rest.partition(")")[0], "")
        if root and operation == "compare" and "direction=LT" in rest:
            bound = constants.get(_NAME.findall(rest)[1], "")
            if bound.isdigit():
                return int(bound)
    last = " ".join(condition[-1][1:])  # the root
    raise ValueError(f"a loop with collectives does not count up to a constant: {last}")


def _collective(kind: str, result: str, rest: str, sizes: Mapping[str, int]) -> Collective:
    """Returns the collective of an instruction, which runs once."""
    groups = device_groups(rest, math.prod(sizes.values()))
    size = size_of(result)
    size *= groups.shape[1] if kind == "reduce-scatter" else 1  # its result is a part of the whole array
    dtypes = "+".join(dict.fromkeys(dtype for dtype, _ in arrays(result)))
    axes, devices = axes_of(groups, sizes), groups.shape[1]
    if kind == "collective-permute":  # pairs of source and target: along which axes they differ
        source, target = (np.array(np.unravel_index(end, tuple(sizes.values()))) for end in groups.T)
        axes = tuple(axis for axis, moves in zip(sizes, (source != target).any(1), strict=True) if moves)
        devices = math.prod(sizes[axis] for axis in axes)
    return Collective(kind, dtypes, axes, devices, size, 1)


def device_groups(rest: str, devices: int) -> np.ndarray:
    """Returns the device numbers (groups, devices of a group) of a collective, in any of XLA's forms."""
    text = match_or_raise(r"(?:replica_groups|source_target_pairs)=(.*)", rest)[1]
    if text.startswith("{}"):  # all devices
        return np.arange(devices)[None]
    if match := re.match(r"\{\{.*?\}\}", text):  # {{0,2},{1,3}}
        return np.array([numbers(group) for group in match[0].split("},{")])
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):  # [2,2]<=[2,2]T(1,0)
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))
    if match := re.match(  # mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}
        r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        order = _iota(match[2], match[3]) if match[2] else np.arange(devices)
        axes = re.findall(r"'(\w+)'(?!:)", match[4])
        if len(axes) == match[4].count("'") // 2:  # whole axes, no part of one such as 'a':(1)2
            return _along(order.reshape(list(sizes.values())), [list(sizes).index(name) for name in axes])
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns the numbers from 0 in an array of shape `dims`, transposed, then flattened: [4,2]T(1,0)."""
    shape = numbers(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return grid.transpose(numbers(order) if order else range(len(shape))).ravel()


def _along(grid: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """Returns as rows the groups of a grid's numbers that differ only in their place along `dims`."""
    moved = np.moveaxis(grid, dims, range(grid.ndim - len(dims), grid.ndim))
    return moved.reshape(-1, math.prod(grid.shape[dim] for dim in dims))


def axes_of(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes that these groups of devices span; ("?",) if they are no whole axes."""
    wanted = set(map(frozenset, groups.tolist()))
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    split = [dim for dim, size in enumerate(grid.shape) if size > 1]
    for count in range(len(split) + 1):
        for dims in itertools.combinations(split, count):
            if set(map(frozenset, _along(grid, dims).tolist())) == wanted:
                return tuple(list(sizes)[dim] for dim in dims)
    return ("?",)
