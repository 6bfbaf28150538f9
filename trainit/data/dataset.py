"""The prepared dataset on disk: `dataset.json`, the tokenizer's file, and shards of token ids.

    dataset.json                   written last: without it the folder is unfinished
    tokenizer.model                the tokenizer's own file
    SPLIT-UNIT-00000.tokens        little-endian ids, uint16 or uint32, document after document,
                                   each ended by the end-of-text id
    SPLIT-UNIT-00000.documents     uint64: where in the shard each document starts
    SPLIT-UNIT-00000.subsets       uint16: the subset of each document, as a number among dataset.json's

A split is the concatenation of its shards. With context length L, sequence i is tokens
[i*L, i*L + L], so that every token but the split's first is a target exactly once; the last
sequence may be shorter. Splits of data that others made (`foreign`) may store sequences of their
own; those of L + 1 tokens are read whole: sequence i is the i-th that was stored.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainit.data import tokenizers

FORMAT = 2


class DatasetError(ValueError):
    """A dataset that cannot be used. The message is one line and says what to do."""


def dtype_of(vocab_size: int) -> str:
    """Returns the smallest NumPy type of ids on the disk that holds a vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class MappedIds:
    """A file of ids behind `offset` bytes, of which only what is used is read."""

    def __init__(self, path: str, dtype: str, offset: int = 0):
        self._file, self._offset = Path(path).open("rb"), offset  # noqa: SIM115, open as long as the ids are
        self._ids = np.memmap(self._file, dtype, "r", offset).view(np.ndarray)
        self._view = functools.cache(functools.partial(np.lib.stride_tricks.sliding_window_view, self._ids))

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._ids[part]

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        """(n, size): the ids from each start on.

        The system is first told of all of them. It reads them at once, and nothing beside them; met one by
        one, each would wait for the one before and for a good deal of what lies behind it.
        """
        width, file = self._ids.itemsize, self._file.fileno()
        for start in starts.tolist() if hasattr(os, "posix_fadvise") else ():  # which macOS lacks
            os.posix_fadvise(file, self._offset + start * width, size * width, os.POSIX_FADV_WILLNEED)
        return self._view(size)[starts]


