"""What fills a device's memory when a run is out of it: which arrays and temporaries, and what to change.

XLA hands out a program, and how it has laid out its memory, as messages of protocol buffers, for which no
package has the types: numbers of fields below are those of xla/service/hlo.proto.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from trainit.config import Config
from trainit.parallel.trees import path_name
from trainit.train.compiled import PROGRAMS
from trainit.train.profiling.parts import LABELS, part_of

ARRAYS, TEMPORARIES = 5, 8  # that are shown
_RESULT = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\w+\[[\d,]*\])", re.MULTILINE)


class Temporary(NamedTuple):
    """An array that a program keeps for some time."""

    size: int  # in bytes, on a device
    offset: int  # in the memory of its program's temporaries
    instruction: str  # whose result it is
    scope: str  # where the program's source has it, by JAX's names


class Message:
    """The fields of a message of protocol buffers."""

    def __init__(self, content: bytes):
        self._fields: defaultdict[int, list] = defaultdict(list)
        for number, value in self._read(content):
            self._fields[number].append(value)

    @staticmethod
    def _read(content: bytes) -> Iterator[tuple[int, int | bytes]]:
        at = 0

        def integer() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte, at = content[at], at + 1
                value, shift = value | (byte & 127) << shift, shift + 7
                if byte < 128:
                    return value

        while at < len(content):
            number, kind = divmod(integer(), 8)
            if kind == 0:
                yield number, integer()
                continue
            size = integer() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, content[at : at + size]
            at += size

    def integer(self, number: int) -> int:
        return self._fields[number][-1] if self._fields[number] else 0

    def text(self, number: int) -> str:
        return self._fields[number][-1].decode() if self._fields[number] else ""

    def messages(self, number: int) -> list["Message"]:
        return [Message(content) for content in self._fields[number]]


def temporaries(compiled: jax.stages.Compiled) -> list[Temporary]:
    """Returns the largest temporaries that are in no other's place; together, they fill the memory for all.

    [] where XLA does not report how it has laid them out.
    """
    memory: Any = compiled.memory_analysis()
    executable: Any = compiled.runtime_executable()
    layout = Message(getattr(memory, "serialized_buffer_assignment_proto", b""))
    program = Message(executable.hlo_modules()[0].as_serialized_hlo_module_proto())
    instructions = {}
    for computation in program.messages(3):
        for own in computation.messages(2):
            scopes = [metadata.text(2) for metadata in own.messages(7)]
            instructions[own.integer(35)] = own.text(1), "".join(scopes)
    where = {}
    for buffer in layout.messages(1):
        (definition,) = buffer.messages(3)
        where[buffer.integer(1)] = instructions.get(definition.integer(4), ("", ""))

    # Memory of threads (3), parameters (5), results (7) and constants (12) has no temporaries.
    found = []
    for allocation in layout.messages(3):
        if not any(allocation.integer(number) for number in (3, 5, 7, 12)):
            for part in allocation.messages(9):
                found.append(Temporary(part.integer(3), part.integer(2), *where[part.integer(1)]))
    taken: list[Temporary] = []
    for each in sorted(found, reverse=True):
        if not any(each.offset < o.offset + o.size and o.offset < each.offset + each.size for o in taken):
            taken.append(each)
    return taken


def arguments(compiled: jax.stages.Compiled) -> list[tuple[int, str, str]]:
    """Returns the bytes on a device, the path and the type of each array that a program is called with."""
    infos, found = jax.tree.leaves_with_path(compiled.args_info), []
    for (path, info), sharding in zip(infos, jax.tree.leaves(compiled.input_shardings), strict=True):
        shape = sharding.shard_shape(info.shape)
        text = f"{info.dtype.name}[{','.join(map(str, shape))}]"
        found.append((math.prod(shape) * info.dtype.itemsize, path_name(path[2:]), text))
    return sorted(found, reverse=True)


def remedies(config: Config, held: int, temporary: int, largest: str) -> list[str]:
    """Returns what to change, first what helps most, by the bytes of arguments, and of temporaries.

    `largest` is the part that the largest temporary belongs to.
    """
    c = config
    step = [f"device_batch_size={c.device_batch_size} (fewer sequences at once)"]
    step += [f"model.remat={c.model.remat} (block keeps the least)"] * (c.model.remat != "block")
    step.insert(0 if largest == "head" else 2, f"logits_mib={c.logits_mib} (fewer)")
    state = [f"mesh.fsdp={c.mesh.fsdp} (more devices)"]
    state += [f"optimizer_state={c.optimizer_state} (int8)"] * (c.optimizer_state != "int8")
    return step + state if temporary > held else state + step


def describe(name: str, compiled: jax.stages.Compiled, config: Config) -> list[str]:
    """Returns one screen about a program, in GiB of a device."""
    memory: Any = compiled.memory_analysis()
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    arrays, largest = arguments(compiled), temporaries(compiled)
    groups: defaultdict[str, int] = defaultdict(int)
    for size, path, _ in arrays:
        groups[path.split("/")[0]] += size
    ordered = sorted((item for item in groups.items() if item[1] > held / 100), key=lambda item: -item[1])
    lines = [f"{_gib(held)}  held: {', '.join(f'{group} {_gib(size)}' for group, size in ordered)}"]
    lines += [f"  {_gib(size)}  {path}  {text}" for size, path, text in arrays[:ARRAYS]]

    lines.append(f"{_gib(temporary)}  temporaries of program {name}, of which the largest at once are:")
    types = dict(_RESULT.findall(compiled.as_text() or ""))
    for each in largest[:TEMPORARIES]:
        part = part_of(each.scope) or "other"
        what = f"{LABELS.get(part, part)}  {types.get(each.instruction, each.instruction)}"
        lines.append(f"  {_gib(each.size)}  {what}  {each.scope}".rstrip())
    first = part_of(largest[0].scope) if largest else ""
    return [*lines, f"change: {'; '.join(remedies(config, held, temporary, first))}"]


def explain(error: Exception, config: Config):
    """Logs what `describe` says of the largest program so far, if the error is that memory has run out."""
    if "RESOURCE_EXHAUSTED" not in str(error) or not PROGRAMS:
        return

    def size(item: tuple[str, jax.stages.Compiled]) -> int:
        memory: Any = item[1].memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    try:
        lines = describe(*max(PROGRAMS.items(), key=size), config)
        logging.error("memory     has run out; in GiB of a device:\n  %s", "\n  ".join(lines))
    except Exception as failure:  # the error itself must be reported all the same
        logging.warning("memory     has run out, and no more is known: %r", failure)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
