"""What devices exchange in a compiled program, read from its text.

The text is the one after XLA has split the program over the devices: what follows is the platform's own (the
CPU's then turns bfloat16 into float32). A program in it is several computations; a loop's body counts as
often as it runs. Equal collectives of a computation count once, since XLA computes equal instructions once.
"""

import functools
import itertools
import logging
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One exchange, as each device takes part in it."""

    kind: str  # of KINDS
    dtype: str  # XLA's name; several joined by +
    axes: tuple[str, ...]  # of the mesh, over which it is; ("?",) if its groups are no whole axes
    devices: int  # of a group
    size: int  # bytes of the whole arrays: as gathered, or as they are before they are reduced or scattered
    times: int  # in a run of the program
    name: str  # of the operation that it comes from

    @property
    def bytes(self) -> float:
        """Bytes that a device sends in a run of the program, and receives, if groups are rings."""
        return sent(self.kind, self.size, self.devices) * self.times


def sent(kind: str, size: float, devices: int) -> float:
    """Bytes that each device of a ring sends (Thakur, Rabenseifner & Gropp 2005).

    Args:
        kind: of KINDS.
        size: as `Collective` has it.
        devices: of the ring.
    """
    if kind == "collective-permute":
        return size
    return size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def total(collectives: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a device sends, by kind and axes."""
    sums: dict = {}
    for one in collectives:
        sums[one.kind, one.axes] = sums.get((one.kind, one.axes), 0.0) + one.bytes
    return sums


def lines(collectives: Iterable[Collective]) -> list[str]:
    """What they are and how many bytes, a line for each kind over each axes, largest first."""
    found = sorted(total(collectives).items(), key=lambda one: -one[1])
    return [
        f"{kind} over {' × '.join(axes)}: {size / 2**20:.5g} MiB a device and step"
        for (kind, axes), size in found
    ]


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and its text after partitioning; always compiled anew."""
    enabled = jax.config.jax_enable_compilation_cache
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partition|call-inliner"}
        try:  # what comes from the cache of compiled programs has no text
            _use_cache(False)
            compiled = lowered.compile(compiler_options=options)
        finally:
            _use_cache(enabled)
        first = next(Path(folder).glob("*.before_optimizations.txt")).read_text()
        if "num_partitions" not in first.partition("\n")[0]:
            return compiled, first  # a program for one device
        files = sorted(Path(folder).glob("*.spmd-partitioner.after_*.txt"))
        if not any("after_spmd-partitioning" in file.name for file in files):
            raise RuntimeError("XLA has written no partitioned program: this version names it otherwise")
        return compiled, files[-1].read_text()


def _use_cache(enabled: bool):
    jax.config.update("jax_enable_compilation_cache", enabled)
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)  # it would tell of each reset
    compilation_cache.reset_cache()  # which else remembers whether it is used


def read(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program over more than one device.

    Args:
        text: HLO; loops count from 0 up to a constant, as those of JAX's scans do.
        sizes: of the mesh's axes, in its order.

    Raises:
        ValueError: collectives in a loop that does not count so, or that are asynchronous.
    """
    computations = _computations(text)
    entry = next(name for name, lines in computations.items() if lines and lines[0] == "ENTRY")

    @functools.cache
    def collectives(name: str) -> tuple[Collective, ...]:
        found = []
        for line in _distinct(computations[name][1:]):
            _, result, operation, rest = _INSTRUCTION.match(line).groups()
            if operation in KINDS:
                found.append(_collective(operation, result, rest, sizes))
            elif operation.removesuffix("-start") in KINDS:
                raise ValueError(f"{operation}: give the text after partitioning, where none is asynchronous")
            elif operation == "while":
                body = collectives(_called(rest, "body"))
                trips = _trips(computations[_called(rest, "condition")]) if body else 0
                found += [_repeat(one, trips) for one in body]
            elif operation in ("call", "conditional"):  # of branches, all
                for called in re.findall(r"%[\w.-]+", rest[rest.index(")") :].split("metadata=")[0]):
                    found += collectives(called) if called in computations else ()
        return tuple(found)

    return [one for one in collectives(entry) if one.devices > 1]


