"""Which parts of model and step the devices' time goes to, by the compiled program and a profile of it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax

PARTS = ("attention", "mlp", "head", "embedding", "optimizer")  # named scopes of model and step
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LABELS = {"mlp": "MLP", "head": "head and loss"}
_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_EXCHANGE = re.compile(rf"({'|'.join(KINDS)})\b")
# Instructions that only run others, whose own times are in the profile, too.
_CONTROL = re.compile(r"(while|call|conditional|async-(start|update|done))\b")

Event = tuple[str, str, float, float]  # device, name, start, end, in ns, of what ran


def part_of(scope: str) -> str:
    """Returns the part of model and step that a scope is in, or ""."""
    return (_PART.findall(scope) or [""])[0]


def instructions(text: str) -> dict[str, str]:
    """Returns the part that each instruction of a compiled program (HLO) belongs to, or ""."""
    return {name: part_of(scopes) for name, scopes in _INSTRUCTION.findall(text)}


def read(folder: Path) -> Iterator[Event]:
    """Yields what ran on this process's devices, from the newest profile in a folder."""
    file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for event in (event for line in plane.lines for event in line.events):
            # A CPU's threads also have events of the host, and a GPU's kernels names of their own.
            about = dict(event.stats)
            device = f"{plane.name} {about.get('device_ordinal', '')}"
            yield device, str(about.get("hlo_op", event.name)), event.start_ns, event.end_ns


def shares(events: Iterable[Event], parts: Mapping[str, str]) -> dict[str, float]:
    """Returns each part's share of the time of all instructions that ran, largest first, and then "idle".

    Instructions that are not among `instructions` do not count. Idle is the share of the time, from the first
    to the last of them, in which a device runs none: the mean over devices. The others share the rest.
    """
    times: defaultdict[str, float] = defaultdict(float)
    spans: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for device, name, start, end in events:
        exchange = _EXCHANGE.match(name)
        if (name in parts or exchange) and not _CONTROL.match(name):
            times["exchanges" if exchange else parts[name] or "other"] += end - start
            spans[device].append((start, end))
    total, idle = sum(times.values()), [_idle(each) for each in spans.values()]
    if not total:
        return {}
    rest = sum(idle) / len(idle)
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {part: (1 - rest) * time / total for part, time in ordered} | {"idle": rest}


def _idle(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers."""
    spans = sorted(spans)
    begin = until = spans[0][0]
    gaps = 0.0
    for start, end in spans:
        gaps += max(start - until, 0)
        until = max(until, end)
    return gaps / max(until - begin, 1e-9)


def describe(found: Mapping[str, float]) -> str:
    """Returns "attention 31%, MLP 40%, ...": shares in words."""
    return ", ".join(f"{LABELS.get(part, part)} {share:.0%}" for part, share in found.items())
