"""The last step of preparing: finished units become a dataset, and duplicates are left out."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trainit.cluster.files import write_atomically
from trainit.data.dataset import CHAT, FORMAT, dtype_of
from trainit.prepare.writer import HASH, GrowingFile, StateError, Unit, read_journal
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import digest

HASHES_AT_ONCE = 1 << 22  # that are sorted in memory
LISTED = 10_000  # of what was broken, in dataset.json
COUNTS = ("documents", "tokens", "bytes")  # of a split, or of a subset in it


def join(
    output: Path,
    units: list[Unit],
    splits: Iterable[str],
    tokenizer: Tokenizer,
    deduplicate: bool,
    source: dict,
) -> dict:
    """Makes the units in output/unfinished the dataset `output`. May be stopped and called again.

    With `deduplicate`, documents are left out that came before, in validation or then in train. Returns the
    content of dataset.json, which has `source`, what the dataset was made of.

    Raises:
        StateError: some unit is not finished.
    """
    journals = _read_journals(output, units)
    subsets = list(dict.fromkeys(name for journal in journals.values() for name in journal["subsets"]))
    dropped = _find_duplicates(output / "unfinished", journals) if deduplicate else {}
    content, dtype = tokenizer.serialize(), dtype_of(tokenizer.vocab_size)
    write_atomically(output / "tokenizer.model", content)
    broken = [journal["broken"] for journal in journals.values()]
    info = {
        "format": CHAT if source.get("chat") else FORMAT,
        "tokenizer": {
            "name": tokenizer.name,
            "file": "tokenizer.model",
            "sha256": digest(content),
            "end_of_text": tokenizer.end_of_text,
        },
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "subsets": subsets,
        "splits": {name: _join_split(output, name, journals, subsets, dropped, dtype) for name in splits},
        "duplicates": sum(len(drop) for drop in dropped.values()),
        "broken": {
            "count": sum(part["count"] for part in broken),
            "damaged_files": sum(part["damaged_files"] for part in broken),
            "list": [row for part in broken for row in part["list"]][:LISTED],
        },
        "source": source,
    }
    write_atomically(output / "dataset.json", json.dumps(info, indent=1) + "\n")
    shutil.rmtree(output / "unfinished")
    return info


def _read_journals(output: Path, units: list[Unit]) -> dict[str, dict]:
    journals = {unit.name: read_journal(output / "unfinished", unit) for unit in units}
    missing = [unit for unit in units if not journals[unit.name].get("done")]
    if missing:
        files = ", ".join(file.name for unit in missing[:3] for file in unit.inputs[:3])
        raise StateError(
            f"{output}: {len(missing)} of {len(units)} units of work are not finished ({files}, ...); "
            f"run their --shard= again, or the command without --shard and --join, which does what is left"
        )
    return journals


def _join_split(
    output: Path, split: str, journals: dict, subsets: list[str], dropped: dict, dtype: str
) -> dict:
    """Moves the shards of a split into the dataset; returns what dataset.json says about it."""
    shards: list[dict] = []
    counts = np.zeros((len(subsets), len(COUNTS)), np.int64)
    for unit, journal in journals.items():
        if split not in journal["splits"]:
            continue
        # The unit's subsets get the dataset's numbers. Its last ones may lack counts in this split.
        number = np.array([subsets.index(name) for name in journal["subsets"]], "<u2")
        of_unit = journal["counts"][split]
        counts[number[: len(of_unit)]] += of_unit
        gone = dropped.get((unit, split), np.empty(0, np.int64))
        for shard in journal["splits"][split]["shards"]:
            own = gone[gone < shard["documents"]]
            gone = gone[len(own) :] - shard["documents"]
            _place(output, shard, number, own, dtype, counts)
            shards += [shard] if shard["documents"] else []
    total = dict(zip(COUNTS, counts.sum(0).tolist(), strict=True))
    rows = zip(subsets, counts.tolist(), strict=True)
    by_subset = {name: dict(zip(COUNTS, row, strict=True)) for name, row in rows if row[0]}
    return {**total, "subsets": by_subset, "shards": shards}


def _place(output: Path, shard: dict, number: np.ndarray, gone: np.ndarray, dtype: str, counts: np.ndarray):
    """Moves a shard into the dataset without the documents `gone`, which `shard` and `counts` then lack.

    `number` has the dataset's number of each subset of the shard's unit.
    """
    stem = shard["file"].removesuffix(".tokens")
    old = {part: output / "unfinished" / f"{stem}.{part}" for part in shard["sha256"]}
    new = {part: output / f"{stem}.{part}" for part in shard["sha256"]}
    of_documents = number[np.fromfile(old["subsets"], "<u2")]
    if len(gone):
        np.subtract.at(counts, of_documents[gone], _copy_without(old, new, gone, dtype, shard))
        of_documents = np.delete(of_documents, gone)
    else:
        for part in [*old][:-1]:
            if old[part].exists():  # else a join that was stopped has moved it
                old[part].replace(new[part])
    if len(of_documents):
        write_atomically(new["subsets"], of_documents.tobytes())
        shard["sha256"]["subsets"] = digest(of_documents.tobytes())


def _copy_without(old: dict, new: dict, gone: np.ndarray, dtype: str, shard: dict) -> np.ndarray:
    """Copies a shard without some documents; returns [1, tokens, bytes] of each of these. Old files stay."""
    ids = np.memmap(old["tokens"], dtype, "r")
    marks = np.memmap(old["marks"], np.uint8, "r") if "marks" in old else None
    starts, text_ends = (np.fromfile(old[part], "<i8") for part in ("documents", "bytes"))
    ends, sizes = np.append(starts[1:], len(ids)), np.diff(text_ends, prepend=0)
    removed = np.stack([np.ones_like(gone), (ends - starts)[gone], sizes[gone]], axis=1)
    lengths = np.delete(ends - starts, gone)
    shard["tokens"], shard["documents"] = int(lengths.sum()), len(lengths)
    if len(lengths):  # else there is no such shard
        copies = {part: GrowingFile(new[part]) for part in [*old][:-1]}
        for begin, end in zip(np.append(-1, gone) + 1, np.append(gone, len(starts)), strict=True):
            if begin < end:  # a run of documents that stay
                copies["tokens"].write(ids[starts[begin] : ends[end - 1]])
                if marks is not None:
                    copies["marks"].write(marks[starts[begin] : ends[end - 1]])
        copies["documents"].write((np.cumsum(lengths) - lengths).astype("<u8"))
        copies["bytes"].write(np.cumsum(np.delete(sizes, gone)).astype("<u8"))
        for part, copy in copies.items():
            copy.close()
            shard["sha256"][part] = copy.sha256.hexdigest()
    return removed


def _find_duplicates(folder: Path, journals: dict[str, dict]) -> dict[tuple[str, str], np.ndarray]:
    """Returns which documents of each unit and split are duplicates. What validation has, train loses."""
    order = ("validation", "train")
    places = [(unit, split) for split in order for unit in journals if split in journals[unit]["splits"]]
    files = [folder / f"{unit}.{split}.hashes" for unit, split in places]
    return dict(zip(places, duplicates(files), strict=True))


def duplicates(files: list[Path], at_once: int = HASHES_AT_ONCE) -> list[np.ndarray]:
    """Returns for each file of hashes the numbers of those that occur earlier, in it or in a file before it.

    At most about `at_once` hashes are sorted in memory: more are divided by their remainders first.
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
