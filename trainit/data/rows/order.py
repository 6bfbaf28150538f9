"""Which sequence stands where in the endless order of the training data, and in validation.

Each order is a function from positions, int64 (n,), to numbers of sequences. It needs no memory that grows
with the data, and any position is computed as quickly as the first.

All shuffles are one family of permutations, `permute`: a generalized Feistel cipher on an arbitrary range
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains", method 3). Its round function is the finalizer
of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainit.data.dataset import Split, by_value
from trainit.data.documents.subsets import Subset

VERSION = 3  # of the shuffles. Checkpoints record it, since a position has no meaning in another order.
CHUNK = 4096  # neighbouring positions that are permuted together
ROUNDS = 10
SMALL, ROUNDS_OF_SMALL = 1024, 40  # a small range needs more rounds until all permutations are equally likely
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: the increment of SplitMix64
Order = Callable[[np.ndarray], np.ndarray]


def mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 numbers (n,) whose bits depend on all bits of x: SplitMix64's finalizer, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """Returns where positions (n,) go in a permutation of [0, size), as int64 (n,); size is at most 2^62.

    The integers `key`, taken modulo 2^64, select the permutation: each one for all positions, or as uint64
    (n,) one for each.
    """
    # All numbers of the key make one state, and from there SplitMix64 makes a key for each round.
    state = np.zeros(1, np.uint64)
    for number in key:
        word = number if isinstance(number, np.ndarray) else np.uint64(number % 2**64)
        state = mix((state + GOLDEN) ^ word)
    keys = []
    for _ in range(ROUNDS if size > SMALL else ROUNDS_OF_SMALL):
        state = state + GOLDEN
        keys.append(mix(state))

    # A position is a point of a grid, which has less than 2 sqrt(size) + 1 points too many. Points outside of
    # the range go through the cipher again, until they are inside (cycle walking).
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    result = _encrypt(positions.astype(np.uint64), width, height, keys)
    while (outside := np.flatnonzero(result >= size)).size:
        own = keys if len(state) == 1 else [key[outside] for key in keys]
        result[outside] = _encrypt(result[outside], width, height, own)
    return result.astype(np.int64)


def _encrypt(x: np.ndarray, width: int, height: int, keys: list[np.ndarray]) -> np.ndarray:
    """Permutes points: each round adds a hash of one coordinate to the other, and the two take turns."""
    moduli, half = (np.uint64(width), np.uint64(height)), np.uint64(32)
    first, second = np.divmod(x, moduli[1])
    for i, key in enumerate(keys):
        # A product makes the upper 32 bits of the hash a number below the modulus, faster than a division.
        modulus = moduli[i % 2]
        total = first + (((mix(second + key) >> half) * modulus) >> half)
        first, second = second, np.where(total >= modulus, total - modulus, total)
    return first * moduli[1] + second  # the number of rounds is even


@functools.lru_cache(maxsize=256)
def _chunk(number: int, size: int, *key: int) -> np.ndarray:
    """Returns where positions from number * CHUNK on go."""
    return permute(np.arange(number * CHUNK, min((number + 1) * CHUNK, size)), size, *key)


def _permute_by_chunks(positions: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Returns what `permute` returns. It is faster if following calls have neighbouring positions."""
    result = np.empty(len(positions), np.int64)
    numbers, inside = np.divmod(positions, CHUNK)
    for number, rows in by_value(numbers):
        result[rows] = _chunk(number, size, *key)[inside[rows]]
    return result


@dataclass(frozen=True)
class Shuffled:
    """Every epoch is another permutation of all sequences."""

    sequences: int
    seed: int
    part: tuple[int, ...] = ()  # numbers that tell the orders of a run apart

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        epochs, result = np.divmod(positions, self.sequences)
        for epoch, rows in by_value(epochs):
            result[rows] = _permute_by_chunks(result[rows], self.sequences, self.seed, *self.part, epoch)
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

    The rest after the last whole block comes at the end of each epoch.
    """

    sequences: int
    block: int  # sequences in a block
    seed: int
    part: tuple[int, ...] = ()

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        whole, rest = divmod(self.sequences, self.block)
        result = np.empty(len(positions), np.int64)
        epochs, inside = np.divmod(positions, self.sequences)
        turns, inside = np.divmod(inside, self.block)
        for all_turns, rows in by_value(epochs * (whole + 1) + turns):
            epoch, turn = divmod(all_turns, whole + 1)
            number, size = turn, rest
            if turn < whole:
                number = int(_permute_by_chunks(np.array([turn]), whole, self.seed, *self.part, epoch)[0])
                size = self.block
            inner = _permute_by_chunks(inside[rows], size, self.seed, *self.part, epoch, number)
            result[rows] = number * self.block + inner
        return result


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
        """Returns ids (n, length + 1) of `dtype`, and int32 (n,) how many targets each row has."""
        return self.split.read(self.order(positions), length)


def make(name: str, sequences: int, block: int, seed: int, *part: int) -> Order:
    """Returns the order that `dataset.order` names: shuffled, sequential, or blocks of `block` sequences.

    What tells a run's orders apart is not added to the seed, since the sum is another part's of another seed.
    """
    if name == "blocks":
        return Blocks(sequences, min(block, sequences), seed, part)
    return Shuffled(sequences, seed, part) if name == "shuffled" else Sequential(sequences)