def _computations(text: str) -> dict[str, list[str]]:
    """Each computation's lines of instructions, behind "ENTRY" or ""."""
    found, lines = {}, []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?(%[\w.-]+) .*\{$", line):
            lines = found[match[2]] = ["ENTRY" if match[1] else ""]
        elif line.startswith("  "):
            lines.append(line)
    return found


def _distinct(lines: list[str]) -> list[str]:
    """The instructions but for those that equal an earlier one; operands stand before what has them."""
    numbers: dict[str, str] = {}  # of a name: the first one of its value
    first: dict[tuple, str] = {}
    for line in lines:
        name, result, operation, rest = _INSTRUCTION.match(line).groups()
        rest = re.sub(r", (metadata=\{.*?\}|channel_id=\d+)", "", rest)
        key = result, operation, re.sub(r"%[\w.-]+", lambda found: numbers.get(found[0], found[0]), rest)
        numbers[name] = first.setdefault(key, name) if operation != "parameter" else name
    return [line for line in lines if (name := _INSTRUCTION.match(line)[1]) == numbers[name]]


def _called(rest: str, role: str) -> str:
    return re.search(rf"\b{role}=(%[\w.-]+)", rest)[1]


def _trips(condition: list[str]) -> int:
    constants = {}
    for line in condition[1:]:
        name, result, operation, rest = _INSTRUCTION.match(line).groups()
        if operation == "constant" and result in ("s32[]", "s64[]"):
            constants[name] = rest.partition(")")[0]
        elif operation == "copy":
            constants[name] = constants.get(rest.partition(")")[0], "")
        if "ROOT" in line and operation == "compare" and "direction=LT" in rest:
            bound = constants.get(re.findall(r"%[\w.-]+", rest)[1], "")
            if bound.isdigit():
                return int(bound)
    raise ValueError(f"a loop with collectives does not count up to a constant: {condition[-1].strip()}")


def _repeat(one: Collective, times: int) -> Collective:
    return Collective(**vars(one) | {"times": one.times * times})


def _collective(kind: str, result: str, rest: str, sizes: Mapping[str, int]) -> Collective:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)[1]
        groups = np.array([list(map(int, pair.split(","))) for pair in re.findall(r"[\d,]*\d", pairs)])
    else:
        groups = _groups(re.search(r"replica_groups=(.*)", rest)[1], math.prod(sizes.values()))
    arrays = _ARRAY.findall(result)
    size = sum(_width(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)
    size *= groups.shape[1] if kind == "reduce-scatter" else 1
    name = re.search(r'op_name="(.*?)"', rest)
    return Collective(
        kind,
        "+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
        _axes(groups, tuple(sizes.items())),
        groups.shape[1],
        size,
        1,
        name[1] if name else "",
    )


def _width(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1


def _groups(text: str, devices: int) -> np.ndarray:
    """Device numbers (groups, devices of a group), from any of the forms in which XLA writes them."""
    if match := re.match(r"\{(\{.*?\})\}", text):
        return np.array([list(map(int, group.split(","))) for group in re.findall(r"[\d,]*\d", match[1])])
    if match := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))
    if match := re.match(
        r"mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", text
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        order = _iota(match[2], match[3]) if match[2] else np.arange(devices)
        over = re.findall(r"'(\w+)'(?!:)", match[4])
        if len(over) == match[4].count("'") // 2:
            grid, names = order.reshape(list(axes.values())), list(axes)
            last = [names.index(name) for name in over]
            grid = np.moveaxis(grid, last, range(grid.ndim - len(last), grid.ndim))
            return grid.reshape(-1, math.prod(axes[name] for name in over))
    if text.startswith("{}"):
        return np.arange(devices)[None]
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 on in an array of this shape, transposed, in a row."""
    grid = np.arange(math.prod(map(int, dims.split(",")))).reshape(list(map(int, dims.split(","))))
    return (grid.transpose(list(map(int, order.split(",")))) if order else grid).ravel()


def _axes(groups: np.ndarray, sizes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The mesh axes that these groups of devices span."""
    return _axes_of(np.sort(groups, axis=1).tobytes(), groups.shape, groups.dtype.str, sizes)


@functools.cache
def _axes_of(data: bytes, shape: tuple[int, int], dtype: str, sizes) -> tuple[str, ...]:
    groups = {tuple(group) for group in np.frombuffer(data, dtype).reshape(shape).tolist()}
    split = [(at, name) for at, (name, size) in enumerate(sizes) if size > 1]
    grid = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    for count in range(len(split) + 1):
        for some in itertools.combinations(split, count):
            last = range(grid.ndim - count, grid.ndim)
            whole = np.moveaxis(grid, [at for at, _ in some], last)
            whole = np.sort(whole.reshape(-1, math.prod(whole.shape[at] for at in last)), axis=1)
            if {tuple(group) for group in whole.tolist()} == groups:
                return tuple(name for _, name in some)
    return ("?",)
