"""Compares runs: the text for the terminal, the picture and the page."""

from collections.abc import Collection, Sequence
from pathlib import Path

from trainit.config import ConfigError
from trainit.tools.compare import report, statistics
from trainit.tools.compare.runs import Run, group


def compare(
    runs: Sequence[Run],
    baseline: str = "",
    target: float | None = None,
    tuning_seeds: Collection[int] = (),
    output: Path | None = None,
    page: Path | None = None,
    command: str = "",
) -> str:
    """Compares runs, draws a PNG and writes a page if asked to, and returns the text for the terminal.

    Defaults of the baseline are the first method, and of the target what every run of the baseline reaches.
    The command is printed on the page. Without the baseline or matplotlib raises ConfigError.
    """
    methods = group(runs, tuning_seeds)
    base = next((method for method in methods if baseline in ("", method.name)), None)
    if base is None:
        names = ", ".join(repr(method.name) for method in methods)
        raise ConfigError(f"--baseline={baseline}: there are {names}")
    target = max(base.best.finals.values()) if target is None else target
    rows = statistics.table(methods, base, target)
    tables = report.tables(rows, base, target)
    text = "\n\n".join(table.text() for table in tables)
    text += "".join(f"\nnot finished  {line}" for line in report.unfinished(runs))
    if not (output or page):
        return text

    try:  # matplotlib is an optional dependency and slow to import
        from trainit.tools.compare import figures
    except ImportError as error:
        raise ConfigError(f"pictures need {error.name}: pip install 'trainit[demo]'") from None
    panels = figures.panels(rows, methods, base)
    if output:
        figures.draw(panels).savefig(output)
        text += f"\n{'curves' if len(runs) == 1 else 'picture'} in {output}"
    if page:
        pictures = {name: figures.svg({name: draw}) for name, draw in panels.items()}
        title = "Comparison of " + ", ".join(row.method.name for row in rows)
        page.write_text(report.page(title, command, tables, pictures, runs))
        text += f"\npage in {page}"
    return text
