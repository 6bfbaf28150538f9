"""The training data of `dataset=jsonl` as global batches, and the validation data in memory.

Streams (trainit/data/jsonl/stream.py) belong to rows: row r of a batch of B is stream r * S // B. A process
reads the streams of its rows, by Grain's worker processes, each of which has every W-th of them.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from trainit.cluster import sync
from trainit.cluster.process import end_with_parent
from trainit.data import loader
from trainit.data.dataset import DatasetError, Split
from trainit.data.documents.inputs import Input, describe_all
from trainit.data.documents.reader import BrokenInputError, Position, find_files, first_texts
from trainit.data.documents.targets import Targets
from trainit.data.jsonl.stream import Corpus, State, Stream, documents
from trainit.data.loader import START, DataPosition
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import digest, to_bytes
from trainit.tokenizers.chat import marks, template
from trainit.tokenizers.chat.encode import log_template

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


class Parts(grain.IterDataset):
    """A worker's part of each batch: the rows of its streams, and the streams' states after these rows."""

    def __init__(self, corpus: Corpus, states: dict[int, State], count: int):
        """`states` says where each stream begins; `count` is the number of its rows in a batch."""
        super().__init__()
        self.corpus, self.states, self.count = corpus, states, count

    def set_slice(self, chosen: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in each worker."""
        self.states = dict(list(self.states.items())[chosen])

    def __iter__(self) -> grain.DatasetIterator:
        return _PartsIterator(self)


