"""Training straight from .jsonl files: read, tokenized, cut and shuffled while the run trains.

The data are cut into a fixed number S of logical streams, which does not depend on who reads them. A batch of
B rows is the next B/S sequences of every stream, in the order of the streams. So batch t is a pure function
of (files, seed, t), and a process reads the streams that its rows belong to.

A group of streams shares a group of files: the files are dealt to as many groups of equal size as can be made
of them, and each of a group's k streams takes every k-th line. Each epoch has its own order of files. A
stream is its documents, each ended by the end-of-text id, joined and cut into sequences that overlap by one
token, as in data/dataset.py; every `window` consecutive sequences are shuffled.

A stream's position is a few integers (`State`). Each batch carries the position of each of its streams after
that batch; rows that were only prefetched do not count. A resume decompresses up to there without parsing.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainit import tokenizers
from trainit.data.dataset import DatasetError, dtype_of
from trainit.data.documents import conversations, reader
from trainit.data.documents.inputs import Input, describe
from trainit.data.documents.reader import Batch, BrokenInputError, Document, Position
from trainit.data.rows.order import permute
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.chat import marks

EQUAL = 0.95  # groups of files count as equal if the smallest has at least this share of the largest


class State(NamedTuple):
    """Where a stream continues: where its present window begins, and how many of its sequences were given."""

    epoch: int = 0
    file: int = 0  # in the epoch's order
    offset: int = 0  # decompressed bytes of the file before the document's line
    line: int = 0  # lines of the file before it
    token: int = 0  # of the document
    window: int = 0
    given: int = 0  # sequences of the window


@dataclass(frozen=True)
class Corpus:
    """The files to read and how to cut them. It is cheap to pickle; the tokenizer is built on first use."""

    paths: tuple[str, ...]
    names: tuple[str, ...]  # of the files in messages, and in the fingerprint
    sizes: tuple[int, ...]  # bytes on disk
    tokenizer_file: tuple[str, bytes, int]  # kind, content, end-of-text id
    text_field: str
    streams: int = 1
    window: int = 1
    seed: int = 0
    length: int = 1  # L, targets of a sequence
    subset_field: str = ""  # empty: subsets are not told apart
    chat: str = ""  # how conversations are written, of `chat.template.settings`; empty: lines have texts
    inputs: tuple[Input, ...] = ()  # the files as they were when the run began; empty: not known

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("tokenizer", "groups")}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizers.build(*self.tokenizer_file)

    @property
    def dtype(self) -> str:
        return marks.DTYPE if self.chat else dtype_of(self.tokenizer.vocab_size)

    @property
    def fields(self) -> reader.Fields:
        """What is read of a line."""
        return conversations.fields(self.text_field, self.subset_field, self.chat)

    @functools.cached_property
    def groups(self) -> list[list[int]]:
        return deal(self.sizes, self.streams)

    def files(self, group: int, epoch: int) -> list[int]:
        """Returns the files of a group in the order of an epoch."""
        files = self.groups[group]
        return [files[i] for i in permute(np.arange(len(files)), len(files), self.seed, group, epoch)]


def deal(sizes: Sequence[int], streams: int) -> list[list[int]]:
    """Returns the files of each group: as many groups of equal size as can be made, a divisor of `streams`.

    Each document belongs to one stream, and all streams give the same number of sequences. Documents of a
    smaller group would therefore be seen more often.
    """
    for groups in (n for n in range(streams, 0, -1) if streams % n == 0):
        dealt: list[list[int]] = [[] for _ in range(groups)]
        filled = [0] * groups
        for file in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            emptiest = filled.index(min(filled))
            dealt[emptiest].append(file)
            filled[emptiest] += sizes[file]
        if min(filled) >= EQUAL * max(filled):
            break
    return [sorted(files) for files in dealt]


def documents(
    corpus: Corpus, file: int, start: Position, part: int = 0, parts: int = 1
) -> Iterator[tuple[Position, Document, np.ndarray]]:
    """Yields where each document's line begins, the document, and its ids followed by the end-of-text id.

    Those of conversations are as the template writes them, with marks.

    Reading starts at the line that begins at `start`. Only every `parts`-th line is parsed, those whose
    number has the remainder `part`.
    Raises BrokenInputError if a line or the file cannot be read, or its size has changed; OSError if it is
    gone.
    """
    path, name = Path(corpus.paths[file]), corpus.names[file]
    fields = corpus.fields
    if (size := path.stat().st_size) != corpus.sizes[file]:
        raise BrokenInputError(f"{name} has {size} bytes; when the run began it had {corpus.sizes[file]}")
    if corpus.inputs and describe(path, name, corpus.inputs[file]).samples != corpus.inputs[file].samples:
        raise BrokenInputError(f"{name} has changed: lines are not what they were when the run began")
    for batch in reader.read(path, name, fields, start):
        lines = batch.lines.split(b"\n")
        first = (part - batch.line) % parts
        own = [b""] * len(lines)  # the others as blank lines, so that numbers stay
        own[first::parts] = lines[first::parts]
        begins = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
        before = batch.position.offset - len(batch.lines)
        for document, ids in _encode(corpus, replace(batch, lines=b"\n".join(own)), fields):
            line = document.line - 1
            yield Position(0, before + begins[line - batch.line], line), document, ids


def _encode(corpus: Corpus, batch: Batch, fields: reader.Fields) -> list[tuple[Document, np.ndarray]]:
    """Returns the documents of a batch and the ids of each."""
    documents, broken = reader.parse(batch, fields)
    if corpus.chat:
        documents, ended, without_ids = conversations.encode(
            documents, corpus.tokenizer, corpus.chat, batch.file
        )
    else:
        documents, encoded, without_ids = reader.encode(documents, corpus.tokenizer, batch.file)
        end, dtype = corpus.tokenizer.end_of_text, corpus.dtype
        ended = [np.append(ids, end).astype(dtype) for ids in encoded]
    if broken or without_ids:
        raise BrokenInputError(str(min([*broken, *without_ids], key=lambda b: b.line)))
    return list(zip(documents, ended, strict=True))


class Stream:
    """One logical stream: its sequences from a state on, without end."""

    def __init__(self, corpus: Corpus, number: int, state: State):
        self.state = state
        self._corpus, self._number = corpus, number
        self._parts = corpus.streams // len(corpus.groups)  # streams of the group
        self._documents = self._read(state)
        self._ahead: deque[tuple[State, np.ndarray]] = deque()  # from the window's first document on
        self._tokens = 0  # in all of them
        self._rows: np.ndarray | None = None  # the window: (window, L + 1), shuffled
        self._next = state  # where the next window begins

    def _read(self, at: State) -> Iterator[tuple[State, np.ndarray]]:
        """Yields the documents from the one at `at` on, epoch after epoch."""
        group, part = divmod(self._number, self._parts)
        whole, found = at == State(), False
        for epoch in itertools.count(at.epoch):
            files = self._corpus.files(group, epoch)
            for number in range(at.file, len(files)):
                start = Position(0, at.offset, at.line)
                for place, _, ids in documents(self._corpus, files[number], start, part, self._parts):
                    found = True
                    yield State(epoch, number, place.offset, place.line), ids
                at = State()
            if whole and not found:
                raise DatasetError(
                    f"stream {self._number} has no documents: fewer lines are there than "
                    f"dataset.streams={self._corpus.streams}; take fewer streams"
                )
            at, whole = State(), True

    def _gather(self, tokens: int) -> None:
        """Reads documents until there are `tokens` tokens from the beginning of the first one."""
        while self._tokens < tokens:
            self._ahead.append(next(self._documents))
            self._tokens += len(self._ahead[-1][1])

    def fill(self) -> None:
        """Reads and shuffles the present window, unless that is done.

        Raises BrokenInputError or OSError if what it needs cannot be read, or is not what it was at the
        state, DatasetError if the stream has no documents.
        """
        if self._rows is not None:
            return
        window, length, state = self._corpus.window, self._corpus.length, self.state
        needed = window * length + 1
        self._gather(state.token + needed)
        self._check()
        tokens = np.concatenate([ids for _, ids in self._ahead])[state.token : state.token + needed]
        sequences = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
        order = permute(np.arange(window), window, self._corpus.seed, self._number, state.window)
        self._rows = sequences[order]
        at = state.token + needed - 1  # the last token is the next window's first
        while at >= len(self._ahead[0][1]):
            size = len(self._ahead.popleft()[1])
            self._tokens, at = self._tokens - size, at - size
        self._next = self._ahead[0][0]._replace(token=at, window=state.window + 1)

    def _check(self) -> None:
        """Raises BrokenInputError unless the first document is where the state says that there is one."""
        (place, ids), state = self._ahead[0], self.state
        begun = state.offset or state.line or state.token
        if begun and (place[:4] != state[:4] or state.token >= len(ids)):
            file = self._corpus.files(self._number // self._parts, state.epoch)[state.file]
            name, line = self._corpus.names[file], state.line + 1
            raise BrokenInputError(f"{name} has changed: line {line} is not what it was at the checkpoint")

    def take(self, count: int) -> np.ndarray:
        """Returns the next (count, L + 1) ids and moves `state` after them. Raises what `fill` raises."""
        taken = []
        while count:
            self.fill()
            assert self._rows is not None
            taken.append(self._rows[self.state.given : self.state.given + count])
            count -= len(taken[-1])
            given = self.state.given + len(taken[-1])
            self._gather(self._next.token + given * self._corpus.length)  # the next window, bit by bit
            self.state = self.state._replace(given=given)
            if given == self._corpus.window:
                self.state, self._rows = self._next, None
        return np.concatenate(taken)
