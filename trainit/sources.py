"""What a run's training data is, as its config says: one dataset in some order, or a mixture."""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import jax

from trainit import config as config_lib
from trainit.config import Config, ConfigError
from trainit.data import foreign, loader, mixture, order, subsets
from trainit.data.mixture import Mixture
from trainit.data.order import Ordered
from trainit.data.streaming import Reader, Streamed
from trainit.data.tokens import Dataset

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


def with_parts(dataset: Dataset, text: str, cache: Path, tokenizer: str = "") -> Dataset:
    """The dataset, with what a mixture is made of: its own subsets, and other datasets.

    Args:
        dataset: that `dataset.path` names.
        text: `dataset.mixture`.
        cache: folder in which the indexes of subsets are kept.
        tokenizer: `dataset.tokenizer`, of parts that others made.

    Raises:
        ConfigError, DatasetError: a part is neither, or has another tokenizer.
    """
    names = dict.fromkeys(name for _, parts in parse(text) for name, _ in parts)
    parts, prints = {}, []
    for name in names:
        if name in dataset.subsets:
            number = dataset.subsets.index(name)
            folder = cache / f"subsets-{dataset.fingerprint}"
            parts[name] = subsets.open_subset(dataset.splits["train"], number, folder)
            continue
        if not Path(name).exists():
            raise ConfigError(
                f"dataset.mixture: {name!r} is neither a dataset's folder nor a subset of "
                f"dataset.path={str(dataset.folder)!r}, which has "
                f"{', '.join(dataset.subsets) or 'none'}"
            )
        given = tokenizer if foreign.find(Path(name)) else ""
        other = foreign.open_path(name, given, str(dataset.folder) if given else "")
        theirs, ours = (d.info["tokenizer"] for d in (other, dataset))
        if theirs["sha256"] != ours["sha256"]:
            raise ConfigError(
                f"dataset.mixture: {name!r} is made with the tokenizer {theirs['name']} of hash "
                f"{theirs['sha256'][:8]}, dataset.path={str(dataset.folder)!r} with {ours['name']} of hash "
                f"{ours['sha256'][:8]}; prepare both with one"
            )
        parts[name] = other.splits["train"]
        prints.append(other.fingerprint)
    return dataclasses.replace(dataset, parts=parts, part_fingerprints=tuple(prints))


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
    names = list(dataset.parts)
    stages = []
    for begin, parts in parse(d.mixture):
        step = config_lib.duration(begin, config.steps, config.batch_size * length, "dataset.mixture")
        weights = [sum((w for name, w in parts if name == wanted), Fraction(0)) for wanted in names]
        stages.append(mixture.stage(step * config.batch_size, weights))
    starts = [stage.start for stage in stages]
    if starts != sorted(set(starts)):
        raise ConfigError(f"dataset.mixture={d.mixture!r}: its stages must begin one after another")
    return Mixture(
        tuple(ordered(split, config.seed + number) for number, split in enumerate(dataset.parts.values())),
        tuple(stages),
    )


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
