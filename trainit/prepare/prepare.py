"""Makes a prepared dataset out of text files.

The tokens are a function of the input and the options. They are made in units (files, or small files
in a row), which tasks may share: task i of n, counted from 1 as Grid Engine does, does every n-th.
"""

import argparse
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from absl import logging
from tabulate import tabulate

from trainit import tokenizers
from trainit.cluster.files import write_atomically
from trainit.config import ConfigError, require
from trainit.config.exit_codes import DONE, FAILED
from trainit.data.dataset import FORMAT
from trainit.data.documents import conversations, reader
from trainit.data.documents.inputs import difference
from trainit.data.documents.reader import Position
from trainit.prepare import options, workers
from trainit.prepare.merge import COUNTS, join
from trainit.prepare.writer import Recipe, StateError
from trainit.tokenizers import Tokenizer, losses
from trainit.tokenizers.base import digest
from trainit.tokenizers.chat import template
from trainit.tokenizers.chat.encode import log_template

SAMPLE_BYTES = 1 << 28  # of text, from the beginnings of all files, to train a tokenizer on
SAMPLE_LINES = 1_000_000


def _sample(paths: list[Path], text_fields: tuple[str, str]) -> Iterator[str]:
    """Yields the texts at the beginning of each file, together about SAMPLE_BYTES."""
    share = SAMPLE_BYTES // len(paths)
    for path in paths:
        size = 0
        for batch in reader.read(path, path.name, text_fields, Position()):
            for document in reader.parse(batch, text_fields)[0]:
                size += len(document.text)
                yield document.text
            if size >= share:
                break


