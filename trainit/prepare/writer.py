"""The files of one unit of work, which grow while it is prepared and can be resumed.

A unit is a file of the input, or several small consecutive ones. While it is worked on, its files only grow,
and every few seconds a journal records, atomically, how long they are and which input they contain. After a
stop of any kind, what they hold beyond the journal is cut off, and work continues from there:

    unfinished/UNIT.json            the journal
    unfinished/SHARD.tokens, .documents, .bytes, .subsets    as in trainit/data/dataset.py, but that subsets
                                    are numbered by the unit
    unfinished/UNIT.SPLIT.hashes    16 bytes for each document, where duplicates are to be found
"""

import errno
import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from trainit.cluster.files import errors_name, write_atomically
from trainit.data.dataset import dtype_of
from trainit.data.documents import conversations
from trainit.data.documents.inputs import Input
from trainit.data.documents.reader import Batch, Broken, BrokenInputError, Fields, Position, parse
from trainit.data.documents.reader import encode as encode_documents
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import to_bytes
from trainit.tokenizers.chat import marks

LISTED = 1000  # of what is broken in a unit; all is counted
HASH = 16  # bytes of a document's hash: BLAKE2b
PARTS = ("tokens", "documents", "bytes", "subsets")  # the files of a shard of texts


class StateError(ValueError):
    """The unfinished folder is not as it was left, or is in use."""


@dataclass(frozen=True)
class Recipe:
    """What decides, together with the input and the tokenizer, which tokens come out."""

    text_field: str = "text"
    subset_field: str = "meta.pile_set_name"
    on_error: str = "stop"
    validation_fraction: float = 0.0
    deduplicate: bool = False
    shard_tokens: int = 1 << 28  # half a GiB of uint16
    chat: str | None = (
        None  # how conversations are written, of `chat.template.settings`; None: these are texts
    )

    @property
    def fields(self) -> Fields:
        """What is read of a line or row."""
        return conversations.fields(self.text_field, self.subset_field, self.chat)

    @property
    def parts(self) -> tuple[str, ...]:
        """The files of a shard."""
        return ("marks", *PARTS) if self.chat else PARTS


@dataclass(frozen=True)
class Unit:
    """Work that one process does in order. Its name is SPLIT-NUMBER."""

    name: str
    paths: tuple[Path, ...]
    inputs: tuple[Input, ...]  # the files as they were at the start, and what messages call them

    @property
    def split(self) -> str:
        return self.name.partition("-")[0]


class Part(NamedTuple):
    """The documents of a batch that go to one split; n of them, or pieces of them."""

    ids: np.ndarray  # of all documents, each ended by the end-of-text id; with marks, of conversations
    lengths: np.ndarray  # int64 (n,): ids of each
    bytes: np.ndarray  # int64 (n,): UTF-8 bytes of each
    subsets: np.ndarray  # int64 (n,): number of its subset among the batch's names
    first: np.ndarray  # bool (n,): whether its document begins with it
    last: np.ndarray  # bool (n,): whether its document ends with it
    hashes: np.ndarray  # uint8 (n, HASH)


class Encoded(NamedTuple):
    """A batch, encoded."""

    parts: dict[str, Part]
    names: list[str]  # of subsets, in order of appearance
    broken: list[Broken]


def encode(batch: Batch, tokenizer: Tokenizer, recipe: Recipe, split: str) -> Encoded:
    """Parses and encodes a batch; a function of its arguments alone, whoever calls it."""
    documents, broken = parse(batch, recipe.fields)
    if recipe.chat:
        documents, encoded, without_ids = conversations.encode(documents, tokenizer, recipe.chat, batch.file)
        token_bytes = tokenizer.token_bytes()
    else:
        documents, encoded, without_ids = encode_documents(documents, tokenizer, batch.file)
    names = list(dict.fromkeys(document.subset for document in documents))
    number = {name: i for i, name in enumerate(names)}
    hashed = recipe.deduplicate or recipe.validation_fraction
    chosen: dict[str, list] = {}
    for document, ids in zip(documents, encoded, strict=True):
        content = to_bytes(document.text)
        digest = document.hash or (hashlib.blake2b(content, digest_size=HASH).digest() if hashed else b"")
        aside = int.from_bytes(digest[:8], "big") < recipe.validation_fraction * 2.0**64
        size = int(token_bytes[marks.ids_of(ids)].sum()) if recipe.chat else len(content)
        chosen.setdefault("validation" if hashed and aside else split, []).append(
            (ids, size, number[document.subset], document.first, document.last, digest)
        )
    dtype, end = (
        (marks.DTYPE, None) if recipe.chat else (dtype_of(tokenizer.vocab_size), tokenizer.end_of_text)
    )
    parts = {name: _part(rows, dtype, end, bool(recipe.deduplicate)) for name, rows in chosen.items()}
    return Encoded(parts, names, sorted([*broken, *without_ids], key=lambda b: b.line))


