"""The prepared dataset on the disk: `dataset.json`, the tokenizer's file, and shards of token ids.

    dataset.json                   written last; a folder without it is unfinished
    tokenizer.model                the tokenizer's own file
    SPLIT-UNIT-00000.tokens        little-endian ids, uint16 or uint32, document after document,
                                   each ended by the end-of-text id
    SPLIT-UNIT-00000.documents     uint64: where in the shard each document starts
    SPLIT-UNIT-00000.bytes         uint64: where in the shard's text, in UTF-8 bytes, each document ends
    SPLIT-UNIT-00000.subsets       uint16: the subset of each document, as a number among dataset.json's
    SPLIT-UNIT-00000.marks         of conversations, in place of ends of text: see chat/marks.py

A split is the concatenation of its shards. With context length L, sequence i is tokens [i*L, i*L + L], so
that every token of the split, except the first, is a target exactly once. The last sequence may be shorter.
Tokens that other programs prepared (`formats`) may be stored as sequences; those of L + 1 tokens are read
whole, and sequence i is then the i-th that was stored.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainit import tokenizers
from trainit.data.formats.mapped import DatasetError, MappedIds, MarkedIds
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import digest
from trainit.tokenizers.chat import marks

FORMAT, CHAT = 3, 4  # texts, and conversations, whose marks earlier versions do not know
PREPARED = FORMAT, CHAT


def dtype_of(vocab_size: int) -> str:
    """Returns the smallest NumPy type of ids on the disk that holds a vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def pieces(ends: Sequence[int] | np.ndarray, begin: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields where tokens [begin, stop) of concatenated parts lie, as (part, first, last) within each part.

    `ends` says where each part ends. It is searched by bisection: a mapped file is not read as a whole.
    """
    part = bisect.bisect_right(ends, begin)  # type: ignore[arg-type]  # an array is sequence enough
    while begin < stop:
        start = int(ends[part - 1]) if part else 0
        last = min(stop, int(ends[part]))
        if begin < last:  # else the part is empty
            yield part, begin - start, last - start
        begin, part = last, part + 1


def by_value(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each of the different numbers of an array (n,), and the indices at which it stands."""
    for number in np.unique(numbers).tolist():
        yield number, np.flatnonzero(numbers == number)


class PickledFields:
    """A dataclass that is pickled without what it caches: each process makes that itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Split(PickledFields):
    """The tokens of one split. Its files are mapped on first use."""

    name: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]  # tokens of each shard
    dtype: str  # of the rows that are read
    bytes: int | None  # UTF-8 bytes of its text; None: not known
    stored: int = 0  # tokens of each stored sequence; 0: they differ, or there are none
    cut: bool = False  # only whole batches are read of each shard, and the target of their last id
    below: int = 0  # ids that are read must be below it; 0: any may come
    subsets: tuple[str, ...] = ()  # names by number; empty: the subsets of documents are not known
    marked: bool = False  # conversations, with their marks
    openers: tuple[Callable[[], Any], ...] = ()  # each opens a shard, whose slices are ids; empty: flat files

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    def is_stored(self, length: int) -> bool:
        """Whether stored sequences are read whole, having `length` targets each."""
        return self.stored == length + 1

    def whole_batches(self, tokens: int) -> "Split":
        """The split with as many whole batches of this size as each shard has, with the last one's targets.

        As in modded-nanoGPT, the last batch of a shard ends at least two ids before the shard.
        """
        sizes = tuple(max(size - 2, 0) // tokens * tokens for size in self.sizes)
        return replace(self, sizes=sizes, stored=0, cut=True)

    def sequences(self, length: int) -> int:
        """Returns how many sequences of `length` targets cover the split."""
        if self.is_stored(length):
            return self.tokens // self.stored
        return -(-(self.tokens - (not self.cut)) // length)

    @functools.cached_property
    def shards(self) -> list:
        if self.openers:
            return [open_shard() for open_shard in self.openers]
        if self.marked:
            return [MarkedIds(path) for path in self.paths]
        return [MappedIds(path, self.dtype) for path in self.paths]

    @functools.cached_property
    def ends(self) -> list[int]:
        """Where each shard ends in the split."""
        return list(itertools.accumulate(self.sizes))

    def documents(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns where in the shard each document starts, its UTF-8 bytes, and its subset: integers (n,)."""
        path = Path(self.paths[shard])
        starts, ends = (np.fromfile(path.with_suffix(f".{part}"), "<i8") for part in ("documents", "bytes"))
        return starts, np.diff(ends, prepend=0), np.fromfile(path.with_suffix(".subsets"), "<u2")

    def copy(self, row: np.ndarray, begin: int) -> None:
        """Fills `row` with the split's tokens from `begin` on. Raises what `read` raises."""
        filled = 0
        for shard, first, last in pieces(self.ends, begin, begin + len(row)):
            piece = self.shards[shard][first:last]
            self._check(shard, [first], piece[None])
            row[filled : filled + len(piece)] = piece
            filled += len(piece)

    def read(self, sequences: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies sequences of `length` targets; a negative number stands for a row without tokens.

        Returns ids (n, length + 1) of `dtype`, zero after the end of the data, and how many targets each row
        has, int32 (n,). Raises DatasetError if an id is not below `below`.
        """
        ids = np.zeros((len(sequences), length + 1), self.dtype)
        first = np.asarray(sequences, np.int64) * (length + self.is_stored(length))
        last = np.where(first < 0, first, np.minimum(first + length + 1, self.tokens + self.cut))
        ends = np.array(self.ends)
        shards = np.searchsorted(ends, np.maximum(first, 0), side="right")
        inside = (first >= 0) & (first + length < ends[shards] + self.cut)
        for shard, rows in by_value(np.where(inside, shards, -1)):
            if shard >= 0 and isinstance(self.shards[shard], MappedIds):
                # Rows that lie in one mapped shard are read together.
                starts = first[rows] - (self.ends[shard] - self.sizes[shard])
                ids[rows] = windows = self.shards[shard].windows(starts, length + 1)
                self._check(shard, starts, windows)
            else:
                # The others cross shards, end with the data, or lie in compressed files.
                for row in rows.tolist():
                    self.copy(ids[row, : last[row] - first[row]], int(first[row]))
        return ids, np.maximum(last - first - 1, 0).astype(np.int32)

    def _check(self, shard: int, starts: Sequence[int] | np.ndarray, windows: np.ndarray) -> None:
        """Checks ids (n, size), read from these places of a shard on."""
        windows = marks.ids_of(windows) if self.marked else windows
        if self.below and windows.max() >= self.below:
            row, at = np.argwhere(windows >= self.below)[0]
            of, remedy = "the tokenizer", "the file is damaged; copy or prepare it again"
            if self.openers:
                of, remedy = "dataset.tokenizer", "name the tokenizer that these tokens were made with"
            raise DatasetError(
                f"{self.paths[shard]}: token {starts[row] + at} is the id {windows[row, at]}, but {of} has "
                f"{self.below} ids: {remedy}"
            )


@dataclass(frozen=True)
class Dataset:
    """A dataset: its description, its splits and its tokenizer."""

    folder: Path
    info: dict  # dataset.json, or the same facts about data of other programs
    splits: dict[str, Split]
    named: Tokenizer | None = None  # the tokenizer, if the folder has none
    parts: dict[str, Any] = field(default_factory=dict)  # splits and subsets that a mixture is made of
    others: tuple["Dataset", ...] = ()  # other datasets among the parts
    inputs: dict[str, list] = field(default_factory=dict)  # by split or part: files of tokens

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]

    def layout(self, length: int) -> str:
        """Returns which format the data has, and how sequences of `length` targets lie in it, for people."""
        format, stored = self.info["format"], self.splits["train"].stored
        if format in PREPARED:
            return "prepared"
        if not stored:
            return f"{format}, read as one stream"
        if self.splits["train"].is_stored(length):
            return f"{format}, sequences of {stored} tokens read whole"
        better = f"model.context_length={stored - 1} would read them whole"
        return f"{format}, sequences of {stored} tokens read as one stream; {better}"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DatasetError if its file is missing or not the one that made the dataset."""
        if self.named:
            return self.named
        about = self.info["tokenizer"]
        try:
            file = self.folder / about["file"]
            return tokenizers.load(about["name"], file, about["sha256"], about["end_of_text"])
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"the tokenizer of dataset.path={str(self.folder)!r}: {error}") from None

    @property
    def digests(self) -> dict[Path, str]:
        """The SHA-256 of each file, as far as Trainit has prepared the data; with those of the `others`."""
        if self.info["format"] not in PREPARED:
            return {}
        shards = [shard for split in self.info["splits"].values() for shard in split["shards"]]
        files = [(self.folder / shard["file"], shard["sha256"]) for shard in shards]
        own = {path.with_suffix(f".{part}"): digest for path, of in files for part, digest in of.items()}
        return functools.reduce(dict.__or__, (other.digests for other in self.others), own)

    @property
    def fingerprint(self) -> str:
        """A text that is the same for the same tokens in the same order, wherever the folder lies.

        For data of other programs it depends on the format, names and sizes of files, not on their content.
        """
        content = {key: self.info[key] for key in ("format", "tokenizer", "vocab_size", "dtype", "splits")}
        if self.others:
            content["parts"] = [other.fingerprint for other in self.others]
        return digest(json.dumps(content, sort_keys=True).encode())[:16]


def find_tokenizer(choice: str, end_of_text: str = "") -> Tokenizer:
    """Returns the tokenizer that fields of a dataset name. Raises DatasetError if it is not available."""
    try:
        return tokenizers.find(choice, end_of_text=end_of_text)
    except ValueError as error:
        raise DatasetError(str(error)) from None


def open_dataset(folder: Path, option: str = "dataset.path") -> Dataset:
    """Opens the dataset that messages call `option`=`folder`.

    Raises DatasetError if it is missing, unfinished, of an unknown format, or a file has not its size.
    """
    info = read_info(folder, f"{option}=")
    try:
        return Dataset(folder, info, {name: _open_split(folder, name, info) for name in info["splits"]})
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def read_info(folder: Path, named: str) -> dict:
    """Returns what dataset.json says. Raises DatasetError, which begins with `named` and the folder."""
    named += repr(str(folder))
    if not folder.is_dir():
        demo = "prepare it, or try the demo text with --config.dataset.path=demo"
        raise DatasetError(f"{named} does not exist; {demo}")
    try:
        info = json.loads((folder / "dataset.json").read_bytes())
        if info["format"] in PREPARED:
            return info
    except FileNotFoundError:
        raise DatasetError(
            f"{named} has neither dataset.json nor tokens that others prepared: it is unfinished; prepare it "
            f"again. JSON lines as they are need --config=FILE:dataset=jsonl"
        ) from None
    except (json.JSONDecodeError, UnicodeError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None
    raise DatasetError(f"{named} has format {info['format']}, this Trainit reads {FORMAT}: prepare it again")


def _damaged(folder: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{folder / 'dataset.json'} is damaged ({error}); prepare the dataset again")


def _open_split(folder: Path, name: str, info: dict) -> Split:
    split, widths = info["splits"][name], {"documents": 8, "bytes": 8, "subsets": 2}
    widths |= {"tokens": np.dtype(info["dtype"]).itemsize} | ({"marks": 1} if info["format"] == CHAT else {})
    for shard in split["shards"]:
        path = folder / shard["file"]
        for part, width in widths.items():
            count = shard["tokens" if part in ("tokens", "marks") else "documents"]
            file, expected = path.with_suffix(f".{part}"), width * count
            actual = file.stat().st_size if file.exists() else "no"
            if actual != expected:
                wrong = f"{file} has {actual} bytes instead of {expected}"
                raise DatasetError(f"{wrong}; copy or prepare the dataset again")
    paths = tuple(str(folder / shard["file"]) for shard in split["shards"])
    sizes = tuple(shard["tokens"] for shard in split["shards"])
    about = {"below": info["vocab_size"], "subsets": tuple(info["subsets"]), "marked": info["format"] == CHAT}
    return Split(
        name, paths, sizes, marks.DTYPE if about["marked"] else info["dtype"], split["bytes"], **about
    )
