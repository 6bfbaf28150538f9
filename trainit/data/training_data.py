"""What a run trains on: the interface that training uses, and its form for tokens that lie on the disk.

JSON lines that are tokenized while a run trains (`jsonl.dataset.StreamedData`) have the same interface, and
nothing outside of trainit/data has to know which of them it has.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from trainit.cluster.logs import quantity
from trainit.config import BatchSizes, Config, ConfigError, batch_sizes, require
from trainit.data import loader
from trainit.data.dataset import CHAT, Dataset, Split, find_tokenizer
from trainit.data.documents.subsets import Subset
from trainit.data.documents.targets import Targets
from trainit.data.formats import detect
from trainit.data.formats.mapped import MappedIds
from trainit.data.jsonl import dataset as jsonl
from trainit.data.loader import START, DataPosition, Shape
from trainit.data.rows import mixture, order
from trainit.data.rows.mixture import Mixture
from trainit.data.rows.order import Ordered, Spaced
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.chat.marks import END


class BatchReader(Protocol):
    """Reads one process's share of batch after batch, from a position on."""

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        """Yields the next `count` global batches: {"tokens": (G, b, L + 1) ids, "lengths": (G, b) int32}.

        Raises DatasetError, BrokenInputError or OSError if the data cannot be read, RuntimeError if a worker
        process died.
        """

    def position(self, rows: int) -> DataPosition:
        """Returns the position after `rows` consumed rows, near those last read. All processes call it."""


