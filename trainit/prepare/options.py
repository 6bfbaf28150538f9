"""What one may ask of trainit.prepare.prepare, and the plan of work that follows from it."""

import argparse
import os
from pathlib import Path

from trainit.data import documents as readers
from trainit.data import tokenizers
from trainit.prepare.writer import Recipe, Unit


class UsageError(ValueError):
    """Options that cannot work. The message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parser(description: str) -> argparse.ArgumentParser:
    """The options of the command."""
    made = _Parser(prog="python -m trainit.prepare.prepare", description=description, allow_abbrev=False)
    add = made.add_argument
    kinds = ", ".join(readers.SUFFIXES)
    add(
        "--input", action="append", default=[], help=f"files of the train split ({kinds}); a glob; repeatable"
    )
    add("--validation", action="append", default=[], help="files of the validation split, likewise")
    add("--tokenizer", default="", help=f"one of {tokenizers.KINDS}")
    add("--output", type=Path, help="the dataset's folder")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores")
    add("--shard", default="", help="3/30: do the third of thirty parts of the work, and do not join")
    add("--join", action="store_true", help="do nothing but join what all shards have done")
    add("--verify", action="store_true", help="read a finished dataset and check all of it")
    add("--text_field", default="text", help="dotted path of the text in JSON or parquet")
    add("--subset_field", default="meta.pile_set_name", help="dotted path of the subset's name")
    add("--on_error", default="stop", choices=("stop", "skip"), help="skip: list and count what is broken")
    add("--validation_fraction", type=float, default=0.0, help="documents put aside, by their hash")
    add("--deduplicate", action="store_true", help="leave out documents that came before, byte for byte")
    add("--shard_tokens", type=int, default=Recipe.shard_tokens, help="close a shard past so many tokens")
    add("--unit_bytes", type=int, default=1 << 26, help="smaller files in a row are one unit of work")
    add("--train_tokenizer", action="store_true", help="make the model of --tokenizer=sentencepiece:FILE")
    add("--vocab_size", type=int, default=32_000, help="of the tokenizer that is made")
    return made


def check(args: argparse.Namespace):
    """Raises UsageError for options that do not go together."""

    def require(condition, message: str):
        if not condition:
            raise UsageError(message)

    require(args.output or args.train_tokenizer, "--output= is missing: the folder of the dataset")
    if args.verify:
        return
    require(args.input, "--input= is missing: the files of the train split")
    require(args.tokenizer, f"--tokenizer= is missing: one of {tokenizers.KINDS}")
    require(args.workers > 0, f"--workers={args.workers} must be above 0")
    require(args.shard_tokens > 0, f"--shard_tokens={args.shard_tokens} must be above 0")
    require(not (args.shard and args.join), "--shard and --join exclude each other: join comes last")
    fraction = args.validation_fraction
    require(0 <= fraction < 1, f"--validation_fraction={fraction} must lie in [0, 1)")
    require(
        not args.output or bool(args.validation) != bool(fraction),
        "give either --validation=FILES or --validation_fraction=, as in 0.001",
    )
    if args.train_tokenizer:
        require(
            args.tokenizer.startswith("sentencepiece:"),
            "--train_tokenizer needs --tokenizer=sentencepiece:FILE",
        )
        require(not args.shard, "--train_tokenizer first, in a command without --shard")


def shard(text: str) -> tuple[int, int]:
    """--shard as (index from 0, count)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--shard={text}: write 3/30 for the third of thirty; the first is 1/30")
    return int(index) - 1, int(count)


def files(patterns: list[str], flag: str) -> tuple[list[Path], list[str]]:
    """Returns the files that the patterns name, in order, and their names below the common folder."""
    try:
        return readers.find_files(patterns, f"--{flag}", readers.SUFFIXES)
    except ValueError as error:
        raise UsageError(str(error)) from None


def plan(args: argparse.Namespace) -> tuple[list[Unit], dict[str, list]]:
    """The units of work, and each split's files with their sizes."""
    units, inputs = [], {}
    for split, patterns, flag in (
        ("train", args.input, "input"),
        ("validation", args.validation, "validation"),
    ):
        paths, names = files(patterns, flag)
        sizes = [path.stat().st_size for path in paths]
        inputs[split] = [list(pair) for pair in zip(names, sizes, strict=True)]
        begin, size = 0, 0
        for end, one in enumerate(sizes, start=1):
            size += one
            if size >= args.unit_bytes or end == len(sizes):
                number = sum(unit.split == split for unit in units)
                units.append(Unit(f"{split}-{number:05d}", tuple(paths[begin:end]), tuple(names[begin:end])))
                begin, size = end, 0
    twice = {path for unit in units if unit.split == "train" for path in unit.paths} & {
        path for unit in units if unit.split == "validation" for path in unit.paths
    }
    if twice:
        raise UsageError(f"{min(twice)} is in --input and in --validation")
    return units, inputs
