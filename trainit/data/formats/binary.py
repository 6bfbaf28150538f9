"""Files of bare token ids that other programs made: nanoGPT, llm.c, and Megatron, which adds an index."""

import functools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainit.data.dataset import DatasetError, MappedIds

LLM_C_HEADER = 1024  # bytes
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, ids
LLM_C_QUESTIONS = 20240522  # magic of its multiple-choice questions
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 3: "<u2", 4: "<u4", 5: "<u8", 8: "<u2"}  # code: ids, read as unsigned
WIDE = 4096  # ids at the beginning of a .bin without a header whose width is looked at
SAMPLED = 64  # sequences of a Megatron index that are looked at


class Shard(NamedTuple):
    """A file of token ids that another program made."""

    path: Path
    format: str
    tokens: int
    stored: int  # tokens of each sequence in it; 0: they differ, or there are none
    dtype: str  # of the ids in the file, read as unsigned: a negative one is beyond any vocabulary
    open: Callable[[], Any]  # gives what slices are ids of; can be pickled


def _flat(path: Path, format: str, dtype: str, offset: int = 0, stored: int = 0) -> Shard:
    """Describes a file of nothing but ids after `offset` bytes."""
    size, width = path.stat().st_size - offset, np.dtype(dtype).itemsize
    if size % width:
        raise DatasetError(f"{path} has {size} bytes of {format} ids, no multiple of the {width} of one")
    opener = functools.partial(MappedIds, str(path), dtype, offset)
    return Shard(path, format, size // width, stored, dtype, opener)


def inspect_bin(path: Path) -> list[Shard]:
    """Describes a .bin of nanoGPT or llm.c."""
    magic, version, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    if magic == LLM_C_QUESTIONS:
        raise DatasetError(f"{path} has llm.c's multiple-choice questions (magic {magic}), not a text's ids")
    if magic not in LLM_C:
        # Ids of 32 or 64 bits have upper halves of 0, which would be read as ids between the others.
        some = np.fromfile(path, "<u2", WIDE)
        if len(some) > 16 and some.any() and not some[1::2].any():
            raise DatasetError(
                f"{path} has ids of more than 16 bits without a header: write them as uint16, as nanoGPT "
                f"does, or with llm.c's header"
            )
        return [_flat(path, "nanoGPT", "<u2")]
    known, dtype = LLM_C[magic]
    if version != known:
        raise DatasetError(f"{path} has version {version} of llm.c's magic {magic}; Trainit reads {known}")
    expected, actual = LLM_C_HEADER + count * np.dtype(dtype).itemsize, path.stat().st_size
    if actual != expected:
        raise DatasetError(f"{path} has {actual} bytes, its header says {expected}; copy it again")
    return [_flat(path, "llm.c", dtype, LLM_C_HEADER)]


def parts(index: Path) -> list[Path]:
    """Returns the .bin files of a Megatron index: one, or the parts that it was cut into."""
    whole = index.with_suffix(".bin")
    if whole.exists():
        return [whole]
    part = re.compile(re.escape(index.stem) + r"-\d+-of-\d+\.bin")
    return sorted(file for file in index.parent.iterdir() if part.fullmatch(file.name))


def inspect_megatron(index: Path) -> list[Shard]:
    """Describes a Megatron pair: the index has the type of the ids and the length of each sequence."""

    def wrong(text: str) -> DatasetError:
        return DatasetError(f"{index} {text}")

    with index.open("rb") as file:
        head = file.read(len(MEGATRON) + 25)
    if head[: len(MEGATRON)] != MEGATRON or len(head) < len(MEGATRON) + 25:
        raise wrong(f"begins with {head[:9]!r} instead of {MEGATRON!r}: it is no Megatron index of today")
    version, code, count, documents = struct.unpack("<QBQQ", head[len(MEGATRON) :])
    if version != 1 or code not in MEGATRON_TYPES:
        raise wrong(
            f"has version {version} and type {code}; Trainit reads version 1 and the types of integers, "
            f"{', '.join(map(str, MEGATRON_TYPES))}"
        )
    expected, actual = len(head) + 12 * count + 8 * documents, index.stat().st_size
    if has_modes := bool(count) and actual == expected + count:  # a byte for each sequence, at the end
        modes = np.memmap(index, "u1", "r", expected, (count,))
        if modes.any():
            other = int(np.flatnonzero(modes)[0])
            raise wrong(f"has sequence {other} of mode {modes[other]}, which is no text; leave out such ones")
    if not count or (actual != expected and not has_modes):
        raise wrong(f"has {count} sequences and {actual} bytes instead of {expected}; copy it again")
    sizes = np.memmap(index, "<i4", "r", len(head), (count,))
    begins = np.memmap(index, "<i8", "r", len(head) + 4 * count, (count,))
    dtype, files = MEGATRON_TYPES[code], parts(index)
    width = np.dtype(dtype).itemsize
    expected, actual = int(begins[-1]) + int(sizes[-1]) * width, sum(part.stat().st_size for part in files)
    if begins[0] or actual != expected:
        where = f"{index.stem}.bin {'has' if len(files) == 1 else 'or its parts have'} {actual}"
        raise wrong(
            f"says that sequences lie in bytes {begins[0]} to {expected}, but {where}; copy both again"
        )
    some, stored = np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64), int(sizes[0])
    alike = (sizes[some] == stored).all() and (begins[some] == some * stored * width).all()
    return [_flat(part, "Megatron", dtype, stored=stored if alike else 0) for part in files]
