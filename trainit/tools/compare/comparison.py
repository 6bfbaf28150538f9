"""Compares runs: the text for the terminal, the picture and the page."""

from collections.abc import Collection, Sequence
from pathlib import Path

from trainit.config import ConfigError
from trainit.tools.compare import report, statistics
from trainit.tools.compare.runs import Method, Run, group


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
