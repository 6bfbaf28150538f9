"""What a run trains on: the interface that training uses, and prepared data, which implement it.

A run trains on tokens that lie on the disk (`PreparedData`: one dataset in some order, or a mixture), or on
JSON lines that are tokenized while it trains (`jsonl.dataset.StreamedData`). Both are a `TrainingData`, and
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

from trainit.config import Config, ConfigError
from trainit.data import loader, mixture, order
from trainit.data.dataset import Dataset, Split
from trainit.data.formats import detect
from trainit.data.jsonl import dataset as jsonl
from trainit.data.loader import START, DataPosition
from trainit.data.mixture import Mixture
from trainit.data.order import Ordered, Spaced
from trainit.data.subsets import Subset
from trainit.data.tokenizers import Tokenizer
from trainit.logs import quantity

Shape = tuple[int, int, int]  # of a global batch: micro-steps G, rows of a micro-step B, length L


class BatchReader(Protocol):
    """Reads one process's share of batch after batch, from a position on."""

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        """Yields the next `count` batches: {"tokens": (G, b, L + 1) ids, "lengths": (G, b) int32}.

        They are global arrays; `lengths` says how many targets of each row count.

        Raises:
            DatasetError, BrokenInputError, OSError: the data cannot be read.
            RuntimeError: a worker process died.
        """

    def position(self, rows: int) -> DataPosition:
        """Returns the position after `rows` consumed rows, which must be near those last read.

        All processes call it together.
        """


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
    def fingerprint(self) -> str:
        """A text that is the same for the same tokens in the same order, wherever the files lie."""

    def describe(self) -> str:
        """Returns how much there is to train on, and in which form, on one line."""

    def reader(
        self, shape: Shape, layout: jax.sharding.NamedSharding, position: DataPosition = START
    ) -> BatchReader:
        """Returns what reads this process's rows of the batches after `position`.

        Args:
            shape: a global batch's. It may differ from that of the batches before.
            layout: for arrays (G, b, ...); only the second axis may be split.
            position: how much of the data is consumed.
        """

    def check_resume(self, before: Mapping[str, Any], position: DataPosition, step: int) -> None:
        """Checks that this data continues as the data of a checkpoint would have.

        Args:
            before: the checkpoint's config, as nested dicts.
            position: that the run continues at.
            step: that the run continues at.

        Raises:
            ConfigError: batches that are already trained on would have been others.
        """


class PreparedReader:
    """Reads batches of prepared data; a `BatchReader`."""

    def __init__(
        self, source: Ordered | Mixture, shape: Shape, layout: Any, first_row: int, options: dict[str, Any]
    ):
        self._source, self._shape, self._layout, self._first_row = source, shape, layout, first_row
        self._options = options

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        position = self._first_row, count
        return loader.batches(self._source, self._shape, self._layout, *position, **self._options)

    def position(self, rows: int) -> DataPosition:
        return DataPosition(rows)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Training data that lie on the disk as token ids; a `TrainingData`.

    Args:
        config: the run's, resolved.
        dataset: that it names, with its parts where the config has a mixture.
    """

    config: Config
    dataset: Dataset

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
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    @functools.cached_property
    def rows(self) -> Ordered | Mixture:
        """The endless order of training sequences."""
        c, d = self.config, self.config.dataset
        length = c.model.context_length
        block = max(d.block_tokens // length, 1)

        def ordered(split: Split | Subset, seed: int) -> Ordered:
            return Ordered(split, order.make(d.order, split.sequences(length), block, seed))

        if not d.mixture:
            return ordered(self.dataset.splits["train"], c.seed)
        stages = [
            mixture.stage(start, [weights.get(name, Fraction(0)) for name in self.dataset.parts])
            for start, weights in mixture.stages(d.mixture, c)
        ]
        # A part's seed depends on its name, so that its order stays when other parts come or go.
        parts = [
            ordered(split, (c.seed + zlib.crc32(name.encode())) % 2**32)
            for name, split in self.dataset.parts.items()
        ]
        return Mixture(tuple(parts), tuple(stages))

    def describe(self) -> str:
        layout = self.dataset.layout(self.config.model.context_length)
        return f"{layout}, {quantity(self.dataset.splits['train'].tokens)} tokens"

    def reader(
        self, shape: Shape, layout: jax.sharding.NamedSharding, position: DataPosition = START
    ) -> PreparedReader:
        d = self.config.dataset
        options = {"workers": d.workers, "prefetch": d.prefetch}
        return PreparedReader(self.rows, shape, layout, position.rows, options)

    def check_resume(self, before: Mapping[str, Any], position: DataPosition, step: int) -> None:
        mixture.check_history(self.config, before, position.rows, step)


def abstract_batch(
    dtype: np.dtype, shape: Shape, layout: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of the batches that `reader(shape, layout)` of such ids reads."""
    micro_steps, rows, length = shape
    return {
        "tokens": jax.ShapeDtypeStruct((micro_steps, rows, length + 1), dtype, sharding=layout),
        "lengths": jax.ShapeDtypeStruct((micro_steps, rows), np.int32, sharding=layout),
    }


