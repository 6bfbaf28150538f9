"""Compares all files of a prepared dataset with its dataset.json."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainit.data.dataset import Dataset, DatasetError, read_info
from trainit.tokenizers.chat import marks


def verify(folder: Path) -> Iterator[str]:
    """Reads all files of a prepared dataset; yields for each what is wrong with it, or "".

    Raises DatasetError if dataset.json itself cannot be used.
    """
    info = read_info(folder, "the dataset ")
    try:
        _ = Dataset(folder, info, {}).tokenizer  # whose own hash is checked
        yield ""
    except DatasetError as error:
        yield str(error)
    for split in info["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            found = [
                _compare(path.with_suffix(f".{part}"), expected) for part, expected in shard["sha256"].items()
            ]
            yield from found if any(found) else [*found[1:], _content(path, shard, info)]


def _compare(file: Path, expected: str) -> str:
    try:
        with file.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        return f"{file}: {error.strerror}; copy or prepare it again"
    if actual == expected:
        return ""
    return (
        f"{file} has SHA-256 {actual}, dataset.json says {expected}: it is torn or was replaced; copy or "
        f"prepare the dataset again"
    )


def _content(path: Path, shard: dict, info: dict) -> str:
    """Checks that ids are in the vocabulary, and that documents end where the index has the next one."""
    ids = np.memmap(path, info["dtype"], "r")
    largest = max(int(ids[i : i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(np.int64)
    numbers = np.fromfile(path.with_suffix(".subsets"), "<u2")
    text_ends = np.fromfile(path.with_suffix(".bytes"), "<i8")
    if largest >= info["vocab_size"]:
        return f"{path} has the id {largest}; the vocabulary has {info['vocab_size']}"
    ends = np.append(starts[1:], len(ids)) - 1
    right = 0 < len(starts) == shard["documents"] and starts[0] == 0
    right = right and (starts <= ends).all() and ends.max() < len(ids)
    if right and "marks" in shard["sha256"]:
        right = np.array_equal(marks.last(np.fromfile(path.with_suffix(".marks"), np.uint8)), ends)
    elif right:
        right = (ids[ends] == info["tokenizer"]["end_of_text"]).all()
    if not right:
        return f"{path.with_suffix('.documents')} does not say where the documents of {path} end"
    if len(text_ends) != len(starts) or (np.diff(text_ends, prepend=0) < 0).any():
        return f"{path.with_suffix('.bytes')} does not say how many bytes each document has"
    if len(numbers) != len(starts) or numbers.max() >= len(info["subsets"]):
        return f"{path.with_suffix('.subsets')} does not name a subset for each document"
    return ""
