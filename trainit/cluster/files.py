"""Files that are there in full or not at all, whenever a process is killed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainit.config import require


@contextlib.contextmanager
def errors_name(path: Path):
    """An OSError of the block names this file: one of a file that is already open names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def describe_os_error(error: OSError) -> str:
    """The file and the reason, as far as the error names them."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def write_atomically(path: Path, content: str | bytes):
    """Writes a file as `new_file` does, and forces it to the disk. An OSError names it."""
    with errors_name(path), new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into under another name, until all is written: what was there stays until then.

    One process at a time may write it. An error leaves nothing; what a kill leaves, the next call replaces.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(name: str, flag: str) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; an error or a kill leaves none.

    Raises ConfigError if there is something of this name, or none is given.
    """
    require(name != "", f"{flag}=FOLDER is missing: the folder to make")
    folder = Path(name)
    require(not folder.exists(), f"{flag}={folder} exists already; name another folder, or remove it")
    unfinished = folder.with_name(f"{folder.name}.unfinished")  # a kill may leave it
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, value: Any):
    """Writes a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
