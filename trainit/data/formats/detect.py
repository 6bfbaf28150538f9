"""Tokens that other programs prepared, read where they lie: nanoGPT, llm.c, Megatron, GPT-NeoX, Hugging Face.

    *.bin                 nanoGPT: little-endian uint16 ids. llm.c: the same, or uint32 ids, after a
                          header of 256 int32: magic, version, number of ids
    *.idx and *.bin       Megatron and GPT-NeoX: an index of sequences, and their ids one after the
                          other; the .bin may lie in parts, as in NAME-00000-of-00020.bin (Pythia's)
    *.arrow, *.parquet    Hugging Face: rows with a list `input_ids`; see arrow.py

The words in a file's name, or in the names of subfolders ("train", "validation", ...: `WORDS`), decide which
split it belongs to. A split is the concatenation of its files in the order of their names. Its sequences are
cut out of that, as for prepared datasets; but if all stored sequences have the context length and one token
more, they are read as they are, in their order. Ids that are read must be in the vocabulary. No id is added,
and none is known to end a text.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

from trainit import tokenizers
from trainit.data.dataset import Dataset, DatasetError, Split, dtype_of, find_tokenizer, open_dataset
from trainit.data.documents.inputs import SAMPLES, describe_all, short_names
from trainit.data.formats import arrow, binary
from trainit.data.formats.binary import Shard
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.base import digest

PREPARED_SAMPLES = 256  # of all shards of a prepared dataset, at least 2 of each
WORDS = {  # words in names, and their splits; a test split is read only if there is no validation split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "eval", "dev"), "validation"),
    "test": "test",
}


def open_path(
    path: str, tokenizer: str | Tokenizer = "", validation_path: str = "", end_of_text: str = ""
) -> Dataset:
    """Opens the dataset at a path: a prepared one, or one that another program made.

    The path is a folder, a file, or the name of a Megatron pair of files without .bin and .idx. Tokens of
    other programs need a tokenizer, or one of `tokenizers.KINDS`, of which `end_of_text` may name a token; if
    `validation_path` is empty, their validation split lies with the training data.

    Raises DatasetError if there is nothing, it cannot be read, or one of the arguments does not fit it.
    """
    files = find(Path(path))
    if not files:
        dataset = open_dataset(Path(path))
        given = {"tokenizer": tokenizer, "validation_path": validation_path, "end_of_text": end_of_text}
        for field, value in given.items():
            if value:
                why = f"the prepared dataset.path={path!r} has its own; leave it empty"
                raise DatasetError(f"dataset.{field}={value!r}: {why}")
        # There may be thousands of files, whose digests are compared in full while the run trains.
        samples = PREPARED_SAMPLES // sum(len(split.paths) for split in dataset.splits.values())
        inputs = _inputs(dataset.splits, min(max(samples, 2), SAMPLES))
        return dataclasses.replace(dataset, inputs=inputs)
    found = _by_split(files, Path(path))
    if "train" not in found:
        raise DatasetError(f"dataset.path={path!r} has files to validate only, such as {files[0].name}")
    named, train = _tokenizer(tokenizer, files[0], end_of_text), _shards(found["train"])
    if validation_path:
        validation = _validation(validation_path, named)
    elif beside := found.get("validation") or found.get("test"):
        validation = _split("validation", _shards(beside), named)
    else:
        raise DatasetError(
            f"dataset.path={path!r} has {files[0].name} to train on and nothing to validate on: name files "
            f"as in val.bin, or set dataset.validation_path"
        )
    splits = {"train": _split("train", train, named), "validation": validation}
    # A part of a mixture, whose tokenizer is given as it is, has no validation split of its own.
    if isinstance(tokenizer, str) and (twice := set.intersection(*map(_real_paths, splits.values()))):
        raise DatasetError(f"{min(twice)} is in dataset.path={path!r} and in {validation_path=}")
    info = {
        "format": ", ".join(sorted({shard.format for shard in train})),
        "tokenizer": {"name": named.name, "sha256": digest(named.serialize())},
        "vocab_size": named.vocab_size,
        "dtype": dtype_of(named.vocab_size),
        "splits": {name: {"stored": split.stored, "files": _files(split)} for name, split in splits.items()},
    }
    return Dataset(Path(path), info, splits, named, inputs=_inputs(splits))


def _inputs(splits: dict[str, Split], samples: int = SAMPLES) -> dict[str, list]:
    """Describes the files of splits, each by this many samples of its content."""
    return {
        name: describe_all(split.paths, short_names(split.paths), samples) for name, split in splits.items()
    }


def find(path: Path) -> list[Path]:
    """Returns the files of other programs at a path, for Megatron the .idx; none for a prepared dataset.

    Raises DatasetError for files of several formats, or of none that is known.
    """
    pair = Path(f"{path}.idx")
    if not path.exists() and pair.is_file():
        return [pair]
    if path.is_file():
        if path.suffix not in INSPECT:
            lines = "; JSON lines need --config=FILE:dataset=jsonl" * (".jsonl" in path.suffixes)
            raise DatasetError(f"dataset.path={str(path)!r} ends in none of {', '.join(INSPECT)}{lines}")
        indices = path.parent.glob("*.idx") if path.suffix == ".bin" else ()
        return [next((index for index in indices if path in binary.parts(index)), path)]
    if not path.is_dir() or (path / "dataset.json").exists():
        return []
    folders = [path, *(f for f in sorted(path.iterdir()) if f.is_dir() and f.name.lower() in WORDS)]
    files = [file for folder in folders for file in _listed(folder)]
    indexed = {part for file in files if file.suffix == ".idx" for part in binary.parts(file)}
    files = [file for file in files if file not in indexed]
    kinds = {file.suffix: file for file in files}
    if len(kinds) > 1:
        raise DatasetError(
            f"dataset.path={str(path)!r} has files of several formats, such as "
            f"{' and '.join(file.name for file in kinds.values())}: name one of them, or move one away"
        )
    return files


def _listed(folder: Path) -> list[Path]:
    """Returns the files of a folder, or those that are listed in the state file of `datasets`."""
    state = folder / "state.json"
    if not state.is_file():
        files = [file for file in sorted(folder.iterdir()) if file.suffix in INSPECT]
        return [file for file in files if not (file.suffix == ".arrow" and file.name.startswith("cache-"))]
    try:
        about = json.loads(state.read_bytes())
        files = [folder / file["filename"] for file in about["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{state} is damaged ({error}); copy or save the dataset again") from None
    if about.get("_indices_data_files"):
        raise DatasetError(f"{state} names indices of rows: save it again after dataset.flatten_indices()")
    return files


def _by_split(files: list[Path], path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, by the last word of WORDS in their names; without them, train."""
    found: dict[str, list[Path]] = {}
    for file in files:
        name = str(file.relative_to(path) if path.is_dir() else file.name).lower()
        words = [WORDS[word] for word in re.findall("[a-z]+", name) if word in WORDS]
        found.setdefault(words[-1] if words else "", []).append(file)
    if "" not in found:
        return found
    if "train" in found:
        raise DatasetError(
            f"{found[''][0]} is for no split by its name, as {found['train'][0].name} is for train: rename "
            f"it or move it away"
        )
    found["train"] = found.pop("")
    return found