def validation_batches(
    split: Split,
    sequences: int,
    shape: Shape,
    layout: jax.sharding.NamedSharding,
    with_subsets: bool = False,
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches of always the same validation sequences, evenly spaced over the split.

    Args:
        split: to read.
        sequences: how many; 0: all that there are. The last batch is filled up with rows of length 0.
        shape: (1, rows, L) of a batch.
        layout: for arrays (1, rows, ...).
        with_subsets: adds each target's subset to the batches, see `loader.batches`.
    """
    available = split.sequences(shape[2])
    chosen = min(sequences or available, available)
    rows = Ordered(split, Spaced(available, chosen))
    return loader.batches(rows, shape, layout, count=-(-chosen // shape[1]), with_subsets=with_subsets)


def read(
    config: Any, path: str, resolve: Callable[[Any, int, int], Config], cache: Path
) -> tuple[Config, TrainingData]:
    """Opens the data that a config names, and completes the config with what the data decide.

    Args:
        config: the run's, a ConfigDict that is not yet resolved.
        path: where the data lie: `dataset.path`, or what it stands for.
        resolve: is called with the config, the vocabulary's size and the end-of-text id.
        cache: folder in which the indexes of subsets are kept.

    Raises:
        ConfigError, DatasetError: config or data cannot work.
    """
    d = config.dataset
    if "streams" in d:
        tokenizer = jsonl.find_tokenizer(d.tokenizer)
        resolved = resolve(config, tokenizer.vocab_size, tokenizer.end_of_text)
        length, sequences = resolved.model.context_length, resolved.eval.sequences
        streamed = jsonl.open_files(resolved.dataset, tokenizer, resolved.seed, length, sequences)
        _check_size(f"dataset.validation_path={d.validation_path!r}", streamed.validation)
        return resolved, streamed

    try:
        dataset = detect.open_path(path, d.tokenizer, d.validation_path)
    except OSError as error:
        raise ConfigError(f"dataset.path={d.path!r} cannot be used: {error}") from None
    for name in ("train", "validation"):
        _check_size(f"dataset.path={d.path!r}: split {name}", dataset.splits.get(name))
    resolved = resolve(config, dataset.vocab_size, dataset.tokenizer.end_of_text)
    if d.mixture:
        try:
            dataset = mixture.with_parts(dataset, d.mixture, cache)
        except OSError as error:
            raise ConfigError(f"dataset.mixture={d.mixture!r} (cache {cache}): {error}") from None
    data = PreparedData(resolved, dataset)
    _ = data.rows  # reports errors in the mixture before any device is used
    return resolved, data


def _check_size(name: str, split: Split | None) -> None:
    if split is None or split.tokens < 2 or split.bytes == 0:
        size = f"{split.tokens} tokens" if split else "nothing"
        size += f" of {split.bytes} bytes" if split and split.bytes is not None else ""
        raise ConfigError(f"{name} has {size}; it needs 2 tokens of some text")
