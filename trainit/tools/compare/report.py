"""Prints a comparison: tables for the terminal, and one HTML page that needs no other file."""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from trainit.tools.compare.runs import Method, Run
from trainit.tools.compare.statistics import NEAR, Estimate, Row, Span, at_edge, nearly_best

CAPTIONS = {
    "one": "Loss of the run: thin lines are the training batches, the dashed line is the validation set.",
    "step": "Validation loss by optimizer steps, each method at its best learning rate. Lines are means over "
    "seeds, bands their 95 % intervals. Lower is better; the steep beginning is cut off at the top.",
    "tokens": "The same by tokens of training text, which differ from steps where batches do.",
    "seconds": "The same by seconds of training, without start, compilation, validation and saving: what a "
    "costly update takes away from its gain. Comparable on equal, equally busy machines.",
    "rates": "Final loss by learning rate. The ring is the best one; in a flat valley the rate need not be "
    "exact; a cross at the top is a rate at which a run failed. A best rate at the end of its line has not "
    "been tuned: a better one may lie beyond.",
    "finals": "Final loss of each seed (dots), the mean (stroke) and its 95 % interval (bar).",
    "speed_ups": "How many times fewer steps and seconds than the baseline each method needs to reach the "
    "target. Bars are 95 % intervals; one that crosses 1 is no proven gain.",
}
REACHED = """Each method at its best learning rate. valid/loss: nats per token at the end, the mean over seeds
± half its 95 % interval (Student). state: what the optimizer keeps, in the memory of all devices."""
GAP = """ Differences from the baseline ({}) are paired by seed where the seeds are the same: such runs start
alike and see the same batches. p: the probability of at least such a difference by chance alone, of one
comparison, not corrected for their number."""
COST = """To a validation loss of {:.4f} nats per token, for the first time, interpolated linearly between
validations; means of the seeds that reach it. FLOPs: the model's (6 per weight and token, and attention),
without the optimizer's own. A speed-up is the ratio of geometric means, the baseline's over the method's,
with its 95 % interval; it is given where all seeds of both reach the target."""
RATES = f"""The learning rates whose final loss is within {NEAR:.0%} of the best, interpolated linearly over
the rate's logarithm between those that were tried: the wider, the easier to tune."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #888 }
.wide { overflow-x: auto } figure { margin: 1rem 0 } figcaption, .note { color: #555; font-size: .9rem }
figure svg { max-width: 100%; height: auto }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem }
"""

Columns = dict[str, Callable[[Row], str]]  # header -> the cell of a row


@dataclass(frozen=True)
class Table:
    """A table of cells as text, and what a reader has to know."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Returns the table for the terminal: the first column to the left, the others to the right."""
        alignment = ["left"] + ["right"] * (len(self.header) - 1)
        return tabulate(self.rows, self.header, "plain", colalign=alignment, disable_numparse=True)

    def html(self) -> str:
        table = tabulate(self.rows, self.header, "html", disable_numparse=True)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return f'<h2>{html.escape(self.title)}</h2>{note}<div class="wide">{table}</div>'


def number(value: float | None, digits: int = 4) -> str:
    """Returns significant digits, without exponents where these can be avoided; "-" for nan."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "failed"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and value < 1e7 else text


def interval(estimate: Estimate) -> str:
    """Returns "3.2810 ± 0.0021"."""
    if not math.isfinite(estimate.value):
        return "failed" if math.isinf(estimate.value) else "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} ± {(estimate.high - estimate.low) / 2:.4f}"


def ratio(estimate: Estimate) -> str:
    """Returns "1.32 (1.28 to 1.36)"."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"


