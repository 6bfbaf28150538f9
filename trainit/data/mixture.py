"""Several sources of sequences as one, in exact proportions that may change during a run.

Position p of the mixture is a position in one of its sources: a pure function of p and the weights. Sources
alternate as evenly as their weights allow, with a period that has each weight exactly. Any range of rows
therefore holds each source in its proportion, up to a row.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from trainit import config as config_lib
from trainit.config import Config, ConfigError
from trainit.data import subsets
from trainit.data.dataset import Dataset, Split
from trainit.data.formats import detect
from trainit.data.order import Ordered
from trainit.data.subsets import Subset

PERIOD = 1 << 20  # rows at most; weights that need more are rounded to multiples of 1 / PERIOD


@dataclass(frozen=True)
class Stage:
    """Weights of the sources from a position on."""

    start: int  # first position
    counts: tuple[int, ...]  # of each source in a period; their sum is the period

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a period: its source, and how often that source came before in the period.

        Source k's j-th turn is due at (j + 1/2) / counts[k] of the period. Rows have that order.
        """
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts if count])
        of = np.repeat(np.arange(len(self.counts)), self.counts)
        source = of[np.argsort(due, kind="stable")].astype(np.int32)
        before = np.empty(len(source), np.int64)
        for k in range(len(self.counts)):
            own = source == k
            before[own] = np.arange(np.count_nonzero(own))
        return source, before

    def __getstate__(self) -> dict[str, Any]:
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

    def __getstate__(self) -> dict[str, Any]:
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
            rows = of == i
            number[rows], at[rows] = self.stages[i](positions[rows] - self.stages[i].start)
            at[rows] += self._used[i][number[rows]]
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


Parts = list[tuple[str, Fraction]]  # names and weights


def parse(text: str) -> list[tuple[str, Parts]]:
    """Returns `dataset.mixture` as [(from when on, [(part, weight), ...]), ...].

    Stages are separated by ";", parts by ","; a part's last word is its weight; "20%:" before a stage says
    when it begins, a duration as schedules have them.

    Raises:
        ConfigError: it has another form; the message says what is wrong.
    """
    stages = []
    for number, one in enumerate(text.split(";")):
        match = re.fullmatch(r"\s*(?:([\d.]+(?:e\d+)?\s*(?:%|tokens)?)\s*:)?(.*)", one, re.DOTALL)
        assert match is not None  # the expression fits every text
        begin, parts = match[1], []
        if (begin is None) != (number == 0):
            raise ConfigError(
                f"dataset.mixture: {one.strip()!r} must {'not ' * (number == 0)}say when it begins, as in "
                f"'web 0.9, code 0.1; 50%: web 0.5, code 0.5'"
            )
        for part in match[2].split(","):
            name, _, weight = part.strip().rpartition(" ")
            try:
                parts.append((name.strip(), Fraction(weight)))
            except (ValueError, ZeroDivisionError):
                raise ConfigError(f"dataset.mixture: {part.strip()!r} is no 'NAME WEIGHT'") from None
            if not name.strip() or parts[-1][1] < 0:
                raise ConfigError(f"dataset.mixture: {part.strip()!r} needs a name and a weight from 0 on")
        if not sum(weight for _, weight in parts):
            raise ConfigError(f"dataset.mixture: the weights of {one.strip()!r} sum to 0")
        stages.append((begin or "0", parts))
    return stages


