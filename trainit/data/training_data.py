"""What a run's training data is, as its config says: one dataset in some order, or a mixture."""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np

from trainit import config as config_lib
from trainit.config import Config, ConfigError
from trainit.data import loader, mixture, order, subsets
from trainit.data.dataset import Dataset
from trainit.data.formats import detect
from trainit.data.jsonl.dataset import Reader, Streamed
from trainit.data.mixture import Mixture
from trainit.data.order import Ordered

Parts = list[tuple[str, Fraction]]  # names and weights


def parse(text: str) -> list[tuple[str, Parts]]:
    """`dataset.mixture` as [(from when on, [(part, weight), ...]), ...].

    Stages are separated by ";", parts by ","; a part's last word is its weight; "20%:" before a stage says
    when it begins, a duration as schedules have them.

    Raises:
        ConfigError: it is written otherwise; the message says what is wrong.
    """
    stages = []
    for number, one in enumerate(text.split(";")):
        match = re.fullmatch(r"\s*(?:([\d.]+(?:e\d+)?\s*(?:%|tokens)?)\s*:)?(.*)", one, re.DOTALL)
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
    """The dataset, with what a mixture is made of: its own subsets, and other datasets.

    Args:
        dataset: that `dataset.path` names; parts that others made have its tokenizer.
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
    parts, prints = {}, []
    for name in names:
        if name in numbers:
            parts[name] = own[numbers[name]]
        else:
            other = _open_part(name, dataset)
            parts[name] = other.splits["train"]
            prints.append(other.fingerprint)
    return dataclasses.replace(dataset, parts=parts, part_fingerprints=tuple(prints))


def _open_part(name: str, dataset: Dataset) -> Dataset:
    """Another dataset, with the tokenizer of this one."""
    where = f"dataset.path={str(dataset.folder)!r}"
    foreigners = detect.find(Path(name))
    if not foreigners and not Path(name).exists():
        there = ", ".join(dataset.splits["train"].subsets) or "none"
        raise ConfigError(
            f"dataset.mixture: {name!r} is neither a dataset's folder nor a subset of {where}, which has "
            f"{there}"
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


def _stages(text: str, config: Mapping) -> list[tuple[int, dict[str, Fraction]]]:
    """`dataset.mixture` as [(first row, {part: weight}), ...]; the whole config says where steps begin."""
    stages, sizes = [], config_lib.batch_sizes(config)
    for begin, parts in parse(text):
        step = sizes.duration(begin, "dataset.mixture")
        weights: dict[str, Fraction] = {}
        for name, weight in parts:
            weights[name] = weights.get(name, Fraction(0)) + weight
        stages.append((sizes.rows(step), weights))
    starts = [start for start, _ in stages]
    if starts != sorted(set(starts)):
        raise ConfigError(f"dataset.mixture={text!r}: its stages must begin one after another")
    return stages


def check_history(config: Config, before: Mapping, rows: int, step: int):
    """Checks that a mixture that changes goes on as it was: its stages begin at rows counted from the start.

    Args:
        config: resolved.
        before: the checkpoint's config, as nested dicts.
        rows: consumed until now.
        step: of the run.

    Raises:
        ConfigError: the rows are not those of so many steps, or another past would have been.
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
    old = _stages(old_text, {"batch_schedule": "", **before}) if old_text else []
    new = _stages(d.mixture, config)
    past = [[stage for stage in stages if stage[0] < rows] for stages in (old, new)]
    if past[0] != past[1]:
        raise ConfigError(
            f"dataset.mixture={d.mixture!r} has another past than the checkpoint's {old_text!r} at step "
            f"{step}: leave what is over as it was, and give its ends in steps rather than in percent"
        )


def training(config: Config, dataset: Dataset) -> Ordered | Mixture:
    """The endless order of training sequences.

    Args:
        config: resolved.
        dataset: with its parts, where the config has a mixture.
    """
    length, d = config.model.context_length, config.dataset
    block = max(d.block_tokens // length, 1)

    def ordered(split, seed: int) -> Ordered:
        return Ordered(split, order.make(d.order, split.sequences(length), block, seed))

    if not d.mixture:
        return ordered(dataset.splits["train"], config.seed)
    stages = [
        mixture.stage(start, [weights.get(name, Fraction(0)) for name in dataset.parts])
        for start, weights in _stages(d.mixture, config)
    ]
    parts = [
        ordered(split, (config.seed + zlib.crc32(name.encode())) % 2**32)  # whatever parts there are beside
        for name, split in dataset.parts.items()
    ]
    return Mixture(tuple(parts), tuple(stages))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Who reads a prepared dataset's training data, as `streaming.Reader` does a streamed one's."""

    source: Ordered | Mixture
    shape: tuple[int, int, int]
    layout: jax.sharding.NamedSharding
    first_row: int
    workers: int
    prefetch: int

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        """The next `count` batches; see `loader.batches`."""
        return loader.batches(
            self.source, self.shape, self.layout, self.first_row, count, self.workers, self.prefetch
        )


def abstract_batch(
    config: Config,
    dataset: Dataset | Streamed,
    shape: tuple[int, int, int],
    layout: jax.sharding.NamedSharding,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a reader's batches are, before one is read; the arguments are those of `reader`."""
    micro_steps, rows, length = shape
    dtype = dataset.corpus.dtype if isinstance(dataset, Streamed) else training(config, dataset).dtype
    return {
        "tokens": jax.ShapeDtypeStruct((micro_steps, rows, length + 1), dtype, sharding=layout),
        "lengths": jax.ShapeDtypeStruct((micro_steps, rows), np.int32, sharding=layout),
    }


def reader(
    config: Config,
    dataset: Dataset | Streamed,
    shape: tuple[int, int, int],
    layout: jax.sharding.NamedSharding,
    first_row: int = 0,
    states: list[list[int]] | None = None,
) -> Rows | Reader:
    """Who reads a run's training data for this process.

    Args:
        config: resolved.
        dataset: that it names.
        shape: of a global batch: micro-steps G, rows of one b, L.
        layout: of arrays (G, b, ...).
        first_row: rows consumed before the first batch.
        states: of a streamed dataset's streams there; None: their beginnings.
    """
    d = config.dataset
    if isinstance(dataset, Streamed):
        return dataset.reader(shape, layout, first_row, states, d.workers, d.prefetch)
    return Rows(training(config, dataset), shape, layout, first_row, d.workers, d.prefetch)
