"""The comparison in words and tables: for the terminal, and as one HTML page that needs nothing else."""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainit.tools.compare import statistics as measures
from trainit.tools.compare.runs import Method, Run
from trainit.tools.compare.statistics import Estimate, Row

CAPTIONS = {
    "one": "Loss of the run: thin lines are the training batches, the dashed line is the validation set.",
    "step": "Validation loss by optimizer steps, each method at its best learning rate. Lines are means over "
    "seeds, bands their 95 % intervals. Lower is better; the steep beginning is cut off at the top.",
    "tokens": "The same by tokens of training text, which differ from steps where batches do.",
    "seconds": "The same by seconds of training, without start, compilation, validation and saving: what a "
    "costly update takes away of its gain. Comparable on equal, equally busy machines.",
    "rates": "Final loss by learning rate. The ring is the best one; a flat valley means that the rate need "
    "not be hit well; a cross at the top is a rate at which a run failed. A best rate at the end of its line "
    "has not been tuned: a better one may lie beyond.",
    "finals": "Final loss of each seed (dots), the mean (stroke) and its 95 % interval (bar).",
    "speed_ups": "How many times fewer steps and seconds than the baseline's each method needs to reach the "
    "target. Bars are 95 % intervals; one that crosses 1 is no proven gain.",
}
REACHED = """Each method at its best learning rate. valid/loss: nats per token at the end, the mean over seeds
± half its 95 % interval (Student). state: what the optimizer keeps, in the memory of all devices."""
GAP = """ Differences from the baseline ({}) are paired by seed where the seeds are the same: such runs begin
alike and see the same batches. p: the probability of at least such a difference by chance alone, of one
comparison, not corrected for their number."""
WAY = """To a validation loss of {:.4f} nats per token, for the first time, by straight lines between
validations; means of the seeds that reach it. FLOPs: the model's (6 per weight and token, and attention),
without the optimizer's own. A speed-up is the ratio of geometric means, the baseline's over the method's,
with its 95 % interval; it is given where all seeds of both reach the target."""
RATES = f"""Between which learning rates the final loss stays within {measures.NEAR:.0%} of the best, by
straight lines over the rate's logarithm between those that were tried: the wider, the easier to tune."""
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


Columns = dict[str, Callable[[Row], str]]  # header -> what stands there in a row


@dataclass(frozen=True)
class Table:
    """Cells as text, and what a reader has to know."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Columns of equal width, the first one to the left."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            ).rstrip()
            for line in lines
        )

    def html(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        table = f"<table><thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>"
        return f'<h2>{html.escape(self.title)}</h2>{note}<div class="wide">{table}</div>'


def number(value: float, digits: int = 4) -> str:
    """Significant digits, without exponents where they can be avoided; "-" for nan."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "failed"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and value < 1e7 else text


def interval(estimate: Estimate, form: str = ".4f") -> str:
    """ "3.2810 ± 0.0021"."""
    if not math.isfinite(estimate.value):
        return "failed" if math.isinf(estimate.value) else "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ± {(estimate.high - estimate.low) / 2:{form}}"


