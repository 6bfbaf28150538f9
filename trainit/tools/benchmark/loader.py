"""One process's loader on one core: speed, resuming, memory."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from trainit import config as config_lib
from trainit.data import loader
from trainit.data.dataset import Split
from trainit.data.order import Ordered, Shuffled
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh

LOADER_BATCH, LOADER_LENGTH, LOADER_SECONDS = 64, 1024, 1.5
HUGE = 300_000_000_000  # tokens, as of the Pile


def _rate(batches: Iterator, tokens: int) -> float:
    """Tokens per second of an iterator over batches, after its first ones."""
    for _ in range(10):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < LOADER_SECONDS:
        next(batches)
        count += 1
    return count * tokens / (time.perf_counter() - start)


def _shuffled(path: str, tokens: int) -> Ordered:
    split = Split("train", (path,), (tokens,), "<u2", 4 * tokens)
    return Ordered(split, Shuffled(split.sequences(LOADER_LENGTH), 0))


def _batches(path: str, tokens: int, first_row: int = 0) -> Iterator[dict[str, jax.Array]]:
    """Shuffled batches of a file of uint16 ids, on one device."""
    mesh = make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.local_devices()[:1])
    source = _shuffled(path, tokens)
    shape = (1, LOADER_BATCH, LOADER_LENGTH)
    return loader.batches(source, shape, batch_sharding(mesh), first_row)


def _random_crops(path: str, draw: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What nanoGPT's get_batch does: inputs and targets at random places, stacked, as int64."""
    ids = np.memmap(path, np.uint16, "r")
    while True:
        starts = draw.integers(0, len(ids) - LOADER_LENGTH, LOADER_BATCH)
        yield tuple(
            np.stack([ids[i + shift : i + shift + LOADER_LENGTH].astype(np.int64) for i in starts])
            for shift in (0, 1)
        )


def _seconds_to_first(path: str, tokens: int, first_row: int) -> float:
    start = time.perf_counter()
    next(_batches(path, tokens, first_row))
    return time.perf_counter() - start


def _cold_rates(path: str, tokens: int) -> tuple[float, float]:
    """Tokens per second from the disk: of the loader, and of the same rows read one after another."""
    row, rates = np.empty(LOADER_LENGTH + 1, np.uint16), []

    def together(source: Ordered, positions: np.ndarray):
        source.read(positions, LOADER_LENGTH)

    def one_by_one(source: Ordered, positions: np.ndarray):
        for sequence in source.order(positions).tolist():
            source.split.copy(row, min(sequence * LOADER_LENGTH, tokens - len(row)))

    for read in (together, one_by_one):
        source = _shuffled(path, tokens)  # anew, since pages that are mapped stay
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for batch in range(20):
            read(source, np.arange(batch * LOADER_BATCH, (batch + 1) * LOADER_BATCH))
        rates.append(20 * LOADER_BATCH * LOADER_LENGTH / (time.perf_counter() - start))
    return tuple(rates)


def _memory(path: str, tokens: int) -> tuple[int, int]:
    """MiB of this process's own, and of files mapped, when it has read batches of the file."""
    jax.config.update("jax_platforms", "cpu")
    batches = _batches(path, tokens)
    for _ in range(100):
        next(batches)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))


def measure(tokens_there: int):
    """One process on one core, shuffled, from the page cache: speed, resuming, memory.

    Args:
        tokens_there: of the synthetic dataset.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    tokens = LOADER_BATCH * LOADER_LENGTH
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        draw = np.random.default_rng(0)
        draw.integers(0, 50257, tokens_there, np.uint16).tofile(file.name)
        Path(file.name).read_bytes()  # into the page cache
        rates = {"crops": [], "ours": []}
        for _ in range(3):  # in turn
            rates["crops"].append(_rate(_random_crops(file.name, draw), tokens))
            rates["ours"].append(_rate(_batches(file.name, tokens_there), tokens))
        crops, ours = (statistics.median(rates[name]) for name in ("crops", "ours"))
        later = 1_000_000 * LOADER_BATCH
        seconds = {row: [] for row in (0, later)}
        for _ in range(7):
            for row, times in seconds.items():
                times.append(_seconds_to_first(file.name, tokens_there, row))
        cold, one_by_one = _cold_rates(file.name, tokens_there)
    os.sched_setaffinity(0, cores)
    print(f"loader  {ours / 1e6:7.1f} M tokens/s  through Grain to the device; one core, batches of {tokens}")
    print(
        f"loader  {ours / crops:7.2f} times the speed of random crops from a memmap, stacked as int64 "
        f"({crops / 1e6:.1f} M tokens/s)"
    )
    print(
        f"loader  {cold / 1e6:7.1f} M tokens/s  read from the disk; {cold / one_by_one:.1f} times the speed "
        f"of one row after another"
    )
    first, millionth = (statistics.median(times) for times in seconds.values())
    print(
        f"loader  {1e3 * millionth:7.1f} ms  to the first batch of a resume at step 1,000,000; "
        f"{1e3 * first:.1f} at step 0 (medians of 7)"
    )
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
        os.truncate(file.name, 2 * HUGE)  # of nothing
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            own, mapped = pool.apply(_memory, (file.name, HUGE))
    print(
        f"loader  {own:7d} MiB  of a whole process that reads of {HUGE / 1e9:.0f} billion tokens; {mapped} "
        f"more are pages of files, which the system may take back"
    )
