"""Which sequence stands where in the endless order of the training data, and in validation.

Each order is a function from positions, int64 (n,), to numbers of sequences; it needs no memory that
grows with the data, and any position is as quickly found as the first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Grain's public shuffle wraps this function at 16 us a record, where a batch of rows wants 3.
from grain._src.python.experimental.index_shuffle.python.index_shuffle_module import index_shuffle

from trainit.data.subsets import Subset
from trainit.data.tokens import Split

TABLE = 1 << 16  # blocks whose order is written out
Order = Callable[[np.ndarray], np.ndarray]


def _shuffled(position: int, size: int, seed: int) -> int:
    """Where `position` goes in a permutation of `size` numbers, one for each seed."""
    return index_shuffle(position, max_index=size - 1, seed=seed % 2**32, rounds=4)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, *seeds: int) -> np.ndarray:
    """A permutation written out, for sizes of which the index shuffle is slow."""
    return np.argsort(np.random.PCG64(seeds).random_raw(size), kind="stable")


@dataclass(frozen=True)
class Shuffled:
    """Every epoch is another permutation of all sequences."""

    sequences: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        n, seed = self.sequences, self.seed
        return np.array([_shuffled(p % n, n, seed + p // n) for p in positions.tolist()], np.int64)


@dataclass(frozen=True)
class Sequential:
    """As they lie on the disk, epoch after epoch."""

    sequences: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.sequences


@dataclass(frozen=True)
class Blocks:
    """Every epoch is another permutation of blocks of neighbouring sequences, each shuffled in itself.

    What stays behind the last whole block comes at the end of each epoch.
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
            number = _shuffled(number, whole, self.seed + epoch)
        return number * self.block + _permutation(size, self.seed, epoch, number)[inside]


@dataclass(frozen=True)
class Spaced:
    """`chosen` of all sequences, evenly spaced, in order, and nothing (-1) behind them."""

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
        """uint16 (n, length): the subset of each target."""
        return self.split.read_subsets(self.order(positions), length)


def make(name: str, sequences: int, block: int, seed: int) -> Order:
    """The order that `dataset.order` names.

    Args:
        name: shuffled, blocks or sequential.
        sequences: how many there are.
        block: sequences of a block, for `blocks`.
        seed: of the shuffles.
    """
    match name:
        case "shuffled":
            return Shuffled(sequences, seed)
        case "blocks":
            return Blocks(sequences, min(block, sequences), seed)
        case "sequential":
            return Sequential(sequences)
    raise ValueError(f"there is no order {name!r}")