class TrainingData(Protocol):
    """What a run trains on and validates with, as its config says."""

    @property
    def source(self) -> str:
        """Where the data lie, for people."""

    @property
    def validation(self) -> Split:
        """The split to validate with."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all of the data."""

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids in batches."""

    @property
    def identity(self) -> dict[str, Any]:
        """For `documents.inputs.changes`: "dataset", the same for the same tokens in order, and "inputs"."""

    @property
    def digests(self) -> dict[Path, str]:
        """The SHA-256 of the files that Trainit has prepared, to be compared while a run trains."""

    def describe(self) -> str:
        """Returns how much there is to train on, and in which form, on one line."""

    def reader(
        self, shape: Shape, layout: jax.sharding.NamedSharding, position: DataPosition = START
    ) -> BatchReader:
        """Returns what reads this process's rows of batches of this shape, after `position`.

        The batches before may have had another shape. `layout` may split the second axis only.
        """

    def check_resume(self, before: Mapping[str, Any], position: DataPosition, step: int) -> None:
        """Checks that this data continues, at `position` and `step`, as that of a checkpoint would have.

        `before` is the checkpoint's config, as nested dicts. Raises ConfigError if batches that are already
        trained on would have been others.
        """


@dataclasses.dataclass(frozen=True)
class PreparedReader:
    """Reads batches of prepared data from a row on; a `BatchReader`."""

    data: "PreparedData"
    shape: Shape
    layout: jax.sharding.NamedSharding
    first_row: int

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        rows, d = self.data.rows, self.data.config.dataset
        return loader.batches(rows, self.shape, self.layout, self.first_row, count, d.workers, d.prefetch)

    def position(self, rows: int) -> DataPosition:
        return DataPosition(rows)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Token ids on the disk, as one dataset in some order or a mixture; a `TrainingData`."""

    config: Config  # the run's, resolved
    dataset: Dataset  # with its parts, if the config has a mixture

    @property
    def source(self) -> str:
        return str(self.dataset.folder)

    @property
    def validation(self) -> Split:
        return self.dataset.splits["validation"]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.dataset.tokenizer

    @property
    def dtype(self) -> np.dtype:
        return self.rows.dtype

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset": self.dataset.fingerprint, "inputs": self.dataset.inputs}

    @property
    def digests(self) -> dict[Path, str]:
        return self.dataset.digests

    @functools.cached_property
    def batch_sizes(self) -> BatchSizes:
        return batch_sizes(self.config)

    @functools.cached_property
    def rows(self) -> Ordered | Mixture:
        """The endless order of training sequences."""
        c, d = self.config, self.config.dataset
        length = c.model.context_length
        block = max(d.block_tokens // length, 1)

        def ordered(split: Split | Subset, *part: int) -> Ordered:
            return Ordered(split, order.make(d.order, split.sequences(length), block, c.seed, *part))

        if not d.mixture:
            return ordered(self.dataset.splits["train"])
        stages = [
            mixture.stage(start, [weights.get(name, Fraction(0)) for name in self.dataset.parts])
            for start, weights in mixture.stages(d.mixture, self.batch_sizes)
        ]
        # A part's order depends on its name, so that it stays when other parts come or go.
        parts = self.dataset.parts.items()
        sources = (ordered(split, zlib.crc32(name.encode())) for name, split in parts)
        return Mixture(tuple(sources), tuple(stages))

    def describe(self) -> str:
        layout = self.dataset.layout(self.config.model.context_length)
        return f"{layout}, {quantity(self.dataset.splits['train'].tokens)} tokens"

    def reader(
        self, shape: Shape, layout: jax.sharding.NamedSharding, position: DataPosition = START
    ) -> PreparedReader:
        return PreparedReader(self, shape, layout, position.rows)

    def check_resume(self, before: Mapping[str, Any], position: DataPosition, step: int) -> None:
        text = self.config.dataset.mixture
        mixture.check_history(text, self.batch_sizes, before, position.rows, step)


def abstract_batch(
    dtype: np.dtype, shape: Shape, layout: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of the batches that a `reader` of such ids gives."""
    micro_steps, rows, length = shape
    return {
        "tokens": jax.ShapeDtypeStruct((micro_steps, rows, length + 1), dtype, sharding=layout),
        "lengths": jax.ShapeDtypeStruct((micro_steps, rows), np.int32, sharding=layout),
    }


def validation_batches(
    split: Split,
    sequences: int,
    first: bool,
    shape: Shape,
    layout: jax.sharding.NamedSharding,
    targets: Targets | None,
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches of always the same sequences, evenly spaced over the split or its first; 0 are all.

    The shape is (1, rows, L); the last batch is filled up with rows of length 0. See `loader.batches`.
    """
    available = split.sequences(shape[2])
    chosen = min(sequences or available, available)
    rows = Ordered(split, Spaced(chosen if first else available, chosen))
    return loader.batches(rows, shape, layout, count=-(-chosen // shape[1]), targets=targets)


def read(
    config: Any, path: str, resolve: Callable[[Any, int, int], Config], cache: Path
) -> tuple[Config, TrainingData]:
    """Opens the data that a config names, and completes the config with what the data decide.

    The data lie at `path`, which is `dataset.path` or what that stands for. `resolve` is called with the
    unresolved config, the vocabulary's size and the end-of-text id. The folder `cache` keeps the indexes of
    subsets. Raises ConfigError (or DatasetError, which is one) if config or data cannot work.
    """
    d = config.dataset
    if "streams" in d:
        tokenizer = find_tokenizer(d.tokenizer, d.end_of_text)
        if jsonl.is_chat(d):
            config.model.update(document_mask=True, end_of_text=END)
        resolved = resolve(config, tokenizer.vocab_size, tokenizer.end_of_text)
        length, sequences = resolved.model.context_length, resolved.eval.sequences
        streamed = jsonl.open_files(resolved.dataset, tokenizer, resolved.seed, length, sequences)
        _check_size(f"dataset.validation_path={d.validation_path!r}", streamed.validation)
        return resolved, streamed

    try:
        dataset = detect.open_path(path, d.tokenizer, d.validation_path, d.end_of_text)
    except OSError as error:
        raise ConfigError(f"dataset.path={d.path!r} cannot be used: {error}") from None
    for name in ("train", "validation"):
        _check_size(f"dataset.path={d.path!r}: split {name}", dataset.splits.get(name))
    if dataset.info["format"] == CHAT:
        config.model.update(document_mask=True, end_of_text=END)
    resolved = resolve(config, dataset.vocab_size, dataset.tokenizer.end_of_text)
    if d.mixture:
        try:
            dataset = mixture.with_parts(dataset, d.mixture, cache)
        except OSError as error:
            where = f"dataset.mixture={d.mixture!r}: the cache {cache}"
            raise ConfigError(f"{where}: {error}; TRAINIT_CACHE= names another") from None
    if d.whole_batches:
        dataset = _of_whole_batches(dataset, resolved)
    data = PreparedData(resolved, dataset)
    _ = data.rows  # reports errors in the mixture before any device is used
    return resolved, data


def _of_whole_batches(dataset: Dataset, config: Config) -> Dataset:
    """The dataset without what each shard to train on has more than whole batches."""
    tokens, name = config.batch_size * config.model.context_length, "dataset.whole_batches=True"
    train = dataset.splits["train"].whole_batches(tokens)
    require(isinstance(train.shards[0], MappedIds), f"{name} needs files of ids alone, such as .bin")
    least = f"a batch of batch_size={config.batch_size} takes {tokens + 2} ids of one shard"
    require(train.tokens > 0, f"{name}: {least}, the largest has {max(dataset.splits['train'].sizes)}")
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})


def _check_size(name: str, split: Split | None) -> None:
    if split is None or split.tokens < 2 or split.bytes == 0:
        size = f"{split.tokens} tokens" if split else "nothing"
        size += f" of {split.bytes} bytes" if split and split.bytes is not None else ""
        raise ConfigError(f"{name} has {size}; it needs 2 tokens of some text")
