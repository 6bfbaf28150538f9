"""Several sources of sequences as one, in exact proportions that may change during a run.

Position p of the mixture is a position in one of its sources: a pure function of p and the weights. Sources
alternate as evenly as their weights allow, with a period that has each weight exactly. Any range of rows
therefore holds each source in its proportion, up to a row.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from trainit.config import BatchSizes, ConfigError, batch_sizes
from trainit.data.dataset import CHAT, Dataset, PickledFields, by_value
from trainit.data.documents import subsets
from trainit.data.formats import detect
from trainit.data.rows.order import Ordered

PERIOD = 1 << 20  # rows at most; weights that need more are rounded to multiples of 1 / PERIOD


@dataclass(frozen=True)
class Stage(PickledFields):
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
        for _, rows in by_value(source):
            before[rows] = np.arange(len(rows))
        return source, before

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
class Mixture(PickledFields):
    """A source like any other: `read` has the sequences at positions of its own endless order."""

    sources: tuple[Ordered, ...]
    stages: tuple[Stage, ...]  # rising, the first from 0

    @functools.cached_property
    def _used(self) -> list[np.ndarray]:
        """Rows of each source before each stage."""
        used = [np.zeros(len(self.sources), np.int64)]
        for one, following in itertools.pairwise(self.stages):
            used.append(used[-1] + one.used(following.start - one.start))
        return used

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(source.dtype for source in self.sources))

    def where(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and position in its order, both int64 (n,), of each position of the mixture."""
        number, at = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        starts = np.array([stage.start for stage in self.stages])
        for i, rows in by_value(np.searchsorted(starts, positions, side="right") - 1):
            number[rows], at[rows] = self.stages[i](positions[rows] - self.stages[i].start)
            at[rows] += self._used[i][number[rows]]
        return number, at

    def read(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Ordered.read`."""
        ids = np.empty((len(positions), length + 1), self.dtype)
        lengths = np.empty(len(positions), np.int32)
        number, at = self.where(positions)
        for k, rows in by_value(number):
            ids[rows], lengths[rows] = self.sources[k].read(at[rows], length)
        return ids, lengths


def parse(text: str) -> list[tuple[str, dict[str, Fraction]]]:
    """Returns `dataset.mixture` as [(from when on, {part: weight}), ...].

    Stages are separated by ";", parts by ","; a part's last word is its weight; "20%:" before a stage says
    when it begins, a duration as schedules have them. Raises ConfigError if the text has another form.
    """
    stages = []
    for number, one in enumerate(text.split(";")):
        match = re.fullmatch(r"\s*(?:([\d.]+(?:e\d+)?\s*(?:%|tokens)?)\s*:)?(.*)", one, re.DOTALL)
        assert match is not None  # the expression fits every text
        begin, weights = match[1], dict[str, Fraction]()
        if (begin is None) != (number == 0):
            raise ConfigError(
                f"dataset.mixture: {one.strip()!r} must {'not ' * (number == 0)}say when it begins, as in "
                f"'web 0.9, code 0.1; 50%: web 0.5, code 0.5'"
            )
        for part in match[2].split(","):
            name, _, share = map(str.strip, part.strip().rpartition(" "))
            try:
                weight = Fraction("" if re.search(r"e[+-]?\d{3}", share.lower()) else share)
            except (ValueError, ZeroDivisionError):
                raise ConfigError(f"dataset.mixture: {part.strip()!r} is no 'NAME WEIGHT'") from None
            if not name or weight < 0:
                raise ConfigError(f"dataset.mixture: {part.strip()!r} needs a name and a weight from 0 on")
            weights[name] = weights.get(name, Fraction(0)) + weight
        if not sum(weights.values()):
            raise ConfigError(f"dataset.mixture: the weights of {one.strip()!r} sum to 0")
        stages.append((begin or "0", weights))
    return stages


def with_parts(dataset: Dataset, text: str, cache: Path) -> Dataset:
    """Returns the dataset with the parts of the mixture `text`: its own subsets, and other datasets.

    Parts that other programs made have its tokenizer too. The folder `cache` keeps the indexes of subsets.
    Raises ConfigError if a part is neither or has another tokenizer, OSError if an index cannot be written.
    """
    train = dataset.splits["train"]
    names = dict.fromkeys(name for _, weights in parse(text) for name in weights)
    numbers = {name: train.subsets.index(name) for name in names if name in train.subsets}
    own = subsets.open_subsets(train, numbers.values(), cache / f"subsets-{dataset.fingerprint}")
    others = {name: _open_part(name, dataset) for name in names if name not in numbers}
    parts = {n: own[numbers[n]] if n in numbers else others[n].splits["train"] for n in names}
    inputs = dataset.inputs | {f"part {n}": other.inputs.get("train", []) for n, other in others.items()}
    return dataclasses.replace(dataset, parts=parts, others=tuple(others.values()), inputs=inputs)


def _open_part(name: str, dataset: Dataset) -> Dataset:
    """Opens another dataset and checks that it has the tokenizer of this one."""
    where = f"dataset.path={str(dataset.folder)!r}"
    foreigners = detect.find(Path(name))
    if not foreigners and not Path(name).exists():
        available = ", ".join(filter(None, dataset.splits["train"].subsets)) or "none"
        known = f"a dataset's folder nor a subset of {where}, which has {available}"
        raise ConfigError(f"dataset.mixture: {name!r} is neither {known}")
    other = detect.open_path(name, *((dataset.tokenizer, str(dataset.folder)) if foreigners else ()))
    theirs, ours = (d.info["tokenizer"] for d in (other, dataset))
    if theirs["sha256"] != ours["sha256"]:
        raise ConfigError(
            f"dataset.mixture: {name!r} is made with the tokenizer {theirs['name']} of hash "
            f"{theirs['sha256'][:8]}, {where} with {ours['name']} of hash {ours['sha256'][:8]}; prepare both "
            f"with one"
        )
    if other.info["format"] == CHAT != dataset.info["format"]:
        raise ConfigError(f"dataset.mixture: {name!r} has conversations, {where} texts: exchange the two")
    if "train" not in other.splits:
        raise ConfigError(f"dataset.mixture: {name!r} has no split train")
    return other


def stages(text: str, sizes: BatchSizes) -> list[tuple[int, dict[str, Fraction]]]:
    """Returns `dataset.mixture` as [(first row, {part: weight}), ...] of a run with these batch sizes."""
    result = [
        (sizes.rows(sizes.duration(begin, "dataset.mixture")), weights) for begin, weights in parse(text)
    ]
    if any(row >= following for (row, _), (following, _) in itertools.pairwise(result)):
        raise ConfigError(f"dataset.mixture={text!r}: its stages must begin one after another")
    return result


def check_history(text: str, sizes: BatchSizes, before: Mapping[str, Any], rows: int, step: int) -> None:
    """Checks that a mixture with stages continues as it was, at `step`, with `rows` sequences consumed.

    `before` is the checkpoint's config, as nested dicts. Raises ConfigError if the rows are not those of
    `step` steps, since stages begin at rows counted from the start, or if stages that are over were others.
    """
    old_text = before["dataset"].get("mixture", "")
    if not text or ";" not in text + old_text:
        return
    planned = sizes.rows(step)
    if rows != planned:
        raise ConfigError(
            f"dataset.mixture={text!r} changes at steps of batch_size={sizes.sizes[0]}, but at step {step} "
            f"{rows} sequences are consumed, not {planned}: give the weights that hold from here on alone"
        )
    old = stages(old_text, batch_sizes({"batch_schedule": "", **before})) if old_text else []
    past = [[stage for stage in of if stage[0] < rows] for of in (old, stages(text, sizes))]
    if past[0] != past[1]:
        raise ConfigError(
            f"dataset.mixture={text!r} has another past than the checkpoint's {old_text!r} at step {step}: "
            f"leave what is over as it was, and give its ends in steps rather than in percent"
        )
