"""Many runs from one file, compared at the end.

    trainit sweep FILE[:ARGUMENT] [--output=FOLDER] [--sbatch=OPTIONS | --qsub=OPTIONS]

Finished runs are not run again, so that the same command resumes a sweep that was stopped.
Exit codes: 0 all runs are done, 75 stopped on request, 2 bad usage, 1 a run has failed.
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainit.cluster import files, logs
from trainit.config import ConfigError, check_fields, command_line
from trainit.config.exit_codes import DONE, FAILED, STOPPED

if TYPE_CHECKING:
    from trainit.experiments.sweep.spec import Sweep

DESCRIPTION = "Starts many runs from one file, and compares them. The same command resumes it after a stop."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    example = "file with get_sweep(argument), e.g. configs/bench_optimizers.py:small"
    add("sweep", metavar="FILE[:ARGUMENT]", help=example)
    add(
        "--output",
        type=lambda path: path and Path(path),
        help="folder of its runs; by default runs/ and the file's name",
    )
    add("--dry_run", action="store_true", help="only print the commands, and what follows their results")
    add = parser.add_mutually_exclusive_group().add_argument
    slurm, grid = (f"as an array job of {name}, with these options" for name in ("Slurm", "Grid Engine"))
    add("--sbatch", dest="array", metavar="OPTIONS", type=lambda given: ("sbatch", given), help=slurm)
    add("--qsub", dest="array", metavar="OPTIONS", type=lambda given: ("qsub", given), help=grid)


def run(arguments: argparse.Namespace) -> int:
    """Runs the sweep to its end, and prints the comparison; returns the exit code."""
    from trainit.experiments.sweep import greedy, launch, spec

    logs.log_to_terminal(lead=True)
    try:
        sweep = spec.read(arguments.sweep, arguments.output)
        # What a config file or the sweep's fields must not have is an error before anything runs.
        for job in {(job.variant, job.changes): job for job in sweep.wanted(lambda job: None)}.values():
            config = command_line.load_config(command_line.train_parser("trainit train").parse(job.arguments))
            check_fields(config, config)
        if arguments.dry_run:
            print_plan(sweep)
            return DONE
        array = functools.partial(launch.run_array, arguments.array, sweep.output)
        start = array if arguments.array else launch.LocalRunner().run
        if sweep.greedy:
            greedy.search(sweep, start)
            return DONE
        jobs = launch.search(sweep, start)
        _report(sweep, [job.folder for job in jobs])
    except launch.StoppedError:
        print("stopped; the same command resumes it", file=sys.stderr)
        return STOPPED
    except OSError as error:
        raise ConfigError(files.describe_os_error(error)) from None
    failed = [job for job in jobs if not launch.finished(job)]
    for job in failed:
        print(f"failed  {job}: {launch.failure(job)}", file=sys.stderr)
    return FAILED if failed else DONE


def print_plan(sweep: "Sweep") -> None:
    """Prints the commands that can be given now, and as comments what follows their results."""
    from trainit.experiments.sweep import greedy, launch

    if sweep.greedy:
        todo, after = greedy.plan(sweep)
    else:
        todo = [job for job in sweep.wanted(launch.loss) if not launch.finished(job)]
        after = [shlex.join(["trainit", "train", *job.arguments]) for job in sweep.undecided(launch.loss)]
        if sweep.extend and after:
            after.append("further rates with the tuning seeds, if the best is at an end of its grid")
    lines = [shlex.join(["trainit", "train", *job.arguments]) for job in todo]
    print(*lines, *(f"# then: {line}" for line in after), sep="\n")


def _report(sweep: "Sweep", folders: list[Path]) -> None:
    """Prints the comparison and writes its picture and page, if any run has left metrics."""
    from trainit.experiments.compare.report import compare
    from trainit.experiments.compare.runs import find, group

    if runs := find(folder for folder in folders if (folder / "metrics.jsonl").exists()):
        methods, folder = group(runs, sweep.tuning_seeds), sweep.output / sweep.baseline
        of_baseline = (m for m in methods for s in m.settings for r in s.runs if folder in r.path.parents)
        base, command = next(of_baseline, methods[0]), shlex.join(["trainit", *sys.argv[1:]])
        picture, page = sweep.output / "sweep.png", sweep.output / "sweep.html"
        print(compare(runs, base.name, sweep.target, sweep.tuning_seeds, picture, page, command))