def _tokenizer(choice: str | Tokenizer, file: Path, end_of_text: str) -> Tokenizer:
    if not isinstance(choice, str):
        return choice
    if not choice:
        raise DatasetError(
            f"{file} has no tokenizer with it: set dataset.tokenizer to what its tokens were made with, one "
            f"of {tokenizers.KINDS}"
        )
    return find_tokenizer(choice, end_of_text)


def _validation(path: str, named: Tokenizer) -> Split:
    """Opens the validation split in a folder or file of its own, which may be a prepared dataset."""
    if files := find(Path(path)):
        found = _by_split(files, Path(path))
        chosen = found.get("validation") or found.get("test") or found["train"]
        return _split("validation", _shards(chosen), named)
    dataset = open_dataset(Path(path), "dataset.validation_path")
    theirs, ours = dataset.info["tokenizer"]["sha256"], digest(named.serialize())
    if theirs != ours or dataset.info["tokenizer"]["name"] != named.name:
        raise DatasetError(
            f"dataset.validation_path={path!r} was prepared with the tokenizer {theirs}, dataset.tokenizer "
            f"is {ours}: prepare it with that one"
        )
    if "validation" not in dataset.splits:
        raise DatasetError(f"dataset.validation_path={path!r} has no split validation")
    return dataset.splits["validation"]


def _split(name: str, shards: list[Shard], named: Tokenizer) -> Split:
    for shard in shards:
        if shard.format == "nanoGPT" and named.vocab_size > 1 << 16:
            raise DatasetError(
                f"{shard.path} has no header, so its ids are of 16 bits, but dataset.tokenizer has "
                f"{named.vocab_size} ids, which need more"
            )
    lengths = {shard.stored for shard in shards}
    paths, sizes = tuple(str(shard.path) for shard in shards), tuple(shard.tokens for shard in shards)
    stored, openers = lengths.pop() if len(lengths) == 1 else 0, tuple(shard.open for shard in shards)
    vocabulary, dtype = named.vocab_size, dtype_of(named.vocab_size)
    return Split(name, paths, sizes, dtype, None, stored=stored, below=vocabulary, openers=openers)


def _real_paths(split: Split) -> set[str]:
    return {os.path.realpath(path) for path in split.paths}


def _files(split: Split) -> list[list]:
    """Returns name, bytes and tokens of each file, for the fingerprint."""
    shards = zip(map(Path, split.paths), split.sizes, strict=True)
    return [[path.name, path.stat().st_size, tokens] for path, tokens in shards]


def _shards(files: list[Path]) -> list[Shard]:
    """Describes the files. A file may be several shards, or none if it is empty."""
    shards = []
    for file in files:
        try:
            shards += INSPECT[file.suffix](file)
        except OSError as error:
            raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from None
    return [shard for shard in shards if shard.tokens]


INSPECT = {
    ".bin": binary.inspect_bin,
    ".idx": binary.inspect_megatron,
    ".arrow": arrow.inspect_arrow,
    ".parquet": arrow.inspect_parquet,
}
