"""Measures the loader of one process on one core: speed, resuming, memory."""

import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from trainit.config import MESH_AXES
from trainit.data import loader
from trainit.data.dataset import Split
from trainit.data.rows.order import Ordered, Shuffled
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh
from trainit.tools import timing

BATCH, LENGTH, SECONDS = 64, 1024, 1.5  # sequences of a batch, their tokens, for how long each is timed
COLD_BATCHES = 20  # that are read from the disk
HUGE = 300_000_000_000  # tokens, as many as the Pile has


def measure(tokens: int) -> Iterator[str]:
    """Yields the loader's speed from the page cache and from the disk, its time to resume, its memory.

    It reads a synthetic dataset of this many tokens.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        draw = np.random.default_rng(0)
        draw.integers(0, 50257, tokens, np.uint16).tofile(file.name)
        Path(file.name).read_bytes()  # brings it into the page cache
        rates = [  # in turn, so that both see the same machine
            (_rate(_random_crops(file.name, draw)), _rate(_batches(file.name, tokens))) for _ in range(3)
        ]
        crops, own = map(median, zip(*rates, strict=True))
        resumes = [partial(_first_batch, file.name, tokens, step) for step in (0, 1_000_000)]
        first, millionth = (1e3 * median(seconds) for seconds in timing.in_turn(resumes, 7))
        cold, one_by_one = (_cold_rate(file.name, tokens, together) for together in (True, False))
    os.sched_setaffinity(0, cores)
    yield f"{own / 1e6:7.1f} M tokens/s  through Grain to the device; one core, batches of {BATCH * LENGTH}"
    yield f"{own / crops:7.2f} times the speed of random crops from a memmap ({crops / 1e6:.1f} M tokens/s)"
    yield f"{cold / 1e6:7.1f} M tokens/s  read from the disk; {cold / one_by_one:.1f} times those row by row"
    yield f"{millionth:7.1f} ms  to the first batch of a resume at step 1,000,000; {first:.1f} at step 0"

    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        os.truncate(file.name, 2 * HUGE)  # a hole, which takes no space
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory, mapped = pool.apply(_memory, (file.name, HUGE))
    yield (
        f"{memory:7d} MiB  of a whole process that reads {HUGE / 1e9:.0f} billion tokens; {mapped} more are "
        f"pages of files, which the system may take back"
    )


def _rate(batches: Iterator) -> float:
    """Returns the tokens per second of an iterator over batches, after its first ones."""
    for _ in range(10):
        next(batches)
    return BATCH * LENGTH * timing.rate(batches, SECONDS)


def _shuffled(path: str, tokens: int) -> Ordered:
    split = Split("train", (path,), (tokens,), "<u2", 4 * tokens)
    return Ordered(split, Shuffled(split.sequences(LENGTH), 0))


def _batches(path: str, tokens: int, first_row: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Yields shuffled batches of a file of uint16 ids, on one device."""
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.local_devices()[:1])
    return loader.batches(_shuffled(path, tokens), (1, BATCH, LENGTH), batch_sharding(mesh), first_row)


def _first_batch(path: str, tokens: int, step: int) -> dict[str, jax.Array]:
    return next(_batches(path, tokens, step * BATCH))


def _random_crops(path: str, draw: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Yields what nanoGPT's get_batch does: inputs and targets at random places, stacked, as int64."""
    ids = np.memmap(path, np.uint16, "r")
    while True:
        starts = draw.integers(0, len(ids) - LENGTH, BATCH)
        yield [np.stack([ids[i + j : i + j + LENGTH].astype(np.int64) for i in starts]) for j in (0, 1)]


def _cold_rate(path: str, tokens: int, together: bool) -> float:
    """Returns the tokens per second from the disk, if rows are read a batch together or one by one."""
    # The source is new, since the system does not drop pages that are mapped.
    source: Any = _shuffled(path, tokens)
    row = np.empty(LENGTH + 1, np.uint16)
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read():
        for positions in np.arange(COLD_BATCHES * BATCH).reshape(COLD_BATCHES, BATCH):
            if together:
                source.read(positions, LENGTH)
                continue
            for sequence in source.order(positions).tolist():
                source.split.copy(row, min(sequence * LENGTH, tokens - len(row)))

    return COLD_BATCHES * BATCH * LENGTH / timing.seconds(read)


def _memory(path: str, tokens: int) -> list[int]:
    """Returns the MiB of this process's own memory and of mapped files after reading batches of the file."""
    jax.config.update("jax_platforms", "cpu")
    batches = _batches(path, tokens)
    for _ in range(100):
        next(batches)
    status = Path("/proc/self/status").read_text()
    return [int(re.findall(rf"{name}:\s+(\d+)", status)[0]) // 1024 for name in ("RssAnon", "RssFile")]