def _part(rows: list[tuple], dtype: str, end_of_text: int | None, hashed: bool) -> Part:
    ids, sizes, subsets, first, ends, hashes = zip(*rows, strict=True)
    last = np.array(ends)
    lengths = np.array([len(one) for one in ids], np.int64) + (last if end_of_text is not None else 0)
    joined, at = np.empty(lengths.sum(), dtype), 0
    for one, length, is_last in zip(ids, lengths.tolist(), ends, strict=True):
        joined[at : at + len(one)] = one
        at += length
        if is_last and end_of_text is not None:
            joined[at - 1] = end_of_text
    digests = np.frombuffer(b"".join(hashes) if hashed else b"", np.uint8).reshape(-1, HASH)
    return Part(joined, lengths, np.array(sizes), np.array(subsets), np.array(first), last, digests)


class GrowingFile:
    """A file that grows, its size and its hash. What it holds beyond `size` is cut off."""

    def __init__(self, path: Path, size: int = 0):
        self.path, self.size = path, size
        self.file = path.open("r+b" if size else "w+b")
        if path.stat().st_size < size:
            raise StateError(f"{path} is shorter than its journal says; remove its folder, start again")
        self.file.truncate(size)
        self.sha256 = hashlib.file_digest(self.file, "sha256")

    def write(self, array: np.ndarray):
        content = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        with errors_name(self.path):
            self.file.write(content)
        self.sha256.update(content)
        self.size += len(content)

    def sync(self):
        with errors_name(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.sync()
        self.file.close()


class SplitWriter:
    """The shards that a unit makes for one split."""

    def __init__(self, folder: Path, unit: Unit, split: str, dtype: str, recipe: Recipe, state: dict):
        """Continues from what `state()` returned when the files were last synced; empty: from the start."""
        self.folder, self.stem, self.dtype, self.recipe = folder, f"{split}-{unit.name[-5:]}", dtype, recipe
        self.shards = state.get("shards", [])
        self.bytes = state.get("bytes", 0)  # UTF-8 bytes of text in the open shard
        self.files = self._open(state["open"]) if state.get("open") else {}
        hashes = folder / f"{unit.name}.{split}.hashes"
        self.hashes = GrowingFile(hashes, state.get("hashes", 0)) if recipe.deduplicate else None

    def _open(self, sizes: dict[str, int]) -> dict[str, GrowingFile]:
        shard = f"{self.stem}-{len(self.shards):05d}"
        return {part: GrowingFile(self.folder / f"{shard}.{part}", sizes[part]) for part in self.recipe.parts}

    def write(self, part: Part, subsets: np.ndarray):
        """Appends a part; `subsets` (n,) numbers its documents' subsets in the unit.

        A shard is closed at the first document end past `recipe.shard_tokens`.
        """
        ends, text_ends = np.cumsum(part.lengths), np.cumsum(part.bytes)
        starts = ends - part.lengths
        if self.hashes:
            self.hashes.write(part.hashes[part.first])
        begin = 0
        while begin < len(ends):
            if not self.files:
                self.files = self._open(dict.fromkeys(self.recipe.parts, 0))
            tokens = self.files["tokens"]
            before = tokens.size // np.dtype(self.dtype).itemsize - int(starts[begin])
            full = (ends[begin:] + before >= self.recipe.shard_tokens) & part.last[begin:]
            closes = bool(full.any())
            stop = begin + int(full.argmax()) + 1 if closes else len(ends)
            first, last = (begin + np.flatnonzero(of[begin:stop]) for of in (part.first, part.last))
            text_before = self.bytes - int(text_ends[begin] - part.bytes[begin])
            ids = part.ids[starts[begin] : ends[stop - 1]]
            if "marks" in self.files:
                self.files["marks"].write(marks.marks_of(ids))
                ids = marks.ids_of(ids).astype(self.dtype)
            tokens.write(ids)
            self.files["documents"].write((starts[first] + before).astype("<u8"))
            self.files["bytes"].write((text_ends[last] + text_before).astype("<u8"))
            self.bytes = int(text_ends[stop - 1]) + text_before
            self.files["subsets"].write(subsets[first].astype("<u2"))
            if closes:
                self.close_shard()
            begin = stop

    def close_shard(self):
        """Ends the shard that is open, if one is."""
        if not self.files:
            return
        files, self.files, self.bytes = self.files, {}, 0
        for file in files.values():
            file.close()
        description = {
            "file": files["tokens"].path.name,
            "tokens": files["tokens"].size // np.dtype(self.dtype).itemsize,
            "documents": files["documents"].size // 8,
            "sha256": {part: file.sha256.hexdigest() for part, file in files.items()},
        }
        self.shards.append(description)

    def state(self) -> dict:
        """What a journal must know, after everything before it is on the disk."""
        for file in [*self.files.values(), *([self.hashes] if self.hashes else [])]:
            file.sync()
        return {
            "shards": self.shards,
            "open": {part: file.size for part, file in self.files.items()},
            "bytes": self.bytes,
            "hashes": self.hashes.size if self.hashes else 0,
        }


class UnitWriter:
    """Everything that a unit makes, and its journal. One process at a time may hold it."""

    def __init__(self, folder: Path, unit: Unit, dtype: str, recipe: Recipe):
        self.folder, self.unit, self.dtype, self.recipe = folder, unit, dtype, recipe
        self._lock = (folder / f"{unit.name}.lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not handed down to child processes
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise StateError(f"{unit.name} of {folder} is being prepared by another process") from None
            unlocked = "%s has no file locks (%s): see to it that one process at a time prepares a part of it"
            logging.warning(unlocked, folder, error.strerror)
        journal = read_journal(folder, unit)
        self.done = journal.get("done", False)
        self.position = Position(**journal.get("position", {}))
        self.subsets: list[str] = journal.get("subsets", [])
        self.counts: dict[str, list[list[int]]] = journal.get("counts", {})
        self.broken: dict = journal.get("broken", {"count": 0, "damaged_files": 0, "list": []})
        states = {} if self.done else journal.get("splits", {})
        self.splits = {name: self._split(name, state) for name, state in states.items()}

    def _split(self, name: str, state: dict) -> SplitWriter:
        return SplitWriter(self.folder, self.unit, name, self.dtype, self.recipe, state)

    def write(self, position: Position, encoded: Encoded):
        """Appends an encoded batch. The input continues at `position` after it.

        Raises:
            BrokenInputError: it has something that cannot be read, and the recipe says to stop.
        """
        if encoded.broken and self.recipe.on_error == "stop":
            raise BrokenInputError(f"{encoded.broken[0]}; --on_error=skip leaves out and lists the broken")
        known = list(dict.fromkeys([*self.subsets, *encoded.names]))
        if len(known) > 1 << 16:
            raise BrokenInputError("more than 65,536 subsets: is --subset_field the right one?")
        self.subsets = known
        self.broken["count"] += len(encoded.broken)
        self.broken["damaged_files"] += sum(broken.damaged for broken in encoded.broken)
        left = max(LISTED - len(self.broken["list"]), 0)
        self.broken["list"] += [[broken.file, broken.line, broken.reason] for broken in encoded.broken[:left]]
        numbers = np.array([self.subsets.index(name) for name in encoded.names], np.int64)
        for split, part in encoded.parts.items():
            counts = self.counts.setdefault(split, [])
            counts += [[0, 0, 0] for _ in range(len(self.subsets) - len(counts))]
            subsets = numbers[part.subsets]
            for column, values in enumerate((part.first, part.lengths, part.bytes)):
                for row, total in zip(counts, np.bincount(subsets, values).tolist(), strict=False):
                    row[column] += round(total)
            if split not in self.splits:
                self.splits[split] = self._split(split, {})
            self.splits[split].write(part, subsets)
        self.position = position

    def commit(self, done: bool = False):
        """Records what is written so far, which will not be done again. With `done` the unit is finished."""
        for split in self.splits.values() if done else ():
            split.close_shard()
        self.done = done
        journal = {
            "done": done,
            "position": asdict(self.position),
            "subsets": self.subsets,
            "counts": self.counts,
            "broken": self.broken,
            "splits": {name: split.state() for name, split in self.splits.items()},
        }
        write_atomically(self.folder / f"{self.unit.name}.json", json.dumps(journal))
        if done:
            self.close()

    def close(self):
        self._lock.close()


def read_journal(folder: Path, unit: Unit) -> dict:
    """A unit's journal; empty before its first commit."""
    try:
        return json.loads((folder / f"{unit.name}.json").read_bytes())
    except FileNotFoundError:
        return {}