def _tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Returns the tokenizer of --tokenizer. With --train_tokenizer it is trained first, unless it exists."""
    path = Path(args.tokenizer.partition(":")[2])
    if args.train_tokenizer and path.exists():
        logging.info("%-10s %s is used as it is; remove it to train it again", "tokenizer", path)
    elif args.train_tokenizer:
        logging.info("%-10s training %s with %d ids", "tokenizer", path, args.vocab_size)
        texts = _sample(options.files(args.input, "input")[0], (args.text_field, args.subset_field))
        model = tokenizers.SentencePieceTokenizer.train(texts, args.vocab_size, SAMPLE_LINES)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model.serialize())
    tokenizer = tokenizers.find(args.tokenizer, "--tokenizer", args.end_of_text)
    logging.info("%-10s %s", "tokenizer", tokenizers.describe(tokenizer, args.tokenizer))
    require(
        tokenizer.vocab_size == args.vocab_size or not args.train_tokenizer,
        f"--vocab_size={args.vocab_size}, but {path} has {tokenizer.vocab_size} ids already: remove it to "
        f"train it again, give its number, or name another file",
    )
    first = options.files(args.input, "input")[0][0]
    tokenizer.examples = reader.first_texts(first, conversations.fields(args.text_field, "", args.chat))
    if lost := losses.describe(tokenizer):
        logging.warning("%-10s %s", "warning", lost)
    return tokenizer


def _source(args: argparse.Namespace, tokenizer: Tokenizer, inputs: dict) -> dict:
    """Everything that decides which tokens come out."""
    content, end = digest(tokenizer.serialize()), tokenizer.end_of_text
    about = {"end_of_text": end, "name": tokenizer.name, "sha256": content}
    recipe = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return {"format": FORMAT, "tokenizer": about, **recipe, "unit_bytes": args.unit_bytes, "input": inputs}


def _options(source: dict) -> dict:
    """What `_source` holds without the input, those of the tokenizer as `tokenizer.sha256` and so on."""
    about = {f"tokenizer.{key}": value for key, value in source.get("tokenizer", {}).items()}
    return {key: value for key, value in source.items() if key not in ("input", "tokenizer")} | about


def _read(file: Path, part: str) -> dict:
    """Returns the content of a dataset.json or recipe.json, which has this part."""
    try:
        about: dict = json.loads(file.read_bytes())
        _ = about[part].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{file} is damaged ({error!r}): remove its folder, or name another") from None
    return about


def _claim(output: Path, source: dict) -> dict | None:
    """Begins or continues the dataset in `output`. Returns the content of its dataset.json if it is finished.

    Raises:
        ConfigError: the folder was begun from another input or with other options.
    """
    finished, recipe = output / "dataset.json", output / "unfinished" / "recipe.json"
    info = _read(finished, "source") if finished.exists() else None
    if info is None and not recipe.exists():
        recipe.parent.mkdir(parents=True, exist_ok=True)
        own = recipe.with_suffix(
            f".{socket.gethostname()}.{os.getpid()}"
        )  # others may begin at the same time
        write_atomically(own, json.dumps(source, indent=1))
        own.replace(recipe)
    previous = info["source"] if info else _read(recipe, "input")
    was, now = (_options(which) for which in (previous, source))
    how = [
        f"{key}={str(was.get(key))[:80]}, not {str(now.get(key))[:80]}"
        for key in {**now, **was}
        if was.get(key) != now.get(key)
    ]
    before = previous.get("input", {})
    how += [text for split in before if (text := difference(before[split], source["input"][split]))]
    if how:
        raise ConfigError(
            f"--output={output} holds a dataset made with other options or input: {how[0]}; give the same, "
            f"remove the folder, or name another"
        )
    if info:  # what a kill has left, after everything was done
        shutil.rmtree(recipe.parent, ignore_errors=True)
    return info


def _finish(info: dict) -> int:
    """Prints documents, tokens and UTF-8 bytes of each split and subset; returns the exit code."""
    rows = [("split", "subset", *COUNTS)]
    for name, split in info["splits"].items():
        parts = split["subsets"] if len(info["subsets"]) > 1 else {}
        for subset, counts in [*parts.items(), ("all", split)]:
            rows.append((name, subset or "(none)", *(f"{counts[key]:,}" for key in COUNTS)))
    alignment = ("left", "left", "right", "right", "right")
    print(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=alignment))
    # What is not among them.
    if info["subsets"] == [""] and (name := info["source"]["subset_field"]):
        print(f"no document has a subset: --subset_field={name} is missing or null in all of them")
    if info["duplicates"]:
        print(f"{info['duplicates']:,} duplicates left out")
    if count := info["broken"]["count"]:
        first = info["broken"]["list"][0]
        print(f"{count:,} broken left out, listed in dataset.json, the first: {first}")
    if damaged := info["broken"]["damaged_files"]:
        logging.error("trainit: error: %d files are damaged or truncated: their rest is missing", damaged)
    fraction = info["source"]["validation_fraction"]
    flags = {
        "train": "--input",
        "validation": f"--validation_fraction={fraction}" if fraction else "--validation",
    }
    empty = [name for name, split in info["splits"].items() if split["tokens"] < 2 or not split["bytes"]]
    for name in empty:
        logging.error("trainit: error: the split %s has no text to use: change %s", name, flags[name])
    return FAILED if damaged or empty else DONE


def prepare(args: argparse.Namespace) -> int:
    """Does what the options say; returns the exit code."""
    options.check(args)
    # What is to be done, and with which tokenizer.
    units, inputs = options.plan(args)
    try:
        tokenizer = _tokenizer(args)
    except ValueError as error:  # a choice that cannot be had, or a size that does not fit the texts
        raise ConfigError(str(error)) from None
    if not args.output:
        return DONE
    if args.chat:
        args.chat, where = template.settings(args.template, args.tokenizer, args.date)
        log_template(where, args.chat, tokenizer)
    source = _source(args, tokenizer, inputs)
    recipe = Recipe(**{field.name: source[field.name] for field in fields(Recipe)})
    if info := _claim(args.output, source):
        logging.info("%-10s %s is finished already", "done", args.output)
        return _finish(info)
    # The units' work, which shards share, and what makes a dataset of it.
    if not args.join:
        index, count = options.shard(args.shard) if args.shard else (0, 1)
        own_units = units[index::count]
        workers.run(own_units, args.output / "unfinished", tokenizer, recipe, args.workers)
        if args.shard:
            logging.info("%-10s %d of %d units: shard %s", "done", len(own_units), len(units), args.shard)
            return DONE
    splits = "train", "validation"
    return _finish(join(args.output, units, splits, tokenizer, recipe.deduplicate, source))
