"""Documents out of files, as a stream: .jsonl, .jsonl.zst, .jsonl.gz, .txt and .parquet.

One process reads a file in order, in batches of about a MiB, which others may parse and encode. A batch has
the position in the file after it, and reading can start again from there after a stop. Memory is bounded by
a few batches and the largest document. A .txt is read in pieces, so that its length does not matter.
"""

import codecs
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging

from trainit.data.documents.decompress import DamagedError, chunks
from trainit.data.documents.inputs import files_below, short_names
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import ByteTokenizer, Cut, pieces
from trainit.tokenizers.chat import conversation

BATCH = 1 << 20  # bytes of text
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt", ".parquet")
LINES = SUFFIXES[:3]
Fields = tuple[str, ...]  # dotted names of text and subset, or of messages, subset and tools
ALIKE = re.compile(r"\.(jsonl?|txt|parquet)\b", re.IGNORECASE)  # in names that one would expect to be read


class BrokenInputError(ValueError):
    """Input that cannot be read and is not to be skipped. The message names file, line and reason."""


class Document(NamedTuple):
    """A document, or with .txt a piece of one."""

    text: str
    subset: str
    line: int  # of the file, or row, from 1
    first: bool = True  # piece of its document
    last: bool = True
    hash: bytes = b""  # the whole document's; empty: `text` is the whole document


@dataclass(frozen=True)
class Position:
    """Where reading continues: after this many bytes (as decompressed) and lines of a file."""

    file: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Broken:
    """Something that cannot be read. `line` is the document's, or the last one before a file's damage."""

    file: str
    line: int
    reason: str
    damaged: bool = False  # the rest of the file is lost

    def __str__(self) -> str:
        where = f"after line {self.line}" if self.damaged else f"line {self.line}"
        return f"{self.file}: {where}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of a file: lines of JSON, or texts."""

    file: str
    position: Position  # after the batch
    read: int  # bytes of the file as it is on disk, up to here
    line: int = 0  # lines of the file before it
    lines: bytes = b""
    documents: list[Document] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)


def suffix(path: Path) -> str | None:
    """Returns the one of SUFFIXES that the path ends in, or None."""
    return next((s for s in reversed(SUFFIXES) if path.name.endswith(s)), None)


def read(
    path: Path, name: str, fields: Fields, start: Position, cut: Cut = ByteTokenizer.cut
) -> Iterator[Batch]:
    """Yields the batches of a file from `start` on. If its end is damaged, the last batch's `broken` says so.

    Messages call the file `name`. In parquet, only the columns `fields` are read. `cut` is that of the
    tokenizer that will encode the pieces of a .txt. Raises OSError if the file cannot be opened or read.
    """
    reader = _read_parquet if path.suffix == ".parquet" else _read_lines
    is_text = path.suffix == ".txt"
    line = start.line
    try:
        for batch in _read_text(path, name, start, cut) if is_text else reader(path, name, fields, start):
            line = batch.position.line
            yield batch
    except DamagedError as error:
        broken = [Broken(name, line, str(error), damaged=True)]
        yield Batch(name, Position(start.file + 1), path.stat().st_size, broken=broken)


def _read_lines(path: Path, name: str, fields: Fields, start: Position) -> Iterator[Batch]:
    """Yields whole lines, about BATCH bytes of them at a time."""
    position, size = start, 0
    parts: list[bytes] = []

    def batch(lines: bytes) -> Batch:
        nonlocal position
        before = position.line
        position = replace(position, offset=position.offset + len(lines), line=before + lines.count(b"\n"))
        return Batch(name, position, file.tell(), before, lines)

    with path.open("rb") as file:
        damage = None
        try:
            for chunk in chunks(path, file, start.offset):
                cut = chunk.rfind(b"\n") + 1
                if size + cut >= BATCH and cut:
                    yield batch(b"".join([*parts, chunk[:cut]]))
                    parts, size, chunk = [], 0, chunk[cut:]  # noqa: PLW2901
                parts.append(chunk)
                size += len(chunk)
        except DamagedError as error:
            damage = error
        rest = b"".join(parts)
        if damage and not _is_whole(rest):  # the rest after the last whole line is incomplete
            rest = rest[: rest.rfind(b"\n") + 1]
        if rest:
            yield batch(rest)
        if damage:
            raise damage


