"""Compares runs: what they reach, how soon, at which learning rates.

    python -m trainit.tools.compare RUN... [--output=FILE.png] [--page=FILE.html]

A RUN is a run's folder or one that holds such. Runs that differ in their seed alone are taken together.
"""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from trainit.config import ConfigError
from trainit.tools.compare import report, statistics
from trainit.tools.compare.runs import Method, Run, find, group


def compare(
    runs: Sequence[Run],
    baseline: str = "",
    target: float | None = None,
    tuning_seeds: Collection[int] = (),
    output: Path | None = None,
    page: Path | None = None,
    command: str = "",
) -> str:
    """Compares runs, draws what was asked for, and returns the text for the terminal.

    Args:
        runs: at least one.
        baseline: the method to measure the others by; empty: the first one.
        target: validation loss to reach; None: what every run of the baseline reaches.
        tuning_seeds: see `group`.
        output: a PNG to draw into.
        page: an HTML page to write.
        command: that the page names.

    Raises:
        ConfigError: there is no such baseline, or nothing to draw with.
        OSError: a file cannot be written.
    """
    methods = group(runs, tuning_seeds)
    base = _find(methods, baseline)
    target = statistics.default_target(base.best) if target is None else target
    rows = statistics.table(methods, base, target)
    tables = report.tables(rows, base, target)
    text = "\n\n".join(table.text() for table in tables)
    for line in report.unfinished(runs):
        text += f"\nnot finished  {line}"
    if output or page:
        try:
            from trainit.tools.compare import figures
        except ImportError as error:
            raise ConfigError(f"pictures need {error.name}: pip install 'trainit[demo]'") from None
        panels = figures.panels(rows, methods, base)
        if output:
            figures.png(panels, output)
            text += f"\n{'curves' if len(runs) == 1 else 'picture'} in {output}"
        if page:
            pictures = {name: figures.svg(draw) for name, draw in panels.items()}
            title = "Comparison of " + ", ".join(row.method.name for row in rows)
            page.write_text(report.page(title, command, tables, pictures, runs))
            text += f"\npage in {page}"
    return text


def _find(methods: Sequence[Method], name: str) -> Method:
    found = [method for method in methods if method.name == name] if name else methods
    if not found:
        there = ", ".join(repr(method.name) for method in methods)
        raise ConfigError(f"--baseline={name}: there are {there}")
    return found[0]


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
