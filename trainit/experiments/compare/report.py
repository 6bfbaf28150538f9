"""Compares runs: tables for the terminal, a picture, and one HTML page that needs no other file."""

import html
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from trainit.cluster.files import errors_name
from trainit.config import ConfigError
from trainit.experiments.compare.runs import Method, Run, group
from trainit.experiments.compare.statistics import COSTS, NEAR, Estimate, Row, at_edge, nearly_best, table

CAPTIONS = {
    "one": "Loss of the run: thin lines are the training batches, the dashed line is the validation set.",
    "step": "Validation loss by optimizer steps, each method at its best learning rate. Lines are means over "
    "seeds, bands their 95 % intervals. Lower is better; the steep beginning is cut off at the top.",
    "tokens": "The same by tokens of training text, which differ from steps where batches do.",
    "seconds": "The same by seconds of training, without start, compilation, validation and saving: what a "
    "costly update takes away from its gain. Comparable on equal, equally busy machines.",
    "rates": "Final loss by learning rate. A ring: the best; a cross at the top: a failed run. A best one at "
    "the end of its line has not been tuned: a better one may lie beyond.",
    "finals": "Final loss of each seed (dots), the mean (stroke) and its 95 % interval (bar).",
    "speed_ups": "How many times fewer steps and seconds than the baseline each method needs to reach the "
    "target. Bars are 95 % intervals; one that crosses 1 is no proven gain.",
}
REACHED = """Each method at its best learning rate. valid/loss: nats per token at the end, the mean over seeds
± half its 95 % interval (Student). state: what the optimizer keeps, in the memory of all devices."""
GAP = """ Differences from the baseline ({}) are paired by seed where the seeds are the same: such runs start
alike and see the same batches. p: the probability of such a difference by chance, of one comparison alone."""
COST = """To a validation loss of {:.4f} nats per token, for the first time, interpolated linearly between
validations; means of the seeds that reach it. FLOPs: the model's (6 per weight and token, and attention),
without the optimizer's own. A speed-up is the ratio of geometric means, the baseline's over the method's,
with its 95 % interval; it is given where all seeds of both reach the target."""
RATES = f"""The learning rates whose final loss is within {NEAR:.0%} of the best, interpolated linearly over
the rate's logarithm between those that were tried: the wider, the easier to tune."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } figcaption, .note { color: #555; font-size: .9rem }
svg { max-width: 100%; height: auto }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)) }
"""


@dataclass(frozen=True)
class Table:
    """What a reader has to know, and rows of cells as text, by the names of their columns."""

    title: str
    note: str
    rows: list[dict[str, str]]

    def text(self) -> str:
        """Returns the table for the terminal: the first column to the left, the others to the right."""
        alignment = ["left"] + ["right"] * (len(self.rows[0]) - 1)
        return tabulate(self.rows, "keys", "plain", colalign=alignment, disable_numparse=True)

    def html(self) -> str:
        table = tabulate(self.rows, "keys", "html", disable_numparse=True)
        note = f'<p class="note">{html.escape(self.note)}</p>'
        return f'<h2>{html.escape(self.title)}</h2>{note}<div class="wide">{table}</div>'


def compare(
    runs: Sequence[Run],
    baseline: str = "",
    target: float | None = None,
    tuning_seeds: Collection[int] = (),
    output: Path | None = None,
    page: Path | None = None,
    command: str = "",
) -> str:
    """Compares runs, draws a PNG and writes a page, if asked to; returns the text for the terminal.

    The command is printed on the page. Without the baseline or matplotlib raises ConfigError.
    """
    methods = group(runs, tuning_seeds)
    base = next((method for method in methods if baseline in ("", method.name)), None)
    if base is None:
        raise ConfigError(f"--baseline={baseline}: there are {', '.join(repr(m.name) for m in methods)}")
    target = max(base.best.finals.values()) if target is None else target
    rows = table(methods, base, target)
    parts = _tables(rows, base, target)
    text = "\n\n".join(part.text() for part in parts)
    text += "".join(f"\nnot finished  {line}" for line in unfinished(runs))
    text += "".join(f"\nput together  {line}" for line in changed(runs))
    if not (output or page):
        return text

    try:  # matplotlib is an optional dependency and slow to import
        from trainit.experiments.compare import figures
    except ImportError as error:
        raise ConfigError(f"pictures need {error.name}: pip install 'trainit[demo]'") from None
    panels = figures.panels(rows, methods, base)
    if not panels:
        text += "\nno picture: no run has a validation loss that is finite"
    elif output:
        try:
            with errors_name(output):
                figures.draw(panels).savefig(output, format=output.suffix[1:] or "png")
        except ValueError as error:
            raise ConfigError(f"--output={output}: {error}") from None
        text += f"\n{'curves' if len(runs) == 1 else 'picture'} in {output}"
    if page:
        pictures = {name: figures.svg({name: draw}) for name, draw in panels.items()}
        title = "Comparison of " + ", ".join(row.method.name for row in rows)
        with errors_name(page):
            page.write_text(_page(title, command, parts, pictures, runs))
        text += f"\npage in {page}"
    return text