def probability(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def tables(rows: Sequence[Row], baseline: Method, target: float) -> list[Table]:
    """Returns the tables of a comparison: what was reached, at which cost, how to tune the rate."""
    several = len(rows) > 1
    note = REACHED + GAP.format(baseline.name) * several
    found = [_table("What was reached", note, _reached(several, baseline), rows)]
    if several and math.isfinite(target) and any(row.reached for row in rows):
        title = f"The cost of reaching a loss of {target:.4f}"
        found.append(_table(title, COST.format(target), _cost(baseline), rows))
    spans = {row.method.name: span for row in rows if (span := nearly_best(row.method))}
    if spans:
        tuned = [row for row in rows if row.method.name in spans]
        found.append(_table("How exact the learning rate must be", RATES, _rates(spans), tuned))
    return found


def _table(title: str, note: str, columns: Columns, rows: Sequence[Row]) -> Table:
    return Table(title, note, list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _reached(several: bool, baseline: Method) -> Columns:
    """Returns the columns of the first table."""

    def last(metric: str, form: str) -> Callable[[Row], str]:
        """Returns the cell of a metric's last value, the mean over runs."""

        def cell(row: Row) -> str:
            values = [run.curve("step", metric)[1] for run in row.setting.runs]
            ends = [v[-1] for v in values if v]
            return f"{statistics.fmean(ends):{form}}" if ends else "-"

        return cell

    def speed(row: Row) -> str:
        speeds = [s for r in row.setting.runs for s in r.curve("step", "throughput/tokens_per_second")[1]]
        return f"{statistics.median(speeds):.0f}" if speeds else "-"

    def state(row: Row) -> str:
        return number(row.setting.runs[0].facts.get("optimizer_bytes", math.nan) / 2**20, 3)

    columns: Columns = {
        "method": lambda row: row.method.name,
        "rate": lambda row: number(row.setting.rate),
        "seeds": lambda row: str(len(row.setting.runs)),
        "steps": lambda row: str(max(run.done for run in row.setting.runs)),
        "tokens": last("tokens", ".0f"),
        "valid/loss": lambda row: interval(row.loss),
        "bits/byte": last("valid/bits_per_byte", ".4f"),
        "tokens/s": speed,
        "state MiB": state,
    }
    if several:
        columns["minus baseline"] = lambda row: "-" if row.method is baseline else interval(row.gap)
        columns["p"] = lambda row: "-" if row.method is baseline else probability(row.gap.p)
    return columns


def _cost(baseline: Method) -> Columns:
    """Returns the columns of the table of costs."""

    def spent(unit: str) -> Callable[[Row], str]:
        return lambda row: number(row.costs[unit].value) if unit in row.costs else "-"

    def gain(unit: str, form: Callable[[Estimate], str], own: str) -> Callable[[Row], str]:
        """Returns the cell of a speed-up; `own` is the baseline's."""
        return lambda row: (
            own if row.method is baseline else form(row.speed_ups[unit]) if unit in row.speed_ups else "-"
        )

    return {
        "method": lambda row: row.method.name,
        "reached by": lambda row: f"{row.reached} of {len(row.setting.runs)}",
        "steps": spent("step"),
        "tokens": spent("tokens"),
        "FLOPs": spent("flops"),
        "seconds": spent("seconds"),
        "speed-up in steps": gain("step", ratio, "1"),
        "p": gain("step", lambda estimate: probability(estimate.p), "-"),
        "in seconds": gain("seconds", ratio, "1"),
        "its p": gain("seconds", lambda estimate: probability(estimate.p), "-"),
    }


def _rates(spans: dict[str, Span]) -> Columns:
    """Returns the columns of the table of learning rates; spans are by method."""

    def low(row: Row) -> str:
        span = spans[row.method.name]
        return "≤ " * span.low_open + number(span.low, 2)

    def high(row: Row) -> str:
        span = spans[row.method.name]
        return "≥ " * span.high_open + number(span.high, 2)

    def factor(row: Row) -> str:
        span = spans[row.method.name]
        return "≥ " * (span.low_open or span.high_open) + f"{span.high / span.low:.2g}"

    return {
        "method": lambda row: row.method.name,
        "rates tried": lambda row: ", ".join(number(s.rate) for s in row.method.settings),
        "best": lambda row: number(row.setting.rate),
        f"within {NEAR:.0%} from": low,
        "to": high,
        "factor": factor,
        "": lambda row: "not tuned: the best is the last" if at_edge(row.method) else "",
    }


def unfinished(runs: Sequence[Run]) -> list[str]:
    """Returns a line for each run that has not reached its end."""
    return [
        f"{run.path}: ended at step {run.done} of {run.steps}; counted as failed"
        for run in runs
        if not run.finished
    ]


def page(
    title: str, command: str, parts: Sequence[Table], pictures: dict[str, str], runs: Sequence[Run]
) -> str:
    """Returns the page.

    Args:
        title: its heading.
        command: what made it.
        parts: tables.
        pictures: texts of <svg> by the names of CAPTIONS.
        runs: all that were compared.
    """
    devices = sorted({f"{r.facts['devices']}, {r.facts['versions']}" for r in runs if r.facts})
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
        for name, svg in pictures.items()
    )
    failed = "".join(f"<li>{html.escape(line)}</li>" for line in unfinished(runs))
    first, *rest = parts
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>"
        f"<p>{len(runs)} runs on {html.escape('; '.join(devices) or 'unknown devices')}. "
        f"Made by <code>{html.escape(command)}</code></p>"
        f'{first.html()}<h2>Pictures</h2><div class="figures">{figures}</div>'
        f"{''.join(part.html() for part in rest)}"
        + (f"<h2>Not finished</h2><ul>{failed}</ul>" if failed else "")
        + "</body></html>\n"
    )