def ratio(estimate: Estimate) -> str:
    """ "1.32 (1.28 to 1.36)"."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"


def probability(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def tables(rows: Sequence[Row], baseline: Method, target: float) -> list[Table]:
    """What there is to tell of these methods."""
    several = len(rows) > 1
    found = [
        _table(
            "What was reached",
            REACHED + GAP.format(baseline.name) * several,
            _reached(several, baseline),
            rows,
        )
    ]
    if several and math.isfinite(target) and any(row.reached for row in rows):
        columns = _way(baseline)
        found.append(_table(f"The way to a loss of {target:.4f}", WAY.format(target), columns, rows))
    spans = {row.method.name: measures.nearly_best(row.method) for row in rows}
    tuned = [row for row in rows if spans[row.method.name]]
    if tuned:
        found.append(_table("How well the learning rate must be hit", RATES, _rates(spans), tuned))
    return found


def _table(title: str, note: str, columns: Columns, rows: Sequence[Row]) -> Table:
    return Table(title, note, list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _reached(several: bool, baseline: Method) -> Columns:
    def last(metric: str, form: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            values = [run.curve("step", metric)[1] for run in row.setting.runs]
            ends = [v[-1] for v in values if v]
            return f"{statistics.fmean(ends):{form}}" if ends else "-"

        return cell

    def speed(row: Row) -> str:
        speeds = [s for r in row.setting.runs for s in r.curve("step", "throughput/tokens_per_second")[1]]
        return f"{statistics.median(speeds):.0f}" if speeds else "-"

    columns = {
        "method": lambda row: row.method.name,
        "rate": lambda row: number(row.setting.rate),
        "seeds": lambda row: str(len(row.setting.runs)),
        "steps": lambda row: str(max(run.done for run in row.setting.runs)),
        "tokens": last("tokens", ".0f"),
        "valid/loss": lambda row: interval(row.loss),
        "bits/byte": last("valid/bits_per_byte", ".4f"),
        "tokens/s": speed,
        "state MiB": lambda row: number(
            row.setting.runs[0].facts.get("optimizer_bytes", math.nan) / 2**20, 3
        ),
    }
    if several:
        columns["less baseline's"] = lambda row: "-" if row.method is baseline else interval(row.gap)
        columns["p"] = lambda row: "-" if row.method is baseline else probability(row.gap.p)
    return columns


def _way(baseline: Method) -> Columns:
    def spent(unit: str) -> Callable[[Row], str]:
        return lambda row: number(row.costs[unit].value) if unit in row.costs else "-"

    def gain(unit: str, tell: Callable[[Estimate], str], own: str) -> Callable[[Row], str]:
        return lambda row: (
            own if row.method is baseline else tell(row.speed_ups[unit]) if unit in row.speed_ups else "-"
        )

    return {
        "method": lambda row: row.method.name,
        "reached by": lambda row: f"{row.reached} of {len(row.setting.runs)}",
        "steps": spent("step"),
        "tokens": spent("tokens"),
        "FLOPs": spent("flops"),
        "seconds": spent("seconds"),
        "speed-up in steps": gain("step", ratio, "1"),
        "p": gain("step", lambda e: probability(e.p), "-"),
        "in seconds": gain("seconds", ratio, "1"),
        "its p": gain("seconds", lambda e: probability(e.p), "-"),
    }


def _rates(spans: dict[str, tuple]) -> Columns:
    def edge(row: Row, at: int) -> str:
        sign = ("≤ ", "≥ ")[at] if spans[row.method.name][2 + at] else ""
        return sign + number(spans[row.method.name][at], 2)

    def factor(row: Row) -> str:
        low, high, low_open, high_open = spans[row.method.name]
        return ("≥ " if low_open or high_open else "") + f"{high / low:.2g}"

    return {
        "method": lambda row: row.method.name,
        "rates tried": lambda row: ", ".join(number(s.rate) for s in row.method.settings),
        "best": lambda row: number(row.setting.rate),
        f"within {measures.NEAR:.0%} from": lambda row: edge(row, 0),
        "to": lambda row: edge(row, 1),
        "factor": factor,
        "": lambda row: "not tuned: the best is the last" if measures.at_edge(row.method) else "",
    }


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A line for each run that has not come to its end."""
    return [
        f"{run.path}: ended at step {run.done} of {run.steps}; counted as failed"
        for run in runs
        if not run.finished
    ]


def page(
    title: str, command: str, parts: Sequence[Table], pictures: dict[str, str], runs: Sequence[Run]
) -> str:
    """The whole page.

    Args:
        title: its heading.
        command: that made it.
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
        f"<p>{len(runs)} runs on {html.escape('; '.join(devices) or 'devices that they do not tell')}. "
        f"Made by <code>{html.escape(command)}</code></p>"
        f'{first.html()}<h2>Pictures</h2><div class="figures">{figures}</div>'
        f"{''.join(part.html() for part in rest)}"
        + (f"<h2>Not finished</h2><ul>{failed}</ul>" if failed else "")
        + "</body></html>\n"
    )
