"""The last step of preparing: finished units become a dataset, and duplicates are left out."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from trainit.data import dataset as tokens
from trainit.data.dataset import dtype_of
from trainit.data.tokenizers import Tokenizer
from trainit.data.tokenizers.base import digest
from trainit.files import write_atomically
from trainit.prepare.writer import (
    HASH,
    PARTS,
    GrowingFile,
    StateError,
    Unit,
    read_journal,
)

HASHES_AT_ONCE = 1 << 22  # that are sorted in memory
LISTED = 10_000  # of what was broken, in dataset.json


def join(
    output: Path,
    units: list[Unit],
    splits: Iterable[str],
    tokenizer: Tokenizer,
    deduplicate: bool,
    source: dict,
) -> dict:
    """Makes the units in output/unfinished the dataset `output`. May be stopped and called again.

    Args:
        output: the dataset's folder.
        units: all there are, in order.
        splits: names of the dataset's splits.
        tokenizer: with which it was encoded.
        deduplicate: whether documents are left out that came before, in validation or then in train.
        source: what it was made of, for dataset.json.

    Returns:
        The content of dataset.json.

    Raises:
        StateError: some unit is not finished.
    """
    folder = output / "unfinished"
    journals = _read_journals(output, units)
    subsets = list(dict.fromkeys(name for journal in journals.values() for name in journal["subsets"]))
    dropped = _find_duplicates(folder, units, journals) if deduplicate else {}
    dtype = dtype_of(tokenizer.vocab_size)
    described: dict[str, dict[str, Any]] = {
        split: {"shards": [], "counts": {name: [0, 0, 0] for name in subsets}} for split in splits
    }
    for split, description in described.items():
        for unit in units:
            journal = journals[unit.name]
            if split in journal["splits"]:
                drop = dropped.get((unit.name, split), np.empty(0, np.int64))
                _place(output, journal, split, subsets, dtype, drop, tokenizer.token_bytes(), description)
    content = tokenizer.serialize()
    write_atomically(output / "tokenizer.model", content)
    info = {
        "format": tokens.FORMAT,
        "tokenizer": {
            "name": tokenizer.name,
            "file": "tokenizer.model",
            "sha256": digest(content),
            "end_of_text": tokenizer.end_of_text,
        },
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "subsets": subsets,
        "splits": {split: _describe(**description) for split, description in described.items()},
        "duplicates": sum(len(drop) for drop in dropped.values()),
        "broken": _broken([journal["broken"] for journal in journals.values()]),
        "source": source,
    }
    write_atomically(output / "dataset.json", json.dumps(info, indent=1) + "\n")
    shutil.rmtree(folder)
    return info


def _broken(parts: list[dict]) -> dict:
    """What was broken in the units, as one."""
    return {
        "count": sum(part["count"] for part in parts),
        "damaged_files": sum(part["damaged_files"] for part in parts),
        "list": [row for part in parts for row in part["list"]][:LISTED],
    }


def _read_journals(output: Path, units: list[Unit]) -> dict[str, dict]:
    journals = {unit.name: read_journal(output / "unfinished", unit) for unit in units}
    missing = [unit for unit in units if not journals[unit.name].get("done")]
    if missing:
        files = ", ".join(name for unit in missing[:3] for name in unit.names[:3])
        raise StateError(
            f"{output}: {len(missing)} of {len(units)} units of work are not finished ({files}, ...); "
            f"run their --shard= again, or the command without --shard and --join, which does what is left"
        )
    return journals


def _describe(shards: list[dict], counts: dict[str, list[int]]) -> dict:
    names = ("documents", "tokens", "bytes")
    total = dict(zip(names, map(sum, zip([0, 0, 0], *counts.values(), strict=True)), strict=True))
    by_subset = {name: dict(zip(names, row, strict=True)) for name, row in counts.items() if row[0]}
    return {**total, "subsets": by_subset, "shards": shards}


def _place(
    output: Path,
    journal: dict,
    split: str,
    subsets: list[str],
    dtype: str,
    drop: np.ndarray,
    token_bytes: np.ndarray,
    description: dict,
) -> None:
    """Moves a unit's shards of one split into the dataset, without the documents in `drop`."""
    counts, at = description["counts"], 0
    for name, row in zip(journal["subsets"], journal["counts"][split], strict=False):
        counts[name] = [a + b for a, b in zip(counts[name], row, strict=True)]
    number = np.array([subsets.index(name) for name in journal["subsets"]], "<u2")
    for shard in journal["splits"][split]["shards"]:
        stem = shard["file"].removesuffix(".tokens")
        old = {part: output / "unfinished" / f"{stem}.{part}" for part in PARTS}
        new = {part: output / f"{stem}.{part}" for part in PARTS}
        of_documents = number[np.fromfile(old["subsets"], "<u2")]
        gone = drop[(drop >= at) & (drop < at + shard["documents"])] - at
        at += shard["documents"]
        if len(gone):
            removed = _copy_without(old, new, dtype, gone, of_documents, token_bytes, subsets, shard)
            for name, row in removed.items():
                counts[name] = [a - b for a, b in zip(counts[name], row, strict=True)]
            of_documents = np.delete(of_documents, gone)
            if not shard["documents"]:
                continue
        else:
            for part in ("tokens", "documents"):
                if old[part].exists():  # else a join that was stopped has moved it
                    old[part].replace(new[part])
        of_documents.tofile(new["subsets"])
        shard["sha256"]["subsets"] = digest(of_documents.tobytes())
        description["shards"].append(shard)


