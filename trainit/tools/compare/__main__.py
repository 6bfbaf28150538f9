"""Compares runs: what they reach, how soon, at which learning rates.

    python -m trainit.tools.compare RUN... [--output=FILE.png] [--page=FILE.html]

A RUN is a run's folder or one that holds such. Runs that differ in their seed alone are taken together.
"""

import argparse
import shlex
import sys
from pathlib import Path

from trainit.config import ConfigError
from trainit.tools.compare.comparison import compare
from trainit.tools.compare.runs import find


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainit.tools.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders that hold them")
    parser.add_argument("--baseline", default="", help="the method that others are measured by; the first")
    parser.add_argument("--target", type=float, help="loss to reach; what all runs of the baseline reach")
    parser.add_argument("--tuning_seeds", default="", help="of runs that only choose the learning rate: 0,1")
    parser.add_argument("--output", type=Path, help="PNG to draw into")
    parser.add_argument("--page", type=Path, help="HTML page to write")
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "trainit.tools.compare", *sys.argv[1:]])
    try:
        seeds = {int(seed) for seed in arguments.tuning_seeds.split(",") if seed}
    except ValueError:
        parser.error(f"--tuning_seeds={arguments.tuning_seeds} are not whole numbers")
    try:
        runs = find(arguments.runs)
        how = (arguments.baseline, arguments.target, seeds, arguments.output, arguments.page, command)
        print(compare(runs, *how))
    except (ConfigError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print(f"trainit: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
