"""Which sequence stands where in the endless order of the training data, and in validation.

Each order is a function from positions, int64 (n,), to numbers of sequences; it needs no memory that
grows with the data, and any position is as quickly found as the first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainit.data.dataset import Split
from trainit.data.permutation import permute
from trainit.data.subsets import Subset

TABLE = 1 << 16  # blocks whose order is written out
CHUNK = 4096  # positions that are shuffled at once
Order = Callable[[np.ndarray], np.ndarray]


@functools.lru_cache(maxsize=256)
def _shuffled(size: int, seed: int, chunk: int) -> np.ndarray:
    """Where positions from chunk * CHUNK on go in a permutation of `size` numbers, one for each seed."""
    return permute(np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, size)), size, seed)


@functools.lru_cache(maxsize=128)
def _permutation(size: int, *seeds: int) -> np.ndarray:
    """A permutation written out, for sizes of which the index shuffle is slow."""
    return np.argsort(np.random.PCG64(seeds).random_raw(size), kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class Shuffled:
    """Every epoch is another permutation of all sequences."""

    sequences: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        n, result = self.sequences, np.empty(len(positions), np.int64)
        epochs, inside = np.divmod(positions, n)
        chunks, at = np.divmod(inside, CHUNK)
        done = 0
        while done < len(positions):  # run by run of positions in one chunk
            epoch, chunk = int(epochs[done]), int(chunks[done])
            run = (epochs[done:] == epoch) & (chunks[done:] == chunk)
            end = len(positions) if run.all() else done + int(np.argmin(run))
            result[done:end] = _shuffled(n, self.seed + epoch, chunk)[at[done:end]]
            done = end
        return result


@dataclass(frozen=True)
class Sequential:
    """As they lie on the disk, epoch after epoch."""

    sequences: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.sequences


@dataclass(frozen=True)
class Blocks:
    """Every epoch is another permutation of blocks of neighbouring sequences, each shuffled in itself.

    What remains after the last whole block comes at the end of each epoch.
    """

    sequences: int
    block: int  # sequences of a block
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return np.array([self._one(p) for p in positions.tolist()], np.int64)

    def _one(self, position: int) -> int:
        epoch, at = divmod(position, self.sequences)
        number, inside = divmod(at, self.block)
        whole = self.sequences // self.block
        size = self.block if number < whole else self.sequences - whole * self.block
        if number < whole <= TABLE:
            number = int(_permutation(whole, self.seed, epoch)[number])
        elif number < whole:
            number = int(_shuffled(whole, self.seed + epoch, number // CHUNK)[number % CHUNK])
        return number * self.block + int(_permutation(size, self.seed, epoch, number)[inside])


@dataclass(frozen=True)
class Spaced:
    """`chosen` of all sequences, evenly spaced, in order, and nothing (-1) after them."""

    sequences: int
    chosen: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return np.where(positions < self.chosen, positions * self.sequences // self.chosen, -1)


@dataclass(frozen=True)
class Ordered:
    """One split in one order."""

    split: Split | Subset
    order: Order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.split.dtype)

    def read(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n, length + 1) of `dtype`, and int32 (n,) how many targets each row has."""
        return self.split.read(self.order(positions), length)

    def read_subsets(self, positions: np.ndarray, length: int) -> np.ndarray:
        """Returns uint16 (n, length): the subset of each target."""
        assert isinstance(self.split, Split)  # a subset has only one
        return self.split.read_subsets(self.order(positions), length)


def make(name: str, sequences: int, block: int, seed: int) -> Order:
    """The order that `dataset.order` names.

    Args:
        name: shuffled, blocks or sequential.
        sequences: how many there are.
        block: sequences of a block, for `blocks`.
        seed: the seed of the shuffles.
    """
    match name:
        case "shuffled":
            return Shuffled(sequences, seed)
        case "blocks":
            return Blocks(sequences, min(block, sequences), seed)
        case "sequential":
            return Sequential(sequences)
    raise ValueError(f"there is no order {name!r}")
