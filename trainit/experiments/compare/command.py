"""Compares runs: what they reach, how soon, at which learning rates.

    trainit compare RUN... [--output=FILE.png] [--page=FILE.html]

A RUN is a run's folder or one that holds such. Runs that differ only in their seed are taken together.
"""

import argparse
import shlex
import sys
from pathlib import Path

from trainit.cluster import files
from trainit.config import ConfigError, command_line
from trainit.config.exit_codes import DONE

DESCRIPTION = "Compares runs: what they reach, how soon, at which learning rates."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run, or one that holds such")
    add("--baseline", default="", help="method by which the others are measured; empty: the first one")
    add(
        "--target",
        type=command_line.number(float, 0),
        help="loss to reach; by default what all runs of the baseline reach",
    )
    add("--tuning_seeds", default="", help="seeds of runs that only choose the learning rate, e.g. 0,1")
    add("--output", type=lambda path: path and Path(path), help="PNG to draw into")
    add("--page", type=lambda path: path and Path(path), help="HTML page to write")


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison; returns the exit code."""
    from trainit.experiments.compare.report import compare
    from trainit.experiments.compare.runs import find

    try:
        seeds = {int(seed) for seed in arguments.tuning_seeds.split(",") if seed}
    except ValueError:
        raise ConfigError(f"--tuning_seeds={arguments.tuning_seeds} are not whole numbers") from None
    a, command = arguments, shlex.join(["trainit", *sys.argv[1:]])
    try:
        text = compare(find(a.runs), a.baseline, a.target, seeds, a.output, a.page, command)
    except OSError as error:
        raise ConfigError(files.describe_os_error(error)) from None
    print(text)
    return DONE
