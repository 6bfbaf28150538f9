"""One subset of a prepared dataset: its documents, end to end, as a split of their own.

Where they lie is an index of two files of uint64 in a cache folder, made on first use and mapped, so that
memory does not grow with the data:

    SPLIT-NUMBER.starts   where in the split each of the subset's documents starts
    SPLIT-NUMBER.ends     how many of the subset's tokens there are up to each one's end
"""

import contextlib
import fcntl
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainit.data.dataset import DatasetError, PickledFields, Split, pieces


@dataclass(frozen=True)
class Subset(PickledFields):
    """The tokens of one subset."""

    split: Split
    index: str  # path of the index, without its suffix
    tokens: int

    @property
    def dtype(self) -> str:
        return self.split.dtype

    def sequences(self, length: int) -> int:
        """How many sequences of `length` targets cover the subset."""
        return -(-(self.tokens - 1) // length)

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        starts, ends = (np.memmap(f"{self.index}.{part}", "<u8", "r") for part in ("starts", "ends"))
        return starts.view(np.ndarray), ends.view(np.ndarray)

    def read(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Split.read`."""
        starts, ends = self._index
        ids = np.zeros((len(sequences), length + 1), self.dtype)
        lengths = np.zeros(len(sequences), np.int32)
        for row, sequence in enumerate(np.asarray(sequences).tolist()):
            if sequence < 0:
                continue
            begin, filled = sequence * length, 0
            for document, first, last in pieces(ends, begin, min(begin + length + 1, self.tokens)):
                self.split.copy(ids[row, filled : filled + last - first], int(starts[document]) + first)
                filled += last - first
            lengths[row] = filled - 1
        return ids, lengths


def open_subsets(split: Split, numbers: Iterable[int], folder: Path) -> dict[int, Subset]:
    """The subsets with these numbers, their indexes made in one pass where they are missing.

    Of processes that come at the same time one makes them, and the others wait for it. Raises DatasetError if
    a subset has fewer than two tokens, OSError if the folder cannot be written.
    """
    indexes = {number: folder / f"{split.name}-{number}" for number in numbers}
    if _missing(indexes):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_indexes(split, _missing(indexes))
    found = {}
    for number, index in indexes.items():
        ends = index.with_suffix(".ends")
        tokens = int(np.memmap(ends, "<u8", "r")[-1]) if ends.stat().st_size else 0
        if tokens < 2:
            few = f"the subset {split.subsets[number]!r} of split {split.name} has {tokens} tokens"
            raise DatasetError(f"{few}; leave it out of the mixture")
        found[number] = Subset(split, str(index), tokens)
    return found


def _missing(indexes: dict[int, Path]) -> dict[int, Path]:
    return {n: index for n, index in indexes.items() if not index.with_suffix(".ends").exists()}


def _make_indexes(split: Split, indexes: dict[int, Path]) -> None:
    """Writes the two files of each, the ends last."""
    totals, offset = dict.fromkeys(indexes, 0), 0
    with contextlib.ExitStack() as stack:
        files = {
            (number, part): stack.enter_context(index.with_suffix(f".{part}-unfinished").open("wb"))
            for number, index in indexes.items()
            for part in ("starts", "ends")
        }
        for shard, size in enumerate(split.sizes):
            starts, _, of = split.documents(shard)
            lengths = np.diff(np.append(starts, size))
            for number in indexes:
                own = of == number
                ends = np.cumsum(lengths[own]) + totals[number]
                for part, places in (("starts", starts[own] + offset), ("ends", ends)):
                    files[number, part].write(places.astype("<u8").tobytes())
                totals[number] += int(lengths[own].sum())
            offset += size
    for index in indexes.values():
        for part in ("starts", "ends"):
            index.with_suffix(f".{part}-unfinished").rename(index.with_suffix(f".{part}"))