def number(value: float, digits: int = 4) -> str:
    """Returns significant digits, without exponents where these can be avoided; "-" for nan."""
    if not math.isfinite(value):
        return "failed" if math.isinf(value) else "-"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and value < 1e7 else text


def interval(estimate: Estimate) -> str:
    """Returns "3.2810 ± 0.0021"."""
    if not math.isfinite(estimate.value):
        return number(estimate.value)
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


def ratio(estimate: Estimate) -> str:
    """Returns "1.32 (1.28 to 1.36)"."""
    bounds = "" if math.isnan(estimate.low) else f" ({estimate.low:.3g} to {estimate.high:.3g})"
    return f"{estimate.value:.3g}{bounds}"


def probability(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _tables(rows: Sequence[Row], baseline: Method, target: float) -> list[Table]:
    """Returns the tables of a comparison: what was reached, at which cost, how to tune the rate."""
    several = len(rows) > 1
    note = REACHED + GAP.format(baseline.name) * several
    found = [Table("What was reached", note, [_reached(row, several, baseline) for row in rows])]
    if several and math.isfinite(target) and any(row.reached for row in rows):
        title = f"The cost of reaching a loss of {target:.4f}"
        found.append(Table(title, COST.format(target), [_cost(row, baseline) for row in rows]))
    if rates := list(filter(None, map(_rates, rows))):
        found.append(Table("How exact the learning rate must be", RATES, rates))
    return found


def _reached(row: Row, several: bool, baseline: Method) -> dict[str, str]:
    runs = row.setting.runs

    def last(metric: str, digits: int) -> str:
        """Returns the last value of a metric, the mean over runs."""
        ends = [values[-1] for run in runs if (values := run.curve("step", metric)[1])]
        return f"{statistics.fmean(ends):.{digits}f}" if ends else "-"

    speeds = [speed for run in runs for speed in run.curve("step", "throughput/tokens_per_second")[1]]
    cells = {
        "method": row.method.name,
        "rate": number(row.setting.rate),
        "seeds": str(len(runs)),
        "steps": str(max(run.done for run in runs)),
        "tokens": last("tokens", 0),
        "valid/loss": interval(row.loss),
        "bits/byte": last("valid/bits_per_byte", 4),
        "tokens/s": f"{statistics.median(speeds):.0f}" if speeds else "-",
        "state MiB": number(runs[0].facts.get("optimizer_bytes", math.nan) / 2**20, 3),
    }
    if several:
        itself = row.method is baseline
        cells |= {"minus baseline": "-" if itself else interval(row.gap)}
        cells |= {"p": "-" if itself else probability(row.gap.p)}
    return cells


def _cost(row: Row, baseline: Method) -> dict[str, str]:
    cells = {"method": row.method.name, "reached by": f"{row.reached} of {len(row.setting.runs)}"}
    for unit, header in zip(COSTS, ("steps", "tokens", "FLOPs", "seconds"), strict=True):
        cells[header] = number(row.costs[unit].value) if unit in row.costs else "-"
    for unit, header, p in (("step", "speed-up in steps", "p"), ("seconds", "in seconds", "its p")):
        gain = row.speed_ups.get(unit) if row.method is not baseline else Estimate(1)
        cells |= {header: ratio(gain) if gain else "-", p: probability(gain.p) if gain else "-"}
    return cells


def _rates(row: Row) -> dict[str, str]:
    """Returns nothing where a single rate was tried."""
    if (span := nearly_best(row.method)) is None:
        return {}
    return {
        "method": row.method.name,
        "rates tried": ", ".join(number(s.rate) for s in row.method.settings),
        "best": number(row.setting.rate),
        f"within {NEAR:.0%} from": "≤ " * span.low_open + number(span.low, 2),
        "to": "≥ " * span.high_open + number(span.high, 2),
        "factor": "≥ " * (span.low_open or span.high_open) + f"{span.high / span.low:.2g}",
        "": "not tuned: the best is the last" if at_edge(row.method) else "",
    }


def unfinished(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each run that has not reached its end."""
    failed = (run for run in runs if not run.finished)
    return [f"{run.path}: ended at step {run.done} of {run.steps}; counted as failed" for run in failed]


def changed(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each step after which a run continued with another config."""
    return [f"{run.path}: after step {step} with {what}" for run in runs for step, what in run.changes]


def _page(
    title: str, command: str, tables: list[Table], pictures: dict[str, str], runs: Sequence[Run]
) -> str:
    """Returns the page. The command is what made it; pictures are <svg> texts by the names of CAPTIONS."""
    title, command = html.escape(title), html.escape(command)
    machines = sorted({f"{run.facts['devices']}, {run.facts['versions']}" for run in runs if run.facts})
    devices = html.escape("; ".join(machines) or "unknown devices")
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
        for name, svg in pictures.items()
    )
    failed = "".join(f"<li>{html.escape(line)}</li>" for line in unfinished(runs))
    failed += "".join(f"<li>put together: {html.escape(line)}</li>" for line in changed(runs))
    first, *rest = (table.html() for table in tables)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>{len(runs)} runs on {devices}. Made by <code>{command}</code></p>
{first}<h2>Pictures</h2><div class="figures">{figures}</div>
{"".join(rest)}{failed and f"<h2>Not finished, or put together</h2><ul>{failed}</ul>"}</body></html>
"""
