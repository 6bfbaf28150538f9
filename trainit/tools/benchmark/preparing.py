"""How fast preparing is beside the bare tokenizer on the same text and cores, and in what memory."""

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

import zstandard

from trainit.data import documents as readers
from trainit.data import tokenizers
from trainit.data.documents import Position

FIELDS = ("text", "meta.pile_set_name")
SLOW_BYTES = 1 << 26  # of text for sentencepiece, which takes ten times as long
BATCH_BYTES = 1 << 24  # of text that the bare tokenizer gets in a call; its lists are large
VOCAB_SIZE = 32_000


def measure(corpus: str, rounds: int) -> Iterator[str]:
    """Lines of a report. Bare and preparing take turns, and of each the median over the rounds counts.

    Args:
        corpus: a file of documents, or several as a glob.
        rounds: turns of each.

    Raises:
        ValueError: there is no corpus, or a package is missing.
    """
    paths = sorted(Path(path) for path in glob.glob(corpus))  # noqa: PTH207
    texts = [
        document.text
        for path in paths
        for batch in readers.read(path, path.name, FIELDS, Position())
        for document in readers.parse(batch, FIELDS)[0]
    ]
    if not texts:
        raise ValueError(f"--corpus={corpus!r}: there are no documents")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpt2 = tokenizers.find("gpt2")._encoding
        bare = lambda batch: gpt2.encode_ordinary_batch(batch, num_threads=cores)  # noqa: E731
        yield from _compare("gpt2", "encode_ordinary_batch", texts, paths, bare, rounds, folder)

        few = next(_batches(texts, SLOW_BYTES))
        vocab_size = min(VOCAB_SIZE, 512 + sum(map(len, few)) // 1000)
        model = tokenizers.SentencePieceTokenizer.train(few[:1000], vocab_size, sample=100_000)
        (folder / "bare.model").write_bytes(model.serialize())
        lines = "".join(json.dumps({"text": text}) + "\n" for text in few)
        (folder / "few.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        bare = lambda batch: model._processor.encode(batch, num_threads=cores)  # noqa: E731
        choice, paths = f"sentencepiece:{folder}/bare.model", [folder / "few.jsonl.zst"]
        yield from _compare(choice, "sentencepiece", few, paths, bare, rounds, folder)


def _compare(
    choice: str,
    what: str,
    texts: list[str],
    paths: list[Path],
    bare: Callable[[list[str]], list],
    rounds: int,
    folder: Path,
) -> Iterator[str]:
    """The lines about one tokenizer."""
    size = sum(len(text.encode()) for text in texts)
    (folder / "val.jsonl").write_text('{"text": "validation"}\n')
    bares, commands, encodings, work, peaks = [], [], [], [], []
    for number in range(rounds):
        start, bare_work = time.perf_counter(), time.process_time()
        for batch in _batches(texts):
            bare(batch)
        bares.append(size / (time.perf_counter() - start) / 1e6)
        bare_work = time.process_time() - bare_work
        command = [sys.executable, "-m", "trainit", "prepare", f"--validation={folder}/val.jsonl"]
        command += [f"--tokenizer={choice}", f"--output={folder}/{what}{number}"]
        command += [f"--input={glob.escape(str(path))}" for path in paths]
        start, before = time.perf_counter(), _work_of_children()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak: list[float] = [0.0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        output = process.communicate()[1]
        commands.append(size / (time.perf_counter() - start) / 1e6)
        work.append(bare_work / (_work_of_children() - before))
        watch.join()
        if process.returncode:
            raise ValueError(f"preparing failed: {output.strip().splitlines()[-1]}")
        encodings.append(float(re.search(r"^encoded +([\d.]+) MB/s", output, re.M)[1]))
        peaks.append(peak[0])
    ratios = [[a / b for a, b in zip(rates, bares, strict=True)] for rates in (encodings, commands)]
    encoding, whole = (statistics.median(ratio) for ratio in ratios)
    yield (
        f"prepare {encoding:7.1%} of the speed of bare {what}: {statistics.median(encodings):.1f} MB/s of "
        f"{statistics.median(bares):.1f} ({size / 1e6:.0f} MB, medians of {rounds} turns)"
    )
    yield f"prepare {whole:7.1%} with the start of the command and all that it does at its end"
    yield f"prepare {statistics.median(work):7.1%} by seconds of CPU, which others disturb less"
    yield f"prepare {max(peaks) / 1e6:7.0f} MB  peak memory of all its processes"


def _batches(texts: list[str], length: int = BATCH_BYTES) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= length:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _work_of_children() -> float:
    """Seconds of CPU of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(process: subprocess.Popen, peak: list[float]):
    """The most bytes that a process and its children have at once; shared pages count once."""
    while process.poll() is None:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        total = 0
        for pid in [process.pid, *map(int, children.stdout.split())]:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += 1024 * int(re.search(r"^Pss: +(\d+)", rollup, re.M)[1])
            except (OSError, TypeError):
                continue  # it has ended
        peak[0] = max(peak[0], total)
        time.sleep(0.2)
