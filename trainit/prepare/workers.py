"""Units of work, done by all cores: this process reads and writes in order, others parse and encode."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import tqdm
from absl import logging

from trainit import tokenizers
from trainit.cluster.process import end_with_parent
from trainit.data.dataset import dtype_of
from trainit.data.documents import reader
from trainit.data.documents.inputs import describe, difference
from trainit.data.documents.reader import Batch, BrokenInputError, Position
from trainit.prepare.writer import Encoded, Recipe, StateError, Unit, UnitWriter, encode
from trainit.tokenizers import Tokenizer

COMMIT_SECONDS = 5.0  # at most this much work is done again after a kill
LOG_SECONDS = 60.0  # between lines about the progress where there is no terminal


class StoppedError(Exception):
    """Stopped on request; everything so far is kept."""


class Progress:
    """What has been done, for people: a bar on a terminal, and a line a minute elsewhere."""

    def __init__(self, total: int):
        self._total = max(total, 1)  # bytes of the input files as they are on disk
        self._done = self._bytes = self._tokens = 0  # of the total; bytes of text
        self._started = self._logged = time.monotonic()
        self._bar = tqdm.tqdm(
            total=self._total,
            disable=None,  # where there is no terminal
            bar_format="preparing {percentage:3.0f}% |{bar}| {postfix}, {remaining} left",
        )

    def skip(self, size: int):
        """Counts input that an earlier call has done, which does not count for the speed."""
        self._done += size
        if not self._bar.disable:
            self._bar.initial += size
            self._bar.update(size)

    def update(self, read: int, encoded: Encoded):
        """Counts a batch: bytes of its file that were read for it, and what came out."""
        self._done += read
        self._bytes += sum(int(part.bytes.sum()) for part in encoded.parts.values())
        self._tokens += sum(int(part.lengths.sum()) for part in encoded.parts.values())
        self._bar.set_postfix_str(self.speed(), refresh=False)
        self._bar.update(read)
        if self._bar.disable and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            logging.info("preparing %3.0f%%, %s", 100 * self._done / self._total, self.speed())

    def speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._bytes / seconds / 1e6:.1f} MB/s, {self._tokens / seconds / 1e6:.2f} M tokens/s"

    def close(self):
        self._bar.close()


_worker: tuple[Tokenizer, Recipe]  # of a worker process


def _start_worker(tokenizer: tuple[str, bytes, int], recipe: Recipe):
    global _worker  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokenizers.build(*tokenizer), recipe
    end_with_parent()


def _encode(batch: Batch, split: str) -> Encoded:
    return encode(batch, *_worker, split)


@contextlib.contextmanager
def _encoder(
    tokenizer: Tokenizer, recipe: Recipe, workers: int
) -> Iterator[Callable[[Batch, str], Future[Encoded]]]:
    """Gives what encodes batches of a split: worker processes, or this process if one is enough."""

    def encode_here(batch: Batch, split: str) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        future.set_result(encode(batch, tokenizer, recipe, split))
        return future

    if workers == 1:
        yield encode_here
        return
    # Forked before there are threads, which is fast and shares memory; elsewhere it is not safe.
    how = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    about = (tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text), recipe
    pool = ProcessPoolExecutor(workers, how, _start_worker, about)
    try:
        pool.submit(int).result()  # start them all now
        yield lambda batch, split: pool.submit(_encode, batch, split)
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Gives the list of the signals that have asked this process to stop."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is not polite

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(units: list[Unit], folder: Path, tokenizer: Tokenizer, recipe: Recipe, workers: int) -> None:
    """Does the remaining work of the units in order, and writes journals and shards into `folder`.

    Raises:
        StoppedError, BrokenProcessPool, BrokenInputError: what is done is kept; the same call continues.
        StateError: the folder is in use or damaged.
        OSError: a file cannot be read or written.
    """
    size = sum(path.stat().st_size for unit in units for path in unit.paths)
    with (
        _encoder(tokenizer, recipe, workers) as submit,
        _stop_requests() as stop,
        contextlib.closing(Progress(size)) as progress,
    ):
        under_way: deque[tuple[UnitWriter, Batch | None, int, Future[Encoded] | None]] = deque()
        current, committed = None, time.monotonic()

        def write_oldest():
            nonlocal current, committed
            current, batch, read, future = under_way.popleft()
            if batch is None or future is None:  # the end of a unit
                current.commit(done=True)
                current = None
            else:
                encoded = future.result()
                current.write(batch.position, encoded)
                progress.update(read, encoded)
                if time.monotonic() - committed > COMMIT_SECONDS:
                    current.commit()
                    committed = time.monotonic()
            if stop:
                raise StoppedError

        try:
            for writer, batch, read in _batches(units, folder, tokenizer, recipe, progress):
                under_way.append((writer, batch, read, submit(batch, writer.unit.split) if batch else None))
                while len(under_way) > 2 * workers:
                    write_oldest()
            while under_way:
                write_oldest()
        except (StoppedError, BrokenProcessPool, BrokenInputError, StateError):
            if current:
                current.commit()
            raise
        finally:
            for writer in [*([current] if current else []), *(row[0] for row in under_way)]:
                writer.close()
    logging.info("%-10s %s", "encoded", progress.speed())


def _batches(
    units: Iterable[Unit], folder: Path, tokenizer: Tokenizer, recipe: Recipe, progress: Progress
) -> Iterator[tuple[UnitWriter, Batch | None, int]]:
    """Yields the remaining batches, with the bytes of the file that each took. None follows each unit."""
    fields, dtype = recipe.fields, dtype_of(tokenizer.vocab_size)
    for unit in units:
        writer = UnitWriter(folder, unit, dtype, recipe)
        if writer.done:
            writer.close()
            progress.skip(sum(path.stat().st_size for path in unit.paths))
            continue
        at = writer.position
        for number, (path, file) in enumerate(zip(unit.paths, unit.inputs, strict=True)):
            if number < at.file:
                progress.skip(path.stat().st_size)
                continue
            start, read = at if number == at.file else Position(number), 0
            for batch in reader.read(path, file.name, fields, start, tokenizer.cut):
                if start != Position(number) and not read:  # what was passed over to get here
                    progress.skip(batch.read)
                    read = batch.read
                yield writer, batch, batch.read - read
                read = batch.read
            if text := difference([file], [describe(path, file.name, file)]):
                raise StateError(f"changed while it was read: {text}; remove {folder.parent}, prepare again")
        yield writer, None, 0
