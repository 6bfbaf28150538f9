"""Several sources of sequences as one, in exact proportions that may change during a run.

Position p of the mixture is a position of one of its sources: a pure function of p and the weights. Sources
alternate as evenly as their weights allow, with a period that has each weight exactly, so that any thousand
batches hold each source in its proportion, to a row.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainit.data.order import Ordered

PERIOD = 1 << 20  # rows at most; weights that need more are rounded to multiples of 1 / PERIOD


@dataclass(frozen=True)
class Stage:
    """Weights of the sources from a position on."""

    start: int  # first position
    counts: tuple[int, ...]  # of each source in a period; their sum is the period

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a period: its source, and how often that source came before in it.

        Source k's j-th turn is due at (j + 1/2) / counts[k] of the period; places go by what is due.
        """
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts if count])
        of = np.repeat(np.arange(len(self.counts)), self.counts)
        source = of[np.argsort(due, kind="stable")].astype(np.int32)
        before = np.empty(len(source), np.int64)
        for k in range(len(self.counts)):
            mine = source == k
            before[mine] = np.arange(np.count_nonzero(mine))
        return source, before

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    def used(self, rows: int) -> np.ndarray:
        """Rows of each source, int64 (K,), in the first `rows` of this stage."""
        periods, rest = divmod(rows, sum(self.counts))
        partial = np.bincount(self._table[0][:rest], minlength=len(self.counts))
        return periods * np.array(self.counts, np.int64) + partial

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and its position, both (n,), of positions counted from the stage's start."""
        source, before = self._table
        periods, at = np.divmod(positions, sum(self.counts))
        number = source[at]
        return number, periods * np.array(self.counts, np.int64)[number] + before[at]


def stage(start: int, weights: Sequence[Fraction]) -> Stage:
    """A stage with these weights, of any sum."""
    shares = [weight / sum(weights) for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= PERIOD:
        return Stage(start, tuple(int(share * period) for share in shares))
    counts = [math.floor(share * PERIOD) for share in shares]
    rest = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k] * PERIOD)
    for k in rest[: PERIOD - sum(counts)]:  # those that lost most by rounding
        counts[k] += 1
    return Stage(start, tuple(counts))


@dataclass(frozen=True)
class Mixture:
    """A source like any other: `read` has the sequences at positions of its own endless order."""

    sources: tuple[Ordered, ...]
    stages: tuple[Stage, ...]  # rising, the first from 0

    @functools.cached_property
    def _used(self) -> list[np.ndarray]:
        """Rows of each source before each stage."""
        used = [np.zeros(len(self.sources), np.int64)]
        for one, following in zip(self.stages, self.stages[1:], strict=False):
            used.append(used[-1] + one.used(following.start - one.start))
        return used

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_used"}

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(source.dtype for source in self.sources))

    def where(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and position in its order, both int64 (n,), of each position of the mixture."""
        number, at = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        starts = np.array([stage.start for stage in self.stages])
        of = np.searchsorted(starts, positions, side="right") - 1
        for i in np.unique(of):
            mine = of == i
            number[mine], at[mine] = self.stages[i](positions[mine] - self.stages[i].start)
            at[mine] += self._used[i][number[mine]]
        return number, at

    def read(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Ordered.read`."""
        number, at = self.where(positions)
        parts = {int(k): self.sources[k].read(at[number == k], length) for k in np.unique(number)}
        ids = np.empty((len(positions), length + 1), self.dtype)
        lengths = np.empty(len(positions), np.int32)
        for k, part in parts.items():
            ids[number == k], lengths[number == k] = part
        return ids, lengths
