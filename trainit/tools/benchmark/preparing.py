"""Measures how fast preparing is, against the bare tokenizer on the same text and cores, and its memory."""

import glob
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from trainit.config import ConfigError
from trainit.data import tokenizers
from trainit.data.documents import reader
from trainit.data.documents.reader import Position

FIELDS = ("text", "meta.pile_set_name")
SLOW_CHARACTERS = 1 << 26  # of text for sentencepiece, which takes ten times as long
BATCH_CHARACTERS = 1 << 24  # of text in a call of the bare tokenizer, whose lists of ids are large
VOCAB_SIZE = 32_000


def measure(corpus: str, rounds: int):
    """Prints the speed of preparing with gpt2's tokenizer and with one of sentencepiece.

    Args:
        corpus: a file of documents, or several as a glob.
        rounds: how often the bare tokenizer and preparing take turns; medians count.

    Raises:
        ConfigError: there is no such corpus, it cannot be prepared, or a package is missing.
    """
    try:
        for line in _report(corpus, rounds):
            print(f"prepare {line}", flush=True)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _report(corpus: str, rounds: int) -> Iterator[str]:
    """Yields the lines of the report as they are known."""
    paths = sorted(Path(path) for path in glob.glob(corpus))  # noqa: PTH207
    texts = [
        document.text
        for path in paths
        for batch in reader.read(path, path.name, FIELDS, Position())
        for document in reader.parse(batch, FIELDS)[0]
    ]
    if not texts:
        raise ValueError(f"--corpus={corpus!r}: there are no documents")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpt2: Any = tokenizers.find("gpt2")
        bare = lambda batch: gpt2._encoding.encode_ordinary_batch(batch, num_threads=cores)  # noqa: E731
        yield from _compare("gpt2", "encode_ordinary_batch", texts, paths, bare, rounds, folder)

        # sentencepiece gets a part of the text, on which its model is trained as well.
        part = next(_batches(texts, SLOW_CHARACTERS))
        vocab_size = min(VOCAB_SIZE, 512 + sum(map(len, part)) // 1000)
        model = tokenizers.SentencePieceTokenizer.train(part[:1000], vocab_size, sample=100_000)
        (folder / "bare.model").write_bytes(model.serialize())
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / "part.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        bare = lambda batch: model._processor.encode(batch, num_threads=cores)  # noqa: E731
        choice, paths = f"sentencepiece:{folder}/bare.model", [folder / "part.jsonl.zst"]
        yield from _compare(choice, "sentencepiece", part, paths, bare, rounds, folder)


class _Turn(NamedTuple):
    """One turn of the bare tokenizer and of preparing."""

    bare: float  # seconds of the bare tokenizer
    bare_cpu: float  # its seconds of CPU
    command: float  # seconds of preparing, from the start of the command to its end
    command_cpu: float
    rate: float  # MB/s that preparing reports of its encoding
    peak: int  # bytes of all processes of preparing


def _compare(
    choice: str,
    name: str,
    texts: list[str],
    paths: list[Path],
    bare: Callable[[list[str]], list],
    rounds: int,
    folder: Path,
) -> Iterator[str]:
    """Yields the lines about one tokenizer.

    Args:
        choice: the tokenizer as preparing takes it.
        name: the bare one's.
        texts: the documents.
        paths: their files.
        bare: encodes a batch of texts.
        rounds: number of turns.
        folder: for what is prepared.
    """
    (folder / "val.jsonl").write_text('{"text": "validation"}\n')
    command = [sys.executable, "-m", "trainit", "prepare", f"--validation={folder}/val.jsonl"]
    command += [f"--tokenizer={choice}", *(f"--input={glob.escape(str(path))}" for path in paths)]
    turns = []
    for index in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        for batch in _batches(texts):
            bare(batch)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        turns.append(_Turn(seconds, cpu, *_prepare([*command, f"--output={folder}/{name}{index}"])))

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rate = statistics.median(turn.rate for turn in turns)
    bare_rate = megabytes / statistics.median(turn.bare for turn in turns)
    encoding = statistics.median(turn.rate * turn.bare / megabytes for turn in turns)
    whole = statistics.median(turn.bare / turn.command for turn in turns)
    work = statistics.median(turn.bare_cpu / turn.command_cpu for turn in turns)
    yield (
        f"{encoding:7.1%} of the speed of bare {name}: {rate:.1f} MB/s of {bare_rate:.1f} "
        f"({megabytes:.0f} MB, medians of {rounds} turns)"
    )
    yield f"{whole:7.1%} with the start of the command and everything that it does at its end"
    yield f"{work:7.1%} by seconds of CPU, which other processes disturb less"
    yield f"{max(turn.peak for turn in turns) / 1e6:7.0f} MB  peak memory of all its processes"


def _prepare(command: list[str]) -> tuple[float, float, float, int]:
    """Runs a command that prepares; returns its part of a `_Turn`."""
    start, cpu = time.perf_counter(), _cpu_of_children()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watch = threading.Thread(target=_watch, args=(process, peak))
    watch.start()
    output = process.communicate()[1]
    seconds, cpu = time.perf_counter() - start, _cpu_of_children() - cpu
    watch.join()
    encoded = re.search(r"^encoded +([\d.]+) MB/s", output, re.M)
    if process.returncode or not encoded:
        raise ValueError(f"preparing failed: {output.strip().splitlines()[-1]}")
    return seconds, cpu, float(encoded[1]), peak[0]


def _batches(texts: list[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Yields the texts in batches of at least that many characters, except for the last."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cpu_of_children() -> float:
    """Returns the seconds of CPU of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(process: subprocess.Popen, peak: list[int]):
    """Writes to peak[0] the most bytes that a process and its children have; shared pages count once."""
    while process.poll() is None:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        total = 0
        for pid in [process.pid, *map(int, children.stdout.split())]:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue  # it has ended
            total += sum(1024 * int(kib) for kib in re.findall(r"^Pss: +(\d+)", rollup, re.M))
        peak[0] = max(peak[0], total)
        time.sleep(0.2)
