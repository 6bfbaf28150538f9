"""Many runs from one file, compared at the end.

    trainit sweep FILE[:ARGUMENT] [--output=FOLDER] [--sbatch=OPTIONS | --qsub=OPTIONS]

Finished runs are not run again, so that the same command resumes a sweep that was stopped.
Exit codes: 0 all runs are done, 75 stopped on request, 2 bad usage, 1 a run has failed.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainit import cli, logs
from trainit.cluster.process import DONE, FAILED, STOPPED
from trainit.config import ConfigError

if TYPE_CHECKING:
    from trainit.tools.sweep.spec import Sweep

DESCRIPTION = "Starts many runs from one file, and compares them. The same command resumes it after a stop."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add(
        "sweep",
        metavar="FILE[:ARGUMENT]",
        help="file with get_sweep(argument), e.g. configs/bench_optimizers.py:small",
    )
    add("--output", type=Path, help="folder of its runs; by default runs/ and the file's name")
    add("--dry_run", action="store_true", help="only print the commands of what is to be done")
    scheduler = parser.add_mutually_exclusive_group()
    scheduler.add_argument("--sbatch", metavar="OPTIONS", help="as an array job of Slurm, with these options")
    scheduler.add_argument(
        "--qsub", metavar="OPTIONS", help="as an array job of Grid Engine, with these options"
    )


def _check_names(sweep: "Sweep") -> None:
    """Raises ConfigError, before anything runs, if a config file or the sweep sets an unknown field."""
    for variant in sweep.variants:
        point = variant.points[0] if variant.points else ()
        arguments = cli.train_parser("trainit train").parse(sweep.job(variant, point, 0).arguments)
        cli.load_config(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Runs the sweep to its end, and prints the comparison; returns the exit code."""
    from trainit.tools.sweep import greedy, launch, search, spec

    logs.log_to_terminal(lead=True)
    try:
        sweep = spec.read(arguments.sweep, arguments.output)
        _check_names(sweep)
        if arguments.dry_run:
            jobs = sweep.wanted(launch.loss)
            print(*(spec.command(job) for job in jobs if not launch.finished(job)), sep="\n")
            return DONE
        options = {name: getattr(arguments, name) for name in launch.LAUNCH}
        chosen = [(name, option) for name, option in options.items() if option is not None]
        runner = launch.ArrayRunner(*chosen[0], sweep.output) if chosen else launch.LocalRunner()
        if sweep.greedy:
            greedy.search(sweep, runner.run)
            return DONE
        jobs = search.search(sweep, runner.run)
        search.report(sweep, jobs, shlex.join(["trainit", "sweep", *sys.argv[2:]]))
    except launch.StoppedError:
        print("stopped; the same command resumes it", file=sys.stderr)
        return STOPPED
    except OSError as error:
        raise ConfigError(str(error)) from None
    failed = [job for job in jobs if not launch.finished(job)]
    for job in failed:
        print(f"failed  {job}: {launch.failure(job)}", file=sys.stderr)
    return FAILED if failed else DONE
