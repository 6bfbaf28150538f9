"""Checks all files of a prepared dataset against its dataset.json."""

import hashlib
from pathlib import Path

import numpy as np

from trainit.data.dataset import Dataset, DatasetError


def verify(dataset: Dataset) -> int:
    """Reads all shards and checks them against dataset.json. Returns how many files were checked.

    Raises:
        DatasetError: a file is damaged, was replaced, or has impossible content; the message names it.
    """
    _ = dataset.tokenizer  # whose own hash is checked
    checked = 1
    for split in dataset.info["splits"].values():
        for shard in split["shards"]:
            path = dataset.folder / shard["file"]
            for part, expected in shard["sha256"].items():
                file = path.with_suffix(f".{part}")
                try:
                    with file.open("rb") as content:
                        actual = hashlib.file_digest(content, "sha256").hexdigest()
                except OSError as error:
                    raise DatasetError(f"{file}: {error.strerror}; copy or prepare it again") from None
                if actual != expected:
                    raise DatasetError(
                        f"{file} has SHA-256 {actual}, dataset.json says {expected}: it is torn or was "
                        f"replaced; copy or prepare the dataset again"
                    )
                checked += 1
            _verify_ids(path, shard, dataset.info)
    return checked


def _verify_ids(path: Path, shard: dict, info: dict):
    """Checks that ids are in the vocabulary, and that documents end where the index has the next one."""
    ids = np.memmap(path, info["dtype"], "r")
    largest = max(int(ids[i : i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
    starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(np.int64)
    numbers = np.fromfile(path.with_suffix(".subsets"), "<u2")
    text_ends = np.fromfile(path.with_suffix(".bytes"), "<i8")
    if largest >= info["vocab_size"]:
        raise DatasetError(f"{path} has the id {largest}; the vocabulary has {info['vocab_size']}")
    ends = np.append(starts[1:], len(ids)) - 1
    right = 0 < len(starts) == shard["documents"] and starts[0] == 0
    right = right and (starts <= ends).all() and ends.max() < len(ids)
    if not right or (ids[ends] != info["tokenizer"]["end_of_text"]).any():
        raise DatasetError(f"{path.with_suffix('.documents')} does not say where the documents of {path} end")
    if len(text_ends) != len(starts) or (np.diff(text_ends, prepend=0) < 0).any():
        raise DatasetError(f"{path.with_suffix('.bytes')} does not say how many bytes each document has")
    if len(numbers) != len(starts) or numbers.max() >= len(info["subsets"]):
        raise DatasetError(f"{path.with_suffix('.subsets')} does not name a subset for each document")
