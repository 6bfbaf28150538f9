"""Many runs from one file, compared at the end.

    python -m trainit.tools.sweep FILE[:ARGUMENT] [--output=FOLDER] [--sbatch=OPTIONS | --qsub=OPTIONS]

Finished runs are not run again, so that the same command resumes a sweep that was stopped.
Exit codes: 0 all runs are done, 75 stopped on request, 2 bad usage, 1 a run has failed.
"""

import argparse
import shlex
import sys
from pathlib import Path

from trainit import logs
from trainit.config import ConfigError
from trainit.tools.sweep import greedy, launch, search, spec


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainit.tools.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("sweep", metavar="FILE[:ARGUMENT]", help="has get_sweep(argument)")
    parser.add_argument("--output", type=Path, help="folder of its runs; runs/ and the file's name")
    parser.add_argument(
        "--sbatch", metavar="OPTIONS", help="as an array job of Slurm: its options for each run"
    )
    parser.add_argument(
        "--qsub", metavar="OPTIONS", help="as an array job of Grid Engine: options for each run"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only print the commands of what is to be done"
    )
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    logs.log_to_terminal(lead=True)
    try:
        sweep = spec.read(arguments.sweep, arguments.output)
        if arguments.dry_run:
            jobs = sweep.wanted(launch.loss)
            print(*(spec.command(job) for job in jobs if not launch.finished(job)), sep="\n")
            return 0
        chosen = [
            (name, getattr(arguments, name)) for name in launch.LAUNCH if getattr(arguments, name) is not None
        ]
        if len(chosen) > 1:
            parser.error("--sbatch and --qsub exclude each other")
        runner = launch.ArrayRunner(*chosen[0], sweep.output) if chosen else launch.LocalRunner()
        if sweep.greedy:
            greedy.search(sweep, runner.run)
            return 0
        jobs = search.search(sweep, runner.run)
        search.report(sweep, jobs, shlex.join(["python", "-m", "trainit.tools.sweep", *sys.argv[1:]]))
    except launch.StoppedError:
        print("stopped; the same command resumes it", file=sys.stderr)
        return launch.STOPPED
    except (ConfigError, OSError) as error:
        print(f"trainit: error: {error}", file=sys.stderr)
        return 2
    failed = [job for job in jobs if not launch.finished(job)]
    for job in failed:
        print(f"failed  {job}: {launch.failure(job)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
