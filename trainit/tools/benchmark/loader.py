"""Measures the loader of one process on one core: speed, resuming, memory."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainit import config as config_lib
from trainit.data import loader
from trainit.data.dataset import Split
from trainit.data.order import Ordered, Shuffled
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh

BATCH, LENGTH, SECONDS = 64, 1024, 1.5  # sequences of a batch, their tokens, for how long each is timed
HUGE = 300_000_000_000  # tokens, as many as the Pile has


def measure(dataset_tokens: int):
    """Prints the loader's speed from the page cache and from the disk, its time to resume, its memory.

    Args:
        dataset_tokens: the size of the synthetic dataset that is read.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    tokens = BATCH * LENGTH
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        draw = np.random.default_rng(0)
        draw.integers(0, 50257, dataset_tokens, np.uint16).tofile(file.name)
        Path(file.name).read_bytes()  # brings it into the page cache
        crop_rates, own_rates = [], []
        for _ in range(3):  # in turn, so that both see the same machine
            crop_rates.append(_rate(_random_crops(file.name, draw), tokens))
            own_rates.append(_rate(_batches(file.name, dataset_tokens), tokens))
        crops, own = statistics.median(crop_rates), statistics.median(own_rates)
        resumed: dict[int, list[float]] = {0: [], 1_000_000: []}  # by step
        for _ in range(7):
            for step, seconds in resumed.items():
                start = time.perf_counter()
                next(_batches(file.name, dataset_tokens, step * BATCH))
                seconds.append(time.perf_counter() - start)
        cold, one_by_one = (_cold_rate(file.name, dataset_tokens, read) for read in (_together, _one_by_one))
    os.sched_setaffinity(0, cores)
    first, millionth = (1e3 * statistics.median(seconds) for seconds in resumed.values())
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        os.truncate(file.name, 2 * HUGE)  # a hole, which takes no space
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory, mapped = pool.apply(_memory, (file.name, HUGE))
    lines = [
        f"{own / 1e6:7.1f} M tokens/s  through Grain to the device; one core, batches of {tokens}",
        f"{own / crops:7.2f} times the speed of random crops from a memmap, stacked as int64 "
        f"({crops / 1e6:.1f} M tokens/s)",
        f"{cold / 1e6:7.1f} M tokens/s  read from the disk; {cold / one_by_one:.1f} times the speed of one "
        f"row after another",
        f"{millionth:7.1f} ms  to the first batch of a resume at step 1,000,000; {first:.1f} at step 0 "
        f"(medians of 7)",
        f"{memory:7d} MiB  of a whole process that reads {HUGE / 1e9:.0f} billion tokens; {mapped} more are "
        f"pages of files, which the system may take back",
    ]
    print("\n".join(f"loader  {line}" for line in lines), flush=True)


def _rate(batches: Iterator, tokens: int) -> float:
    """Returns the tokens per second of an iterator over batches, after its first ones."""
    for _ in range(10):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += 1
    return count * tokens / (time.perf_counter() - start)


def _shuffled(path: str, tokens: int) -> Ordered:
    split = Split("train", (path,), (tokens,), "<u2", 4 * tokens)
    return Ordered(split, Shuffled(split.sequences(LENGTH), 0))


def _batches(path: str, tokens: int, first_row: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Yields shuffled batches of a file of uint16 ids, on one device."""
    mesh = make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    return loader.batches(_shuffled(path, tokens), (1, BATCH, LENGTH), batch_sharding(mesh), first_row)


def _random_crops(path: str, draw: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Yields what nanoGPT's get_batch does: inputs and targets at random places, stacked, as int64."""
    ids = np.memmap(path, np.uint16, "r")
    while True:
        starts = draw.integers(0, len(ids) - LENGTH, BATCH)
        yield [
            np.stack([ids[i + shift : i + shift + LENGTH].astype(np.int64) for i in starts])
            for shift in (0, 1)
        ]


def _together(source: Any, positions: np.ndarray, tokens: int):
    source.read(positions, LENGTH)


def _one_by_one(source: Any, positions: np.ndarray, tokens: int):
    row = np.empty(LENGTH + 1, np.uint16)
    for sequence in source.order(positions).tolist():
        source.split.copy(row, min(sequence * LENGTH, tokens - len(row)))


def _cold_rate(path: str, tokens: int, read: Callable[[Any, np.ndarray, int], None]) -> float:
    """Returns the tokens per second from the disk if the rows of batches are read like this."""
    # The source is new, since the system does not drop pages that are mapped.
    source = _shuffled(path, tokens)
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for batch in range(20):
        read(source, np.arange(batch * BATCH, (batch + 1) * BATCH), tokens)
    return 20 * BATCH * LENGTH / (time.perf_counter() - start)


def _memory(path: str, tokens: int) -> tuple[int, int]:
    """Returns the MiB of this process's own memory and of mapped files after reading batches of the file."""
    jax.config.update("jax_platforms", "cpu")
    batches = _batches(path, tokens)
    for _ in range(100):
        next(batches)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped
