"""Measures how fast preparing is, against the bare tokenizer on the same text and cores, and its memory."""

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zstandard

from trainit import tokenizers
from trainit.config import ConfigError
from trainit.data.documents import reader
from trainit.data.documents.reader import Position

FIELDS = ("text", "meta.pile_set_name")
SLOW_CHARACTERS = 1 << 26  # of text for sentencepiece, which takes ten times as long
BATCH_CHARACTERS = 1 << 24  # of text in a call of the bare tokenizer, whose lists of ids are large
VOCAB_SIZE = 32_000


def measure(corpus: str, rounds: int) -> Iterator[str]:
    """Yields the speed of preparing with gpt2's tokenizer and with one of sentencepiece.

    The corpus is a file of documents, or several as a glob. Bare tokenizer and preparing take turns.
    """
    try:
        paths = sorted(glob.glob(corpus))  # noqa: PTH207
        texts = [
            document.text
            for path in map(Path, paths)
            for batch in reader.read(path, path.name, FIELDS, Position())
            for document in reader.parse(batch, FIELDS)[0]
        ]
        if not texts:
            raise ValueError(f"--corpus={corpus!r}: there are no documents")
        cores = len(os.sched_getaffinity(0))
        gpt2: Any = tokenizers.find("gpt2")
        bare = partial(gpt2._encoding.encode_ordinary_batch, num_threads=cores)
        yield from _compare("encode_ordinary_batch", bare, "gpt2", texts, paths, rounds)

        # sentencepiece gets a part of the text, on which its model is trained as well.
        part = next(_batches(texts, SLOW_CHARACTERS))
        vocab_size = min(VOCAB_SIZE, 512 + sum(map(len, part)) // 1000)
        model = tokenizers.SentencePieceTokenizer.train(part[:1000], vocab_size, sample=100_000)
        bare = partial(model._processor.encode, num_threads=cores)
        with tempfile.TemporaryDirectory() as folder:
            model_path, part_path = Path(folder, "bare.model"), Path(folder, "part.jsonl.zst")
            model_path.write_bytes(model.serialize())
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
            part_path.write_bytes(zstandard.compress(lines.encode()))
            choice = f"sentencepiece:{model_path}"
            yield from _compare("sentencepiece", bare, choice, part, [str(part_path)], rounds)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _compare(
    name: str, bare: Callable[[list[str]], list], choice: str, texts: list[str], paths: list[str], rounds: int
) -> Iterator[str]:
    """Yields the lines about a tokenizer: its bare function on texts, and `choice` on the files of these."""
    inputs = [f"--input={glob.escape(path)}" for path in paths]
    command = [sys.executable, "-m", "trainit", "prepare", f"--tokenizer={choice}", *inputs]
    turns = []
    for _ in range(rounds):
        start = _clocks()
        for batch in _batches(texts):
            bare(batch)
        middle = _clocks()
        rate, peak = _prepare(command)
        bare_seconds, bare_cpu, _ = middle - start
        seconds, _, cpu = _clocks() - middle
        turns.append((bare_seconds, bare_cpu, seconds, cpu, rate, peak))

    bare_seconds, bare_cpu, seconds, cpu, rate, peak = np.array(turns).T
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    shares = rate * bare_seconds / megabytes, bare_seconds / seconds, bare_cpu / cpu
    encoding, whole, work = map(median, shares)
    yield (
        f"{encoding:7.1%} of the speed of bare {name}: {median(rate):.1f} MB/s of "
        f"{megabytes / median(bare_seconds):.1f} ({megabytes:.0f} MB, medians of {rounds} turns)"
    )
    yield f"{whole:7.1%} with the start of the command and everything that it does at its end"
    yield f"{work:7.1%} by seconds of CPU, which other processes disturb less"
    yield f"{max(peak) / 1e6:7.0f} MB  peak memory of all its processes"


def _clocks() -> np.ndarray:
    """Returns the seconds of the clock, of this process's CPU, and of the CPU of its ended children."""
    times = os.times()
    return np.array([time.perf_counter(), time.process_time(), times.children_user + times.children_system])


def _prepare(command: list[str]) -> tuple[float, int]:
    """Prepares a dataset and removes it. Returns the MB/s that are reported, and the bytes of memory."""
    with tempfile.TemporaryDirectory() as folder:
        validation = Path(folder, "val.jsonl")
        validation.write_text('{"text": "validation"}\n')
        command = [*command, f"--validation={validation}", f"--output={folder}/dataset"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak, output = 0, None
        while output is None:
            try:
                output = process.communicate(timeout=0.2)[1]
            except subprocess.TimeoutExpired:
                peak = max(peak, _memory(process.pid))
    encoded = re.search(r"^encoded +([\d.]+) MB/s", output, re.M)
    if process.returncode or not encoded:
        raise ValueError(f"preparing failed: {output.strip().splitlines()[-1]}")
    return float(encoded[1]), peak


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


def _memory(process: int) -> int:
    """Returns the bytes that a process and its children have; pages that they share count once."""
    total = 0
    try:
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            total += sum(map(_memory, map(int, file.read_text().split())))
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return total  # it has ended
    return total + sum(1024 * int(kib) for kib in re.findall(r"^Pss: +(\d+)", rollup, re.M))