class _PartsIterator(grain.DatasetIterator):
    def __init__(self, parts: Parts):
        super().__init__()
        self._count = parts.count
        self._streams = [Stream(parts.corpus, number, state) for number, state in parts.states.items()]
        self._filled = False
        _ = parts.corpus.tokenizer  # built once, before there are threads

    def __next__(self) -> dict[str, np.ndarray]:
        """{"tokens": (streams, count, L + 1) ids, "states": (streams, 7) int64}."""
        if not self._filled:  # decompressing and most tokenizers let other threads work
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
                list(threads.map(Stream.fill, self._streams))
            self._filled = True
        tokens = np.stack([stream.take(self._count) for stream in self._streams])
        return {"tokens": tokens, "states": np.array([stream.state for stream in self._streams], np.int64)}

    def get_state(self) -> dict[str, Any]:
        return {}  # it travels with the batches

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class StreamReader:
    """Reads one process's rows of the global batches, and knows where its streams are after each batch."""

    def __init__(
        self,
        corpus: Corpus,
        shape: tuple[int, int, int],
        sharding: jax.sharding.NamedSharding,
        position: DataPosition = START,
        workers: int = 0,
        prefetch: int = 2,
    ):
        """Arguments as those of `TrainingData.reader`; the corpus' streams divide the G * b rows of a batch.

        Without worker processes a thread of this one reads. Each of them reads `prefetch` batches ahead.
        """
        micro_steps, rows, _ = shape
        self._corpus, self._shape, self._sharding, self._prefetch = corpus, shape, sharding, prefetch
        self._own_rows, self._first_row = loader.local_rows(shape, sharding), position.rows
        self._batch = micro_steps * rows
        self._count = self._batch // corpus.streams  # rows of a stream in a batch
        in_batch = np.arange(self._batch).reshape(micro_steps, rows)[:, self._own_rows]
        self._streams, self._of_row = np.unique(in_batch // self._count, return_inverse=True)
        self._of_row, self._in_stream = self._of_row.reshape(in_batch.shape), in_batch % self._count
        self._workers = min(workers, len(self._streams))
        begin: Sequence[Sequence[int]] = position.streams or [State()] * corpus.streams
        self._begin = {int(number): State(*begin[number]) for number in self._streams}
        self.states_after = {position.rows: self._begin}  # by consumed rows: the newest few
        of_all = len(self._streams) * self._count
        if in_batch.size < of_all:
            logging.warning(
                "data       this process reads %d of dataset.streams=%d for %d of their %d rows, and others "
                "read them too; a multiple of processes * micro-steps spares that",
                *(len(self._streams), corpus.streams, in_batch.size, of_all),
            )

    def batches(self, count: int = 1 << 40) -> Iterator[dict[str, jax.Array]]:
        """The next `count` batches: {"tokens": (G, b, L + 1) ids, "lengths": (G, b) int32}, global arrays.

        Raises what `Stream.fill` raises, and RuntimeError if a worker process died.
        """
        records = itertools.islice(self.records(), count)
        return loader.on_devices(records, self._own_rows, self._shape, self._sharding)

    def records(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of batch after batch: {"tokens": (G, rows, L + 1), "lengths": (G, rows)}."""
        parts = Parts(self._corpus, self._begin, self._count)
        if self._workers:
            ahead = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=self._prefetch)
            parts = parts.mp_prefetch(ahead, end_with_parent)
        else:
            parts = grain.experimental.ThreadPrefetchIterDataset(parts, prefetch_buffer_size=self._prefetch)
        arriving = iter(parts)
        try:
            for number in itertools.count(1):
                states, tokens = self._assemble(arriving)
                row = self._first_row + number * self._batch
                self.states_after[row] = states
                self.states_after.pop(row - 4 * self._batch, None)
                lengths = np.full(self._of_row.shape, self._shape[2], np.int32)
                yield {"tokens": tokens[self._of_row, self._in_stream], "lengths": lengths}
        finally:
            arriving.close()  # ends the workers

    def _assemble(self, arriving: Iterator[dict]) -> tuple[dict[int, State], np.ndarray]:
        """Returns the states of this process's streams after their next rows, and these rows."""
        workers = max(self._workers, 1)
        states: dict[int, State] = {}
        shape = len(self._streams), self._count, self._shape[2] + 1
        tokens = np.empty(shape, self._corpus.dtype)
        for worker in range(workers):  # Grain takes turns among them
            part = next(arriving)
            tokens[worker::workers] = part["tokens"]
            streams = self._streams[worker::workers].tolist()
            states |= {n: State(*state) for n, state in zip(streams, part["states"].tolist(), strict=True)}
        return states, tokens

    def position(self, rows: int) -> DataPosition:
        """Returns the position after `rows` consumed rows, near those last read. A collective."""
        states: dict[str, list[int]] = {}
        for text in sync.gather_text(json.dumps(self.states_after[rows])):
            states |= json.loads(text)
        return DataPosition(rows, [states[number] for number in sorted(states, key=int)])


@dataclass(frozen=True)
class Held(Split):
    """A split in memory."""

    ids: Any = None  # of whole documents: more than `tokens`, if the last is cut
    index: Any = None  # what `documents` returns

    @property
    def shards(self) -> list[np.ndarray]:
        return [self.ids]

    def documents(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.index


def hold(corpus: Corpus, name: str, sequences: int) -> Held:
    """Reads the first `sequences` sequences of a corpus into memory; 0: all."""
    enough = sequences * corpus.length + 1 if sequences else 1 << 62
    pieces, count, rows = [], 0, []
    subsets: dict[str, int] = {}
    token_bytes = corpus.tokenizer.token_bytes()
    files = range(len(corpus.paths))
    for _, document, ids in (row for file in files for row in documents(corpus, file, Position())):
        number = min(subsets.setdefault(document.subset, len(subsets)), 0xFFFF)
        text = int(token_bytes[marks.ids_of(ids)].sum()) if corpus.chat else len(to_bytes(document.text))
        rows.append((count, text, number))
        pieces.append(ids)
        count += len(ids)
        if count >= enough:
            break
    ids, index = (
        np.concatenate([*pieces, np.empty(0, corpus.dtype)]),
        np.array(rows, np.int64).reshape(-1, 3).T,
    )
    tokens, size, names = (min(count, enough),), int(index[1].sum()), tuple(subsets)
    held = Held(name, ("memory",), tokens, corpus.dtype, size, subsets=names, ids=ids, index=tuple(index))
    if len(cut := token_bytes[marks.ids_of(ids[enough:])]):
        a, b = Targets(held, token_bytes).share(0, len(rows) - 1)
        held = replace(held, bytes=size - round(a * int(cut.sum()) + b * len(cut)))
    return held


@dataclass(frozen=True)
class StreamedData:
    """Training data that are read from JSON lines while the run trains: a `TrainingData`."""

    source: str  # as dataset.path says it
    corpus: Corpus
    validation: Split
    workers: int = 0
    prefetch: int = 2
    inputs: Mapping[str, Sequence[Input]] = field(default_factory=dict)  # as in `identity`

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.corpus.dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def fingerprint(self) -> str:
        """The same for files of the same names and sizes in the same order."""
        c = self.corpus
        name, content, end_of_text = c.tokenizer_file
        about = [*zip(c.names, c.sizes, strict=True), name, digest(content), end_of_text]
        about += [c.text_field, c.streams, c.window, c.seed, *filter(None, [c.chat])]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        return {"dataset": self.fingerprint, "inputs": self.inputs}

    @property
    def digests(self) -> dict[Path, str]:
        return {}

    def reader(
        self, shape: tuple[int, int, int], layout: jax.sharding.NamedSharding, position: DataPosition = START
    ) -> StreamReader:
        return StreamReader(self.corpus, shape, layout, position, self.workers, self.prefetch)

    def check_resume(self, before: Mapping[str, Any], position: DataPosition, step: int) -> None:
        """Checks nothing: streams continue from their own states."""

    def describe(self) -> str:
        c = self.corpus
        return (
            f"files: {len(c.paths)}, in groups: {len(c.groups)}, {sum(c.sizes) / 1e9:.3g} GB in {c.streams} "
            f"streams with windows of {c.window} sequences"
        )


def open_files(config: Any, tokenizer: Tokenizer, seed: int, length: int, sequences: int) -> StreamedData:
    """Finds the files of a resolved config.dataset, and tokenizes the validation sequences.

    Of the training files, only the beginning of the first is looked into. Sequences have `length` targets; 0
    validation sequences stand for all.
    Raises DatasetError if files are missing or of other kinds, or the validation data cannot be read.
    """
    about = tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text
    settings, where = (
        template.settings(config.template, config.tokenizer, config.date) if is_chat(config) else ("", "")
    )
    corpora = {}
    for path_field in ("path", "validation_path"):
        try:
            paths, names = find_files([config[path_field]], f"dataset.{path_field}", SUFFIXES)
            inputs = tuple(describe_all(paths, names))
        except (ValueError, OSError) as error:
            raise DatasetError(str(error)) from None
        sizes = tuple(file.size for file in inputs)
        corpora[path_field] = Corpus(
            tuple(map(str, paths)),
            tuple(names),
            sizes,
            about,
            config.text_field,
            length=length,
            chat=settings,
            inputs=inputs,
        )
    train, validation = corpora["path"], replace(corpora["validation_path"], subset_field=config.subset_field)
    if twice := {*map(os.path.realpath, train.paths)} & {*map(os.path.realpath, validation.paths)}:
        raise DatasetError(f"{min(twice)} is in dataset.path and in dataset.validation_path")
    try:
        held = hold(validation, "validation", sequences)
    except (BrokenInputError, OSError) as error:
        raise DatasetError(f"dataset.validation_path={config.validation_path!r}: {error}") from None
    train = replace(train, streams=config.streams, window=config.window, seed=seed)
    if settings:
        _check_chat(train, held, where)
    train.tokenizer.examples = first_texts(Path(train.paths[0]), train.fields)
    of_all = {"train": train.inputs, f"validation {config.validation_path}": validation.inputs}
    return StreamedData(config.path, train, held, config.workers, config.prefetch, of_all)


def is_chat(config: Any) -> bool:
    """Whether config.dataset is `dataset=chat`."""
    return "template" in config


def _check_chat(train: Corpus, held: Held, where: str) -> None:
    """Checks that validation has targets, and that conversations can be written; logs how."""
    if not (held.ids[1:] < marks.IGNORED).any():
        raise DatasetError("no target of the validation sequences is the assistant's: raise eval.sequences")
    try:
        next(documents(train, 0, Position()), None)  # about a MiB of them
    except (BrokenInputError, OSError) as error:
        raise DatasetError(f"dataset.path: {error}") from None
    log_template(where, train.chat, train.tokenizer)
