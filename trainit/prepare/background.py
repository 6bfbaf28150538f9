"""Compares prepared data with their digests while a run trains on them."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

BYTES_PER_SECOND = 100e6  # of a whole job, so that file systems and steps do not notice it
READ_BYTES = 1 << 20


def compare(digests: Mapping[Path, str], process: int, count: int, fail: Callable[[str], None]) -> None:
    """Starts to read this process's share of files with SHA-256, in a thread that nobody waits for.

    `fail` is called with an error of one line if a file differs. The order is drawn by chance: a run that is
    often stopped reads all of them in the end.
    """
    files = sorted(digests.items())[process::count]
    random.Random(os.urandom(8)).shuffle(files)
    if files:
        arguments = files, BYTES_PER_SECOND / count, fail
        threading.Thread(target=_compare, args=arguments, name="digests", daemon=True).start()


def _compare(files: Sequence[tuple[Path, str]], rate: float, fail: Callable[[str], None]) -> None:
    if hasattr(os, "setpriority"):  # of this thread alone, on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    for path, expected in files:
        try:
            actual = _digest(path, rate)
        except OSError as error:
            return fail(f"{path}: {error.strerror}, while the run trains on it")
        if actual != expected:
            return fail(
                f"{path} has SHA-256 {actual}, dataset.json says {expected}: the run trains on a file that "
                f"is torn or was replaced; copy or prepare the dataset again"
            )
    logging.info("%-10s %d files are as they were prepared", "data", len(files))


def _digest(path: Path, rate: float) -> str:
    """The SHA-256 of a file that is read at a rate in bytes per second."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            time.sleep(size / rate)
    return digest.hexdigest()
