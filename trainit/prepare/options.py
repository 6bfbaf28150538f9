"""Checks what the flags of `trainit prepare` ask for, and plans the work that follows from it."""

import argparse
import os
from pathlib import Path

from trainit import tokenizers
from trainit.config import DATASETS, ConfigError, require
from trainit.data.documents import reader
from trainit.data.documents.inputs import Input, describe_all
from trainit.prepare.writer import Unit


def check(args: argparse.Namespace):
    """Raises ConfigError for flags that do not go together."""
    require(bool(args.output or args.train_tokenizer), "--output= is missing: the folder of the dataset")
    require(bool(args.input), "--input= is missing: the files of the train split")
    require(bool(args.tokenizer), f"--tokenizer= is missing: one of {tokenizers.KINDS}")
    require(args.workers > 0, f"--workers={args.workers} must be above 0")
    require(args.shard_tokens > 0, f"--shard_tokens={args.shard_tokens} must be above 0")
    require(not (args.shard and args.join), "--shard and --join exclude each other: join comes last")
    usual = DATASETS["chat" if args.chat else "jsonl"]()
    args.text_field = args.text_field or usual.text_field
    args.subset_field = usual.subset_field if args.subset_field is None else args.subset_field
    require(not (args.chat and args.train_tokenizer), "--chat needs a tokenizer: train one on texts first")
    fraction = args.validation_fraction
    require(0 <= fraction < 1, f"--validation_fraction={fraction} must lie in [0, 1)")
    require(
        not args.output or bool(args.validation) != bool(fraction),
        "give either --validation=FILES or --validation_fraction=, as in 0.001",
    )
    if args.train_tokenizer:
        trainable = args.tokenizer.startswith("sentencepiece:")
        require(trainable, "--train_tokenizer needs --tokenizer=sentencepiece:FILE")
        require(not args.shard, "--train_tokenizer first, in a command without --shard")


def shard(text: str) -> tuple[int, int]:
    """--shard as (index from 0, count)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard={text}: write 3/30 for the third of thirty; the first is 1/30")
    return int(index) - 1, int(count)


def files(patterns: list[str], flag: str, chat: bool = False) -> tuple[list[Path], list[str]]:
    """Returns the files that the patterns name, in order, and their names below the common folder."""
    try:
        return reader.find_files(patterns, f"--{flag}", reader.LINES if chat else reader.SUFFIXES)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def plan(args: argparse.Namespace) -> tuple[list[Unit], dict[str, list[Input]]]:
    """The units of work, and each split's files."""
    units: list[Unit] = []
    inputs: dict[str, list[Input]] = {}
    found: dict[str, set[str]] = {}
    for split, flag in ("train", "input"), ("validation", "validation"):
        paths, names = files(getattr(args, flag), flag, args.chat)
        found[split], inputs[split] = {*map(os.path.realpath, paths)}, describe_all(paths, names)
        begin, size = 0, 0
        for end, one in enumerate(inputs[split], start=1):
            size += one.size
            if size >= args.unit_bytes or end == len(paths):
                number = sum(unit.split == split for unit in units)
                part = slice(begin, end)
                units.append(Unit(f"{split}-{number:05d}", tuple(paths[part]), tuple(inputs[split][part])))
                begin, size = end, 0
    if twice := found["train"] & found["validation"]:
        raise ConfigError(f"{min(twice)} is in --input and in --validation")
    return units, inputs
