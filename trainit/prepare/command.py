"""Turns text files into a prepared dataset.

    trainit prepare --input='pile/train/*.jsonl.zst' --validation='pile/val.jsonl.zst' \\
        --tokenizer=gpt2 --output=data/pile [--workers=N] [--shard=3/30] [--join]

Exit codes: 0 all is done, 75 stopped on request with everything kept, 2 wrong usage, 1 anything else.
"""

import argparse
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import logging

from trainit import tokenizers
from trainit.cluster import files, logs
from trainit.config import DATASETS, ConfigError
from trainit.config.exit_codes import FAILED, STOPPED
from trainit.data.dataset import DatasetError
from trainit.data.documents.reader import SUFFIXES
from trainit.prepare import prepare, workers
from trainit.prepare.writer import Recipe

DESCRIPTION = "Turns text files into token ids on disk. The same command resumes it after a stop."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument_group("what is read and written").add_argument
    kinds = ", ".join(SUFFIXES)
    add(
        "--input", action="append", default=[], help=f"files of the train split ({kinds}); a glob; repeatable"
    )
    add("--validation", action="append", default=[], help="files to validate on, likewise")
    add("--validation_fraction", type=float, default=0.0, help="documents put aside for it, by their hash")
    add("--tokenizer", default="", help=f"one of {tokenizers.KINDS}")
    add(
        "--end_of_text",
        default="",
        help="token that ends a text; else the one that the tokenizer's files name",
    )
    add("--output", type=lambda path: path and Path(path), help="folder of the dataset")
    add("--text_field", help="dotted path of the text in JSON or parquet (text), or of messages (messages)")
    add(
        "--chat",
        action="store_const",
        const=True,
        help="lines of JSON are conversations; what the assistant writes counts",
    )
    add(
        "--template", default="", help="chat template: FILE or chatml; else the tokenizer folder's, or chatml"
    )
    add("--date", default=DATASETS["chat"]().date, help="the day that chat templates take for today")
    add("--subset_field", help="dotted path of the subset's name (meta.pile_set_name; with --chat, none)")
    add("--on_error", default="stop", choices=("stop", "skip"), help="skip: list and count what is broken")
    add("--deduplicate", action="store_true", help="leave out documents that came before, byte for byte")
    add = parser.add_argument_group("how the work is shared").add_argument
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    add("--shard", default="", help="3/30: do the third of thirty parts of the work, and do not join")
    add("--join", action="store_true", help="do nothing except join what all shards have done")
    add("--shard_tokens", type=int, default=Recipe.shard_tokens, help="tokens after which a file is closed")
    add("--unit_bytes", type=int, default=1 << 26, help="smaller files in a row are one unit of work")
    add = parser.add_argument_group("other work").add_argument
    add("--train_tokenizer", action="store_true", help="make the model of --tokenizer=sentencepiece:FILE")
    add("--vocab_size", type=int, default=32_000, help="ids of the tokenizer that is made")


def run(arguments: argparse.Namespace) -> int:
    """Prepares, and returns the exit code."""
    logs.log_to_terminal(lead=True)
    try:
        return prepare.prepare(arguments)
    except workers.StoppedError:
        _log_error("stopped on request; everything so far is kept, and the same command resumes from there")
        return STOPPED
    except BrokenProcessPool:
        _log_error("a worker process died, killed from outside or for want of memory; --workers= takes fewer")
    except OSError as error:
        _log_error(files.describe_os_error(error))
    except ValueError as error:
        if isinstance(error, ConfigError) and not isinstance(error, DatasetError):
            raise  # wrong usage
        _log_error(error)
    return FAILED


def _log_error(error: Exception | str) -> None:
    logging.error("trainit: error: %s", " ".join(str(error).split()))