def with_parts(dataset: Dataset, text: str, cache: Path) -> Dataset:
    """Returns the dataset with the parts of a mixture: its own subsets, and other datasets.

    Args:
        dataset: the one at `dataset.path`. Parts that other programs made have its tokenizer too.
        text: `dataset.mixture`.
        cache: folder in which the indexes of subsets are kept.

    Raises:
        ConfigError, DatasetError: a part is neither, or has another tokenizer.
        OSError: the index of a subset cannot be written.
    """
    train = dataset.splits["train"]
    names = dict.fromkeys(name for _, parts in parse(text) for name, _ in parts)
    numbers = {name: train.subsets.index(name) for name in names if name in train.subsets}
    own = subsets.open_subsets(train, numbers.values(), cache / f"subsets-{dataset.fingerprint}")
    parts: dict[str, Split | Subset] = {}
    prints = []
    for name in names:
        if name in numbers:
            parts[name] = own[numbers[name]]
        else:
            other = _open_part(name, dataset)
            parts[name] = other.splits["train"]
            prints.append(other.fingerprint)
    return dataclasses.replace(dataset, parts=parts, part_fingerprints=tuple(prints))


def _open_part(name: str, dataset: Dataset) -> Dataset:
    """Opens another dataset and checks that it has the tokenizer of this one."""
    where = f"dataset.path={str(dataset.folder)!r}"
    foreigners = detect.find(Path(name))
    if not foreigners and not Path(name).exists():
        available = ", ".join(dataset.splits["train"].subsets) or "none"
        raise ConfigError(
            f"dataset.mixture: {name!r} is neither a dataset's folder nor a subset of {where}, which has "
            f"{available}"
        )
    if foreigners:
        other = detect.open_path(name, dataset.tokenizer, str(dataset.folder))
    else:
        other = detect.open_path(name)
    theirs, ours = (d.info["tokenizer"] for d in (other, dataset))
    if theirs["sha256"] != ours["sha256"]:
        raise ConfigError(
            f"dataset.mixture: {name!r} is made with the tokenizer {theirs['name']} of hash "
            f"{theirs['sha256'][:8]}, {where} with {ours['name']} of hash {ours['sha256'][:8]}; prepare both "
            f"with one"
        )
    if "train" not in other.splits:
        raise ConfigError(f"dataset.mixture: {name!r} has no split train")
    return other


def stages(text: str, config: Mapping) -> list[tuple[int, dict[str, Fraction]]]:
    """Returns `dataset.mixture` as [(first row, {part: weight}), ...], for the batch sizes of the config."""
    result, sizes = [], config_lib.batch_sizes(config)
    for begin, parts in parse(text):
        step = sizes.duration(begin, "dataset.mixture")
        weights: dict[str, Fraction] = {}
        for name, weight in parts:
            weights[name] = weights.get(name, Fraction(0)) + weight
        result.append((sizes.rows(step), weights))
    starts = [start for start, _ in result]
    if starts != sorted(set(starts)):
        raise ConfigError(f"dataset.mixture={text!r}: its stages must begin one after another")
    return result


def check_history(config: Config, before: Mapping[str, Any], rows: int, step: int) -> None:
    """Checks that a mixture with stages continues as it was: stages begin at rows counted from the start.

    Args:
        config: resolved.
        before: the checkpoint's config, as nested dicts.
        rows: number of sequences consumed.
        step: the run's present step.

    Raises:
        ConfigError: the rows are not those of `step` steps, or stages that are over were others.
    """
    d = config.dataset
    old_text = before["dataset"].get("mixture", "")
    if not d.mixture or ";" not in d.mixture + old_text:
        return
    planned = config_lib.batch_sizes(config).rows(step)
    if rows != planned:
        raise ConfigError(
            f"dataset.mixture={d.mixture!r} changes at steps of batch_size={config.batch_size}, but at step "
            f"{step} {rows} sequences are consumed, not {planned}: give the weights that hold from here on "
            f"alone"
        )
    old = stages(old_text, {"batch_schedule": "", **before}) if old_text else []
    new = stages(d.mixture, config)
    past = [[stage for stage in of if stage[0] < rows] for of in (old, new)]
    if past[0] != past[1]:
        raise ConfigError(
            f"dataset.mixture={d.mixture!r} has another past than the checkpoint's {old_text!r} at step "
            f"{step}: leave what is over as it was, and give its ends in steps rather than in percent"
        )