@dataclass(frozen=True)
class Split:
    """The tokens of one split. Cheap to pickle: files are mapped on first use, in each process."""

    name: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]  # tokens of each shard
    dtype: str  # of the rows that are read
    bytes: int | None  # UTF-8 bytes of its text; None: nobody counted them
    stored: int = 0  # tokens of each stored sequence; 0: they differ, or there are none
    below: int = 0  # ids are checked to be below it when they are read; 0: they have been checked
    subsets: tuple[str, ...] = ()  # names by number, where documents are told apart
    openers: tuple[Callable[[], Any], ...] = ()  # open a shard, whose slices are ids; none: flat files

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    def is_stored(self, length: int) -> bool:
        """Whether stored sequences are read whole, having `length` targets each."""
        return self.stored == length + 1

    def sequences(self, length: int) -> int:
        """How many sequences of `length` targets cover the split."""
        if self.is_stored(length):
            return self.tokens // self.stored
        return -(-(self.tokens - 1) // length)

    def __getstate__(self):
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_shards", "_starts", "_edges", "_documents")
        }

    @functools.cached_property
    def _shards(self) -> list:
        if self.openers:
            return [open_shard() for open_shard in self.openers]
        return [MappedIds(path, self.dtype) for path in self.paths]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)]

    @functools.cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each shard, the first token and the one behind the last."""
        return np.array(self._starts[:-1]), np.array(self._starts[1:])

    def documents(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the shard each document starts, int64 (n,), and its subset, uint16 (n,)."""
        path = Path(self.paths[shard])
        starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(np.int64)
        return starts, np.fromfile(path.with_suffix(".subsets"), "<u2")

    def copy(self, row: np.ndarray, begin: int):
        """Fills the row with the split's tokens from `begin` on; raises as `read`."""
        filled, shard = 0, bisect.bisect_right(self._starts, begin) - 1
        while filled < len(row):  # they may go on in the next shard
            at = begin + filled - self._starts[shard]
            piece = self._shards[shard][at : at + len(row) - filled]
            if self.below and piece.max() >= self.below:
                raise self._out_of_vocabulary(shard, at, piece)
            row[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1

    @functools.cached_property
    def _documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.documents(shard) for shard in range(len(self.paths))]

    def read_subsets(self, sequences: np.ndarray, length: int) -> np.ndarray:
        """uint16 (n, length): the subset of each target of `read`, 0 behind the end.

        It keeps the index of documents in memory: for validation.
        """
        numbers = np.zeros((len(sequences), length), np.uint16)
        for row, sequence in zip(numbers, np.asarray(sequences).tolist(), strict=True):
            begin, end = sequence * length + 1, min((sequence + 1) * length + 1, self.tokens)
            filled = 0 if sequence >= 0 else end - begin
            while begin + filled < end:
                shard = bisect.bisect_right(self._starts, begin + filled) - 1
                at = begin + filled - self._starts[shard]
                count = min(end - begin - filled, self.sizes[shard] - at)
                starts, subsets = self._documents[shard]
                of = np.searchsorted(starts, np.arange(at, at + count), side="right") - 1
                row[filled : filled + count] = subsets[of]
                filled += count
        return numbers

    def read(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies sequences out of the mapped files.

        Args:
            sequences: (n,) numbers of sequences; a negative one reads as no tokens.
            length: targets of a sequence.

        Returns:
            ids (n, length + 1) in the dataset's own narrow type, zero behind the end, and
            int32 (n,): how many targets each row has, at most `length`.

        Raises:
            DatasetError: an id is not in the vocabulary; only where `below` asks for it.
        """
        ids = np.zeros((len(sequences), length + 1), self.dtype)
        first = np.asarray(sequences, np.int64) * (length + self.is_stored(length))
        last = np.where(first < 0, first, np.minimum(first + length + 1, self.tokens))
        starts, ends = self._edges
        shards = np.searchsorted(starts, first, side="right") - 1
        left = (first < 0) | (first + length >= ends[shards])  # nothing, or more than one shard has
        for shard in set(shards.tolist()):
            rows = np.flatnonzero((shards == shard) & ~left)
            if len(rows) and isinstance(self._shards[shard], MappedIds):
                found = self._shards[shard].windows(first[rows] - starts[shard], length + 1)
                if self.below and found.max() >= self.below:
                    self.copy(ids[0], int(first[rows[np.argmax(found.max(1) >= self.below)]]))  # which raises
                ids[rows] = found
            else:
                left[rows] = True
        for row in np.flatnonzero(left).tolist():
            self.copy(ids[row, : last[row] - first[row]], int(first[row]))
        return ids, np.maximum(last - first - 1, 0).astype(np.int32)

    def _out_of_vocabulary(self, shard: int, at: int, piece: np.ndarray) -> DatasetError:
        wrong = int(np.argmax(piece >= self.below))
        return DatasetError(
            f"{self.paths[shard]}: token {at + wrong} is the id {piece[wrong]}, but dataset.tokenizer has "
            f"{self.below} ids: name the tokenizer that these tokens were made with"
        )


@dataclass(frozen=True)
class Dataset:
    """A dataset: its description, its splits and its tokenizer."""

    folder: Path
    info: dict  # dataset.json, or what stands for it
    splits: dict[str, Split]
    named: tokenizers.Tokenizer | None = None  # the tokenizer, where the folder has none
    parts: dict = field(default_factory=dict)  # what a mixture is made of, by name
    part_fingerprints: tuple[str, ...] = ()  # of other datasets among them

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]

    def layout(self, length: int) -> str:
        """Whose format it is, and how sequences of `length` targets lie in its training data."""
        format, stored = self.info["format"], self.splits["train"].stored
        if format == FORMAT:
            return "prepared"
        if not stored:
            return f"{format}, read as one stream"
        if self.splits["train"].is_stored(length):
            return f"{format}, sequences of {stored} tokens read whole"
        return (
            f"{format}, sequences of {stored} tokens read as one stream; model.context_length={stored - 1} "
            f"would read them whole"
        )

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Raises DatasetError where its file is missing or another than the dataset was made with."""
        if self.named:
            return self.named
        about = self.info["tokenizer"]
        try:
            return tokenizers.load(
                about["name"], self.folder / about["file"], about["sha256"], about["end_of_text"]
            )
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"the tokenizer of dataset.path={str(self.folder)!r}: {error}") from None

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens in the same order, wherever the folder lies.

        Of foreign data it is made from the format, names and sizes of the files, not from what is in them.
        """
        content = {key: self.info[key] for key in ("format", "tokenizer", "vocab_size", "dtype", "splits")}
        if self.part_fingerprints:
            content["parts"] = self.part_fingerprints
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def open_dataset(folder: Path) -> Dataset:
    """Reads `dataset.json` and checks that every shard is there in full.

    Raises:
        DatasetError: missing, unfinished, of an unknown format, or damaged.
    """
    if not folder.is_dir():
        raise DatasetError(
            f"dataset.path={str(folder)!r} does not exist; prepare it, or try the demo text with "
            f"--config.dataset.path=demo"
        )
    try:
        info = json.loads((folder / "dataset.json").read_bytes())
        if info["format"] != FORMAT:
            raise DatasetError(
                f"dataset.path={str(folder)!r} has format {info['format']}, this Trainit reads {FORMAT}"
            )
        splits = {name: _open_split(folder, name, info) for name in info["splits"]}
    except FileNotFoundError:
        raise DatasetError(
            f"dataset.path={str(folder)!r} has neither dataset.json nor tokens that others prepared: it is "
            f"unfinished; prepare it again"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{folder / 'dataset.json'} is damaged ({error}); prepare the dataset again"
        ) from None
    return Dataset(folder, info, splits)


def verify(dataset: Dataset) -> int:
    """Reads all shards and checks them against dataset.json.

    Returns:
        How many files are right.

    Raises:
        DatasetError: one is torn or was replaced, or holds what cannot be; the message names it.
    """
    _ = dataset.tokenizer  # whose own hash is checked
    checked = 1
    for split in dataset.info["splits"].values():
        for shard in split["shards"]:
            path = dataset.folder / shard["file"]
            for part, expected in shard["sha256"].items():
                file = path.with_suffix(f".{part}")
                try:
                    with file.open("rb") as content:
                        actual = hashlib.file_digest(content, "sha256").hexdigest()
                except OSError as error:
                    raise DatasetError(f"{file}: {error.strerror}; copy or prepare it again") from None
                if actual != expected:
                    raise DatasetError(
                        f"{file} has SHA-256 {actual}, dataset.json says {expected}: it is torn or was "
                        f"replaced; copy or prepare the dataset again"
                    )
                checked += 1
            _verify_ids(path, shard, dataset.info)
    return checked


def _verify_ids(path: Path, shard: dict, info: dict):
    """Ids are below the vocabulary; where the index says that a document starts, one has ended."""
    ids = np.memmap(path, info["dtype"], "r")
    largest = max(int(ids[i : i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(np.int64)
    numbers = np.fromfile(path.with_suffix(".subsets"), "<u2")
    if largest >= info["vocab_size"]:
        raise DatasetError(f"{path} has the id {largest}; the vocabulary has {info['vocab_size']}")
    ends = np.append(starts[1:], len(ids)) - 1
    rises = len(starts) and starts[0] == 0 and (starts <= ends).all() and ends.max() < len(ids)
    if (
        not rises
        or len(starts) != shard["documents"]
        or (ids[ends] != info["tokenizer"]["end_of_text"]).any()
    ):
        raise DatasetError(f"{path.with_suffix('.documents')} does not say where the documents of {path} end")
    if len(numbers) != len(starts) or numbers.max() >= len(info["subsets"]):
        raise DatasetError(f"{path.with_suffix('.subsets')} does not name a subset for each document")


def _open_split(folder: Path, name: str, info: dict) -> Split:
    split = info["splits"][name]
    paths = [folder / shard["file"] for shard in split["shards"]]
    sizes = [shard["tokens"] for shard in split["shards"]]
    for path, shard in zip(paths, split["shards"], strict=True):
        for file, expected in (
            (path, shard["tokens"] * np.dtype(info["dtype"]).itemsize),
            (path.with_suffix(".documents"), 8 * shard["documents"]),
            (path.with_suffix(".subsets"), 2 * shard["documents"]),
        ):
            actual = file.stat().st_size if file.exists() else "no"
            if actual != expected:
                raise DatasetError(
                    f"{file} has {actual} bytes instead of {expected}; copy or prepare the dataset again"
                )
    return Split(
        name,
        tuple(map(str, paths)),
        tuple(sizes),
        info["dtype"],
        split["bytes"],
        subsets=tuple(info["subsets"]),
    )
