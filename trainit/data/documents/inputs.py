"""What identifies files of input, so that files which were edited or replaced since are noticed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

SAMPLES, SAMPLE = 16, 1 << 14  # of a file, evenly spaced from its beginning to its end; bytes of each
THREADS = 16  # network file systems answer many requests at a time


class Input(NamedTuple):
    """A file of input. In JSON, it is a list."""

    name: str  # in messages
    size: int  # bytes
    changed: int = 0  # time of the last change, in nanoseconds since 1970
    samples: str = ""  # digest of samples, or of all of a small file; empty in records of earlier versions


def describe(path: str | Path, name: str, known: Input | None = None, count: int = SAMPLES) -> Input:
    """Describes a file, by `count` samples, or as the `known` one if it has its size and time of change."""
    with Path(path).open("rb") as file:
        about = os.fstat(file.fileno())
        if known and known[1:3] == (about.st_size, about.st_mtime_ns):
            return known
        samples = hashlib.blake2b(digest_size=8)
        for start in np.linspace(0, max(about.st_size - SAMPLE, 0), count).astype(int).tolist():
            file.seek(start)
            samples.update(file.read(SAMPLE))
    return Input(name, about.st_size, about.st_mtime_ns, samples.hexdigest())


def files_below(folder: Path) -> list[Path]:
    """Returns all files of a folder and of those in it, also where links lead; each folder counts once.

    Raises OSError if one of the folders cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # by another link, or a link to a folder around it
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(root, name) for name in sorted(names)]
    return found


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Returns the names of files below the folder that they have in common."""
    common = os.path.commonpath([Path(path).parent for path in paths]) if paths else ""
    return [str(Path(path).relative_to(common)) for path in paths]


def describe_all(paths: Iterable[str | Path], names: Iterable[str], count: int = SAMPLES) -> list[Input]:
    """Describes files by `count` samples of each, several files at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda path, name: describe(path, name, count=count), paths, names))


def difference(before: Iterable[Sequence[Any]], now: Iterable[Input]) -> str:
    """Returns the first difference of files from those of a record, in words; "" if there is none.

    Only the time of change differs if a file was copied, or edited where no sample lies: that is logged.
    """
    touched: list[str] = []
    old, new = ({row[0]: Input(*row) for row in rows} for rows in (before, now))
    for name in dict.fromkeys([*old, *new]):
        if name not in new or name not in old:
            return f"{name}, which is {'new' if name in new else 'not there any more'}"
        was, file = old[name], new[name]
        if was.size != file.size:
            return f"{name}, which has {file.size} bytes; before, it had {was.size}"
        if was.samples and was.samples != file.samples:
            return f"{name}, whose content has changed; its {file.size} bytes are as many as before"
        if was.changed not in (0, file.changed) and file.size > SAMPLES * SAMPLE:
            touched.append(name)
    if touched:
        text = (
            "%d files have another time of change than before, but sizes and samples of their content agree"
        )
        logging.info(f"data       {text}: they count as the same; the first is %s", len(touched), touched[0])
    return "the order of the files" if list(old) != list(new) else ""


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Returns a text that is the same whatever the times of change in a `TrainingData.identity`."""
    files = {
        role: [(row.name, row.size, row.samples) for row in of] for role, of in identity["inputs"].items()
    }
    return hashlib.blake2b(json.dumps([identity["dataset"], files]).encode(), digest_size=8).hexdigest()


def changes(meta: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Returns what has changed in "dataset" and "validation" since a checkpoint with this meta data.

    `now` is `TrainingData.identity`: "dataset", a text that is the same for the same tokens in the same
    order, wherever the files lie, and "inputs", by role the files that others made and may change. Roles of
    those to validate with begin with "validation". Earlier checkpoints name no files: only "dataset" counts.
    """
    before, files = meta.get("inputs", {}), now["inputs"]
    found = {}
    for role in files.keys() & before.keys():
        if text := difference(before[role], files[role]):
            found["validation" if role.startswith("validation") else "dataset"] = text
    if meta["dataset"] != now["dataset"]:
        found.setdefault("dataset", f"dataset {meta['dataset']}, which is {now['dataset']} now")
    return found