def _is_whole(lines: bytes) -> bool:
    """Whether the last line is a whole record, though no end of line follows it."""
    try:
        return isinstance(json.loads(lines[lines.rfind(b"\n") + 1 :]), dict)
    except (ValueError, RecursionError):
        return False


def parse(batch: Batch, fields: Fields) -> tuple[list[Document], list[Broken]]:
    """Returns the documents of a batch, and its lines that are no documents. Blank lines are skipped."""
    documents, broken = list(batch.documents), list(batch.broken)
    for number, line in enumerate(batch.lines.split(b"\n"), start=batch.line + 1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        try:
            record = json.loads(line.decode("utf8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
            documents.append(_document(record, fields, number))
        except UnicodeDecodeError as error:
            broken.append(Broken(batch.file, number, f"invalid UTF-8 at byte {error.start}"))
        except json.JSONDecodeError as error:
            broken.append(Broken(batch.file, number, f"invalid JSON at character {error.pos}: {error.msg}"))
        except (ValueError, RecursionError) as error:
            broken.append(Broken(batch.file, number, str(error)))
    return documents, broken


def encode(
    documents: list[Document], tokenizer: Tokenizer, file: str
) -> tuple[list[Document], list[np.ndarray], list[Broken]]:
    """Returns the documents that have ids, the ids of each without an end of text, and those without ids."""
    try:
        texts, continued = [d.text for d in documents], [not d.first for d in documents]
        return documents, tokenizer.encode(texts, continued), []
    except ValueError:  # one of them has no ids: they are encoded one by one to find it
        kept, encoded, broken = [], [], []
    for document in documents:
        try:
            encoded += tokenizer.encode([document.text], [not document.first])
            kept.append(document)
        except ValueError as error:
            broken.append(Broken(file, document.line, str(error)))
    return kept, encoded, broken


def first_texts(path: Path, fields: Fields) -> list[str]:
    """Returns texts at the beginning of a file, as far as it can be read, to show examples of."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".txt":
                return [file.read(4096).decode("utf8", "ignore")]
        return [d.text[:4096] for d in parse(next(read(path, "", fields, Position())), fields)[0][:32]]
    except (OSError, ValueError, StopIteration):  # it is reported when it is read
        return []


def find_files(patterns: Sequence[str], option: str, suffixes: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Returns the files that globs and folders name, each once, and their names below the common folder.

    A file that is named by a link too is taken once, by the name that comes first. Folders are searched at
    all depths, for names with one of `suffixes`; names that are like these are logged. Raises ValueError,
    with one line that names `option`, if a pattern names nothing or something else, and OSError for a folder
    that cannot be read.
    """
    kinds, paths = ", ".join(suffixes), []
    for pattern in patterns:
        if Path(pattern).is_dir():
            below = files_below(Path(pattern))
            matches = [path for path in below if path.name.endswith(tuple(suffixes))]
            if others := [path for path in sorted({*below} - {*matches}) if ALIKE.search(path.name)]:
                text = "%d files of %s are not read: their names end in none of %s; the first is %s"
                logging.info(f"data       {text}", len(others), pattern, kinds, others[0])
        elif Path(pattern).exists():  # its name may have brackets
            matches = [Path(pattern)]
        else:
            matches = [Path(path) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207
        if not matches:
            raise ValueError(f"{option}={pattern!r}: there is no such file ({kinds})")
        paths += sorted(matches)
    for path in paths:
        if not path.name.endswith(tuple(suffixes)):
            raise ValueError(f"{option}: {path} is no file that ends in one of {kinds}")
        if not path.is_file():
            raise ValueError(f"{option}: {path} is a folder, a link to nothing, or another thing than a file")
    once = {path.resolve(): path for path in reversed(paths)}
    paths = [Path(os.path.abspath(path)) for path in paths if once[path.resolve()] is path]  # noqa: PTH100
    return paths, short_names(paths)


def _field(record: Any, dotted: str) -> Any:
    """Returns what a dotted name leads to, None if nothing. Keys may have dots, as in flat tables."""
    if not dotted or not isinstance(record, dict):
        return None
    if dotted in record:
        return record[dotted]
    dots = (i for i, letter in enumerate(dotted) if letter == ".")
    found = (_field(record.get(dotted[:i]), dotted[i + 1 :]) for i in dots)
    return next((value for value in found if value is not None), None)


def _document(record: Any, fields: Fields, line: int) -> Document:
    text, subset, *tools = (_field(record, name) for name in fields)
    if tools:
        text = conversation.checked(text, *tools)
    if type(text) is not str:
        raise ValueError(f"field {fields[0]} is {'missing' if text is None else 'not a text'}")
    # A subset that is null, or the NaN that tables have for it, is none.
    return Document(text, "" if subset is None or subset != subset else str(subset), line)


def _read_text(path: Path, name: str, start: Position, cut: Cut) -> Iterator[Batch]:
    """Reads one document, piece by piece. It is read twice: first to check that all of it is UTF-8."""
    with path.open("rb") as file:
        decoder, digest, line = codecs.getincrementaldecoder("utf8")(), blake2b(digest_size=16), 1
        chunk = b"..."
        while chunk:
            chunk = file.read(BATCH)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                broken = Broken(name, line, "invalid UTF-8; a .txt file is one document")
                yield Batch(name, Position(start.file + 1), file.seek(0, 2), broken=[broken])
                return
            digest.update(chunk)
            line += chunk.count(b"\n")
        file.seek(start.offset)
        documents, size, offset = [], 0, start.offset
        for piece, last in pieces(_decoded(file), cut):
            documents.append(Document(piece, "", 1, offset == 0, last, digest.digest()))
            size, offset = size + len(piece), offset + len(piece.encode())
            if size >= BATCH or last:
                position = Position(start.file + 1) if last else replace(start, offset=offset)
                yield Batch(name, position, offset, documents=documents)
                documents, size = [], 0


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Yields the rest of a text in chunks."""
    chunk, decoder = b"...", codecs.getincrementaldecoder("utf8")()
    while chunk:
        chunk = file.read(BATCH)
        yield decoder.decode(chunk, final=not chunk)


def _read_parquet(path: Path, name: str, fields: Fields, start: Position) -> Iterator[Batch]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install 'trainit[parquet]'") from None
    bytes_on_disk, row, size, documents, broken = path.stat().st_size, 0, 0, [], []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            available = [file.schema.column(i).path for i in range(len(file.schema))]
            if fields[0] not in available:
                raise DamagedError(f"there is no column {fields[0]}, only {', '.join(available)}")
            columns = [column for column in fields if column in available]
            total = file.metadata.num_rows
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start.line:
                    row += rows
                    continue
                for few in file.iter_batches(16, row_groups=[group], columns=columns, use_threads=False):
                    for i, record in enumerate(_records(few), start=1):
                        if row + i > start.line:
                            try:
                                if record is None:
                                    raise ValueError("invalid UTF-8")
                                documents.append(_document(record, fields, row + i))
                                size += len(documents[-1].text)
                            except ValueError as error:
                                broken.append(Broken(name, row + i, str(error)))
                    row += few.num_rows
                    if size >= BATCH or row == total:
                        read = bytes_on_disk * row // total
                        yield Batch(name, replace(start, line=row), read, 0, b"", documents, broken)
                        size, documents, broken = 0, [], []
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedError(f"damaged parquet file ({error})") from None


def _records(rows: Any) -> list[dict | None]:
    """Returns rows as dicts, and None for each whose text is not UTF-8."""
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        if rows.num_rows == 1:
            return [None]
        return [record for i in range(rows.num_rows) for record in _records(rows.slice(i, 1))]
