"""One subset of a prepared dataset: its documents, end to end, as a split of their own.

Where they lie is an index of two files of uint64 in a cache folder, made on first use and mapped, so that
memory does not grow with the data:

    SPLIT-NUMBER.starts   where in the split each of the subset's documents starts
    SPLIT-NUMBER.ends     how many of the subset's tokens there are up to each one's end
"""

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainit.data.tokens import DatasetError, Split


@dataclass(frozen=True)
class Subset:
    """The tokens of one subset; as `Split`, it is cheap to pickle."""

    split: Split
    index: str  # path of the index, without its suffix
    tokens: int

    @property
    def dtype(self) -> str:
        return self.split.dtype

    def sequences(self, length: int) -> int:
        """How many sequences of `length` targets cover the subset."""
        return -(-(self.tokens - 1) // length)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_index"}

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.memmap(f"{self.index}.{part}", "<u8", "r") for part in ("starts", "ends"))

    def read(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Split.read`."""
        starts, ends = self._index
        ids = np.zeros((len(sequences), length + 1), self.dtype)
        lengths = np.zeros(len(sequences), np.int32)
        for row, sequence in enumerate(np.asarray(sequences).tolist()):
            begin = sequence * length
            wanted, filled = min(length + 1, self.tokens - begin) if sequence >= 0 else 0, 0
            document = int(np.searchsorted(ends, begin, side="right"))
            while filled < wanted:
                size = (
                    int(starts[document]),
                    int(ends[document]) - (int(ends[document - 1]) if document else 0),
                )
                inside = size[1] - (int(ends[document]) - begin - filled)
                count = min(size[1] - inside, wanted - filled)
                self.split.copy(ids[row, filled : filled + count], size[0] + inside)
                filled, document = filled + count, document + 1
            lengths[row] = max(wanted - 1, 0)
        return ids, lengths


def open_subset(split: Split, number: int, folder: Path) -> Subset:
    """The subset with this number, its index made where it is missing.

    Raises:
        DatasetError: it has fewer than two tokens in the split.
    """
    index = folder / f"{split.name}-{number}"
    ends = index.with_name(f"{index.name}.ends")
    if not ends.exists():
        _make_index(split, number, index)
    tokens = int(np.memmap(ends, "<u8", "r")[-1]) if ends.stat().st_size else 0
    if tokens < 2:
        raise DatasetError(
            f"subset {number} of split {split.name} has {tokens} tokens; leave it out of the mixture"
        )
    return Subset(split, str(index), tokens)


def _make_index(split: Split, number: int, index: Path):
    """Writes the two files; who makes them at the same time writes the same, and the last rename counts."""
    index.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{socket.gethostname()}-{os.getpid()}"
    paths = {part: index.with_name(f"{index.name}.{part}") for part in ("starts", "ends")}
    total, offset = 0, 0
    with (
        paths["starts"].with_suffix(mine).open("wb") as starts_file,
        paths["ends"].with_suffix(mine + "-ends").open("wb") as ends_file,
    ):
        for shard in range(len(split.paths)):
            starts, numbers = split.documents(shard)
            lengths = np.diff(np.append(starts, split.sizes[shard]))[numbers == number]
            (starts[numbers == number] + offset).astype("<u8").tofile(starts_file)
            (np.cumsum(lengths) + total).astype("<u8").tofile(ends_file)
            total, offset = total + int(lengths.sum()), offset + split.sizes[shard]
    paths["starts"].with_suffix(mine).rename(paths["starts"])
    paths["ends"].with_suffix(mine + "-ends").rename(paths["ends"])
