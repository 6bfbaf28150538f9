"""Digests of a checkpoint's files: made while it is saved, compared before anything of it is used.

Orbax checks little of what it reads: OCDBT has checksums in its own nodes, but arrays of more than some KiB
lie outside of them, as zstd frames without one. So each process digests the files that it has written, as
soon as they are; process 0 adds the few others, and writes all to `digests.json` before the checkpoint gets
its name. The hash is 128-bit XXH3 (xxhash.com), which is as fast as memory. It finds what is torn, mixed
up or rotten, but is no protection from somebody who wants to deceive.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from trainit.cluster.files import write_atomically, write_json

FILE = "digests.json"
ALGORITHM = "xxh3_128"
BLOCK_BYTES = 1 << 26  # each block has its digest, so that threads and processes can share large files
READ_BYTES = 1 << 19  # at a time, so that it stays in the processor's cache
WRITER = "ocdbt.process_"  # and the number of the process that has written the folder
ORBAX_METADATA = "_CHECKPOINT_METADATA"
WAIT_SECONDS = 60  # for Orbax's thread that writes them
LATE = "commit_success.txt"  # Orbax writes it after the digests, and reads it on object stores alone


def digest_own_part(item: Path, process: int) -> None:
    """Digests what this process has written of an item of an unfinished checkpoint, for `collect`."""
    folder = item / f"{WRITER}{process}"
    if folder.is_dir():
        write_atomically(folder / FILE, json.dumps(_describe(folder, _names(folder))))


def collect(unfinished: Path) -> None:
    """Writes the digests of all files into a checkpoint. Process 0 calls it when all have written theirs.

    Raises TimeoutError if Orbax does not write its metadata.
    """
    _wait_for_metadata(unfinished / ORBAX_METADATA)
    files: dict[str, dict] = {}
    for part in unfinished.glob(f"*/{WRITER}*/{FILE}"):
        folder = part.parent.relative_to(unfinished)
        files |= {f"{folder}/{name}": about for name, about in json.loads(part.read_bytes()).items()}
        part.unlink()
    files |= _describe(unfinished, [name for name in _names(unfinished) if name not in files])
    content = {"algorithm": ALGORITHM, "files": files}
    write_json(unfinished / FILE, content | {"digest": _digest_of(content)})


def read(checkpoint: Path) -> dict[str, dict] | None:
    """What `digests.json` has of each file: its bytes, and its blocks' digests; None if there was never one.

    Raises ValueError if it is damaged or missing.
    """
    try:
        content = json.loads((checkpoint / FILE).read_bytes())
        if content.pop("digest") == _digest_of(content) and content["algorithm"] == ALGORITHM:
            return content["files"]
    except FileNotFoundError:
        # A checkpoint that had digests says so elsewhere, too.
        about = checkpoint / ORBAX_METADATA
        if not about.is_file() or ALGORITHM not in about.read_text(errors="replace"):
            return None
        raise ValueError(f"{FILE} is missing") from None
    except OSError as error:
        raise ValueError(f"{FILE} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{FILE} is not as it was saved")


def problems(checkpoint: Path, process: int = 0, count: int = 1) -> list[str] | None:
    """Compares the files of a checkpoint with its digests: a text for each that differs; None: it has none.

    Of `count` processes, each compares a share. If as many have written the checkpoint, each has the files of
    the process of its own number, which are those that it is most likely to read next.
    """
    try:
        files = read(checkpoint)
    except ValueError as error:
        return [str(error)]
    if files is None:
        return None
    writers = 1 + max(map(_writer, files))
    blocks = [
        (name, block)
        for name in sorted(files)
        for block in range(len(files[name]["blocks"]))
        if (_writer(name) + block * writers) % count == process
    ]
    found: dict[str, str] = {}
    with _threads() as threads:
        texts = threads.map(lambda each: _compare(checkpoint, each[0], each[1], files[each[0]]), blocks)
        for (name, _), text in zip(blocks, texts, strict=True):
            if text:
                found.setdefault(name, text)
    return list(found.values())


def _compare(checkpoint: Path, name: str, block: int, about: dict[str, Any]) -> str:
    """What is wrong with a block of a file; empty if nothing is."""
    try:
        size = _size(checkpoint / name)
        if size != about["bytes"]:
            return f"{name} has {size} bytes instead of {about['bytes']}"
        if _digest(checkpoint / name, block) == about["blocks"][block]:
            return ""
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):  # Orbax's metadata are no JSON object any more
        pass
    return f"{name} is not as it was saved"


def _writer(name: str) -> int:
    """The number of the process that has written a file."""
    number = name.partition(WRITER)[2].partition("/")[0]
    return int(number) if number.isdigit() else 0


def _names(folder: Path) -> list[str]:
    """The files in a folder, relative to it, that get digests."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if str(path) not in (LATE, FILE))


def _describe(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    sizes = {name: _size(folder / name) for name in names}
    blocks = [(name, block) for name in sizes for block in range(max(-(-sizes[name] // BLOCK_BYTES), 1))]
    described: dict[str, dict] = {name: {"bytes": size, "blocks": []} for name, size in sizes.items()}
    with _threads() as threads:
        made = threads.map(lambda each: _digest(folder / each[0], each[1]), blocks)
        for (name, _), digest in zip(blocks, made, strict=True):
            described[name]["blocks"].append(digest)
    return described


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 8), "digests")


def _size(path: Path) -> int:
    return len(_lasting(path)) if path.name == ORBAX_METADATA else path.stat().st_size


def _digest(path: Path, block: int) -> str:
    """The digest of one block of a file."""
    digest = xxhash.xxh3_128()
    for part in [_lasting(path)] if path.name == ORBAX_METADATA else _parts(path, block):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: Path, block: int) -> Iterator[memoryview]:
    left, buffer = BLOCK_BYTES, memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(block * BLOCK_BYTES)
        while left and (size := file.readinto(buffer[:left])):
            yield buffer[:size]
            left -= size


def _wait_for_metadata(path: Path) -> None:
    """Waits until Orbax's metadata say that there are digests, after which only the time of the end changes.

    Orbax (0.12.8) leaves them to a thread of its own, which may come to it after the last array is written.
    """
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if json.loads(path.read_bytes())["custom_metadata"]["digests"] == ALGORITHM:
                return
        except (ValueError, KeyError, TypeError, FileNotFoundError):  # not there yet, or half of it
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{path} is not complete after {WAIT_SECONDS} s")
        time.sleep(0.001)


def _lasting(path: Path) -> bytes:
    """Orbax's metadata of a checkpoint without the time of its end, which Orbax adds after the digests."""
    about = json.loads(path.read_bytes())
    about.pop("commit_timestamp_nsecs", None)
    return json.dumps(about, sort_keys=True).encode()


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