def _copy_without(old, new, dtype, gone, of_documents, token_bytes, subsets, shard) -> dict[str, list[int]]:
    """Copies a shard without some documents; returns the counts of these by subset. The old files stay."""
    ids = np.memmap(old["tokens"], dtype, "r")
    starts = np.fromfile(old["documents"], "<u8").astype(np.int64)
    ends = np.append(starts[1:], len(ids))
    removed: dict[str, list[int]] = {}
    for document in gone.tolist():
        of_one = ids[starts[document] : ends[document]]
        row = removed.setdefault(subsets[of_documents[document]], [0, 0, 0])
        row[:] = row[0] + 1, row[1] + len(of_one), row[2] + int(token_bytes[of_one].sum())
    stay = np.delete(np.arange(len(starts)), gone)
    lengths = (ends - starts)[stay]
    shard["tokens"], shard["documents"] = int(lengths.sum()), len(stay)
    if not len(stay):
        return removed  # and there is no such shard
    copies = {part: GrowingFile(new[part]) for part in ("tokens", "documents")}
    for begin, end in zip(np.append(-1, gone) + 1, np.append(gone, len(starts)), strict=True):
        if begin < end:  # a run of documents that stay
            copies["tokens"].write(ids[starts[begin] : ends[end - 1]])
    copies["documents"].write((np.cumsum(lengths) - lengths).astype("<u8"))
    for part, copy in copies.items():
        copy.close()
        shard["sha256"][part] = copy.sha256.hexdigest()
    return removed


def _find_duplicates(folder: Path, units: list[Unit], journals: dict) -> dict[tuple[str, str], np.ndarray]:
    """Returns which documents of each unit and split are duplicates. What validation has, train loses."""
    places = [
        (unit.name, split)
        for split in ("validation", "train")
        for unit in units
        if split in journals[unit.name]["splits"]
    ]
    files = [folder / f"{unit}.{split}.hashes" for unit, split in places]
    return dict(zip(places, duplicates(files), strict=True))


def duplicates(files: list[Path], at_once: int = HASHES_AT_ONCE) -> list[np.ndarray]:
    """Returns for each file of hashes the numbers of those that occur earlier, in it or in a file before it.

    Args:
        files: HASH bytes each document.
        at_once: hashes that are sorted in memory at once. More are divided by their remainders first.
    """
    found = [[np.empty(0, np.int64)] for _ in files]
    slices = -(-sum(file.stat().st_size for file in files) // (HASH * at_once)) or 1
    for part in range(slices):
        keys, where = [], []
        for number, file in enumerate(files):
            hashes = np.fromfile(file, "<u8").reshape(-1, 2)
            chosen = np.flatnonzero(hashes[:, 0] % np.uint64(slices) == part)
            keys.append(hashes[chosen])
            where.append(np.stack([np.full_like(chosen, number), chosen], axis=1))
        if keys:
            all_keys, places = np.concatenate(keys), np.concatenate(where)
            order = np.lexsort((all_keys[:, 1], all_keys[:, 0]))  # stable: the first of equals comes first
            again = places[order[1:][(all_keys[order[1:]] == all_keys[order[:-1]]).all(axis=1)]]
            for number in np.unique(again[:, 0]).tolist():
                found[number].append(again[again[:, 0] == number, 1])
    return [np.sort(np.concatenate(numbers)) for numbers in found]
