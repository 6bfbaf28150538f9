"""Units of work, done by all cores: this process reads and writes in order, others parse and encode."""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import tqdm
from absl import logging

from trainit.cluster.process import end_with_parent
from trainit.data import tokenizers
from trainit.data.dataset import dtype_of
from trainit.data.documents import reader
from trainit.data.documents.reader import Batch, BrokenInputError, Position
from trainit.data.tokenizers import Tokenizer
from trainit.prepare.writer import (
    Encoded,
    Recipe,
    StateError,
    Unit,
    UnitWriter,
    encode,
)

COMMIT_SECONDS = 5.0  # at most this much work is done again after a kill
LOG_SECONDS = 60.0  # between lines about the progress where there is no terminal


class StoppedError(Exception):
    """Stopped on request; everything so far is kept."""


class LostWorkerError(RuntimeError):
    """A worker process died."""


@dataclass
class Progress:
    """What has been done, for people: a bar on a terminal, and a line a minute elsewhere."""

    total: int  # bytes of the input files as they are on disk
    bytes: int = 0  # of text
    tokens: int = 0
    done: int = 0  # of total
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self._bar = tqdm.tqdm(
            total=max(self.total, 1),
            disable=None,  # where there is no terminal
            bar_format="preparing {percentage:3.0f}% |{bar}| {postfix}, {remaining} left",
        )
        self._logged = self.started

    def skip(self, size: int):
        """Counts input that an earlier call has done, which does not count for the speed."""
        self.done += size
        if not self._bar.disable:
            self._bar.initial += size
            self._bar.update(size)

    def update(self, read: int, encoded: Encoded):
        """Counts a batch: bytes of its file that were read for it, and what came out."""
        self.done += read
        for part in encoded.parts.values():
            self.bytes += int(part.bytes.sum())
            self.tokens += int(part.lengths.sum())
        self._bar.set_postfix_str(self.speed(), refresh=False)
        self._bar.update(read)
        if self._bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            logging.info("preparing %3.0f%%, %s", 100 * self.done / max(self.total, 1), self.speed())

    def speed(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.bytes / seconds / 1e6:.1f} MB/s, {self.tokens / seconds / 1e6:.2f} M tokens/s"

    def close(self):
        self._bar.close()


_worker: tuple[Tokenizer, Recipe] | None = None  # of a worker process


def _start_worker(tokenizer: tuple[str, bytes, int], recipe: Recipe):
    global _worker  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokenizers.build(*tokenizer), recipe
    end_with_parent()


def _encode(batch: Batch, split: str) -> Encoded:
    assert _worker is not None
    return encode(batch, *_worker, split)


class Encoders:
    """Worker processes that encode batches; with one worker, this process does it itself."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, workers: int):
        self._tokenizer, self._recipe, self._pool = tokenizer, recipe, None
        self.ahead = 2 * workers  # batches under way at once
        if workers > 1:
            # Forked before there are threads, which is fast and shares memory; elsewhere it is not safe.
            how = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            about = (tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text), recipe
            self._pool = ProcessPoolExecutor(workers, how, _start_worker, about)
            try:
                self._pool.submit(int).result()  # start them all now
            except BrokenProcessPool:
                raise LostWorkerError(_LOST) from None

    def submit(self, batch: Batch, split: str) -> Future:
        if self._pool:
            try:
                return self._pool.submit(_encode, batch, split)
            except BrokenProcessPool:
                raise LostWorkerError(_LOST) from None
        future: Future[Encoded] = Future()
        future.set_result(encode(batch, self._tokenizer, self._recipe, split))
        return future

    def close(self):
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


_LOST = "a worker process died, killed from outside or for want of memory (--workers= takes fewer)"


def run(
    units: Iterable[Unit],
    folder: Path,
    tokenizer: Tokenizer,
    recipe: Recipe,
    encoders: Encoders,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Does the remaining work of the units, in order.

    Args:
        units: what to do.
        folder: where journals and shards are written.
        tokenizer: encodes the documents.
        recipe: decides which tokens come out.
        encoders: the processes that encode.
        progress: counts what is done.
        stop: is called after each batch. Once it is true, what is done is kept and StoppedError is raised.

    Raises:
        StoppedError, LostWorkerError, BrokenInputError: the work before it is kept; the same call continues.
        StateError: the folder is in use or damaged.
        OSError: a file cannot be read or written.
    """
    under_way: deque[tuple[UnitWriter, Batch | None, int, Future | None]] = deque()
    current, committed = None, time.monotonic()

    def write_oldest():
        nonlocal current, committed
        current, batch, read, future = under_way.popleft()
        if batch is None:
            current.commit(done=True)
            current.close()
            current = None
        else:
            encoded = _result(future)
            current.write(batch.position, encoded)
            progress.update(read, encoded)
            if time.monotonic() - committed > COMMIT_SECONDS:
                current.commit()
                committed = time.monotonic()
        if stop():
            raise StoppedError

    try:
        for writer, batch, read in _batches(units, folder, dtype_of(tokenizer.vocab_size), recipe, progress):
            future = encoders.submit(batch, writer.unit.split) if batch else None
            under_way.append((writer, batch, read, future))
            while len(under_way) > encoders.ahead:
                write_oldest()
        while under_way:
            write_oldest()
    except (StoppedError, LostWorkerError, BrokenInputError, StateError):
        if current:
            current.commit()
        raise
    finally:
        for writer in {id(w): w for w in [current, *(row[0] for row in under_way)] if w}.values():
            writer.close()


def _result(future: Future | None) -> Encoded:
    assert future is not None  # only the ends of units have none
    try:
        return future.result()
    except BrokenProcessPool:
        raise LostWorkerError(_LOST) from None


def _batches(
    units: Iterable[Unit], folder: Path, dtype: str, recipe: Recipe, progress: Progress
) -> Iterator[tuple[UnitWriter, Batch | None, int]]:
    """Yields the remaining batches, with the bytes of the file that each took. None follows each unit."""
    fields = recipe.text_field, recipe.subset_field
    for unit in units:
        writer = UnitWriter(folder, unit, dtype, recipe)
        if writer.done:
            writer.close()
            progress.skip(sum(path.stat().st_size for path in unit.paths))
            continue
        at = writer.position
        for number in range(len(unit.paths)):
            path, read = unit.paths[number], 0
            if number < at.file:
                progress.skip(path.stat().st_size)
                continue
            start = at if number == at.file else Position(number)
            for batch in reader.read(path, unit.names[number], fields, start):
                if start != Position(number) and not read:  # what was passed over to get here
                    progress.skip(batch.read)
                    read = batch.read
                yield writer, batch, batch.read - read
                read = batch.read
        yield writer, None, 0
