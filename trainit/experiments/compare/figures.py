"""Draws what runs have done, with matplotlib (an extra: pip install 'trainit[demo]')."""

import io
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainit.cluster import logs
from trainit.experiments.compare import statistics
from trainit.experiments.compare.runs import Method, Run
from trainit.experiments.compare.statistics import Row

LABELS = {"step": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training"}
LOSS = "validation loss (nats per token)"

Colors = dict[str, tuple]  # by method
Panels = dict[str, Callable[[Axes], None]]  # by the names of `report.CAPTIONS`


def draw_curves(axes: Axes, rows: Sequence[Row], x: str, colors: Colors):
    """Draws the validation loss of each method at its best rate: the mean over seeds in its interval."""
    ends, lows, early = [], [], []
    for row in rows:
        at, estimates = statistics.band(row.setting.runs, x, "valid/loss")
        if not at:
            continue
        color, marker = colors[row.method.name], "o" if len(at) < 30 else ""
        values, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).T
        axes.plot(at, values, color=color, label=row.setting.name, marker=marker, markersize=3)
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        _mark_changes(axes, row.setting.runs, x, color)
        ends.append(values[-1])
        lows.append(low[-1])
        early.append(values[np.searchsorted(at, 0.15 * at[-1])])
    # The steep beginning, which is alike for all, is cut off at the top, and wide bands at the bottom.
    if ends and max(early) > min(ends):
        height = max(early) - min(ends)
        bottom = max(np.nanmin(lows + ends), min(ends) - 0.5 * height)
        axes.set_ylim(bottom - 0.05 * height, max(early) + 0.05 * height)
    axes.xaxis.set_major_formatter(lambda value, _: logs.quantity(value))
    axes.set_xlim(left=0)
    _label(axes, LABELS[x], LOSS)


def draw_single(axes: Axes, runs: Sequence[Run]):
    """Draws runs one by one: training loss, smoothed over its raw values, and validation loss."""
    for run in runs:
        steps, losses = run.curve("step", "train/loss")
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        smooth = statistics.smooth(losses, max(1, len(losses) // 50))
        axes.plot(steps, smooth, color="C0", linewidth=1.6, label=f"{run.path}: training, smoothed")
        axes.plot(*run.curve("step", "valid/loss"), "o--", color="C0", ms=4, label=f"{run.path}: validation")
        _mark_changes(axes, [run], "step", "C0")
    axes.set_xlim(left=0)
    _label(axes, LABELS["step"], "loss (nats per token)")


def _mark_changes(axes: Axes, runs: Sequence[Run], x: str, color: str | tuple):
    """Draws a dotted line where a run continued with another config."""
    for run in filter(lambda run: run.records, runs):
        steps, places = run.curve("step", x)
        for step, _ in run.changes:
            axes.axvline(float(np.interp(step, steps, places)), color=color, linestyle=":", linewidth=1)


def draw_rates(axes: Axes, methods: Sequence[Method], colors: Colors):
    """Draws the final loss by learning rate: a ring around the best, a cross at the top for a failed run."""
    tuned = [method for method in methods if len(method.settings) > 1]
    for method in tuned:
        color = colors[method.name]
        good = [s for s in method.settings if math.isfinite(s.tuned_loss)]
        axes.plot([s.rate for s in good], [s.tuned_loss for s in good], color=color, marker="o", markersize=4)
        ring = method.best.rate, method.best.tuned_loss
        axes.plot(*ring, marker="o", markersize=10, fillstyle="none", color=color)
        for rate in [s.rate for s in method.settings if s not in good]:
            axes.plot(rate, 0.97, marker="x", color=color, transform=axes.get_xaxis_transform())
    # Losses far above the best of the worst method are cut off.
    losses = [s.tuned_loss for method in tuned for s in method.settings if math.isfinite(s.tuned_loss)]
    if losses:
        best = min(losses)
        ceiling = max(m.best.tuned_loss for m in tuned if math.isfinite(m.best.tuned_loss))
        height = min(max(losses) - best, ceiling - best + max(ceiling - best, 0.1 * best)) or 1
        axes.set_ylim(best - 0.06 * height, best + 1.1 * height)
    axes.set_xscale("log")
    _label(axes, "learning rate", f"final {LOSS}")


def draw_finals(axes: Axes, rows: Sequence[Row], colors: Colors):
    """Draws the final loss of each seed as a dot, their mean and its interval as a bar; the lowest on top."""
    shown = [row for row in rows if math.isfinite(row.loss.value)]
    for y, row in enumerate(reversed(shown)):
        color, values = colors[row.method.name], list(row.setting.finals.values())
        axes.plot(values, [y] * len(values), "o", color=color, markersize=4, alpha=0.6)
        axes.plot([row.loss.low, row.loss.high], [y] * 2, color=color, linewidth=2)
        axes.plot(row.loss.value, y, "|", color=color, markersize=14, markeredgewidth=2)
    _name_rows(axes, shown, f"final {LOSS}")


def draw_speed_ups(axes: Axes, rows: Sequence[Row], baseline: Method, colors: Colors):
    """Draws how many times fewer steps (full) and seconds (open) than the baseline the target takes."""
    shown = [row for row in rows if row.method is not baseline and row.speed_ups]
    for y, row in enumerate(reversed(shown)):
        color = colors[row.method.name]
        for unit, shift, fill, width in (("step", 0.12, "full", 2), ("seconds", -0.12, "none", 1)):
            if gain := row.speed_ups.get(unit):
                axes.plot([gain.low, gain.high], [y + shift] * 2, color=color, linewidth=width)
                axes.plot(gain.value, y + shift, "o", color=color, fillstyle=fill, markersize=6)
    axes.axvline(1, color="gray", linewidth=1)
    _name_rows(axes, shown, f"speed-up over {baseline.name} (steps ●, seconds ○)")


def _label(axes: Axes, x: str, y: str):
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def _name_rows(axes: Axes, rows: Sequence[Row], x: str):
    """Names a line of the picture after each row, the first at the top; long names are broken."""
    names = [row.method.name.replace(", ", ",\n") for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set(xlabel=x, ylim=(-0.6, len(rows) - 0.4))
    axes.grid(alpha=0.3, axis="x")


def panels(rows: Sequence[Row], methods: Sequence[Method], baseline: Method) -> Panels:
    """Returns what can be drawn of these runs."""
    if len(methods) == len(baseline.settings) == 1:
        return {"one": partial(draw_single, runs=baseline.best.runs)}
    # A method has the same color in all pictures; after 18 methods colors repeat.
    maps = matplotlib.colormaps["tab10"](range(10)), matplotlib.colormaps["Dark2"](range(8))
    palette = itertools.cycle(map(tuple, np.concatenate(maps)))
    colors = {method.name: color for method, color in zip(methods, palette, strict=False)}
    found: Panels = {
        x: partial(draw_curves, rows=rows, x=x, colors=colors)
        for x in LABELS
        if any(row.setting.runs[0].curve(x, "valid/loss")[0] for row in rows)
    }
    if any(len(method.settings) > 1 for method in methods):
        found["rates"] = partial(draw_rates, methods=methods, colors=colors)
    if any(len(row.setting.runs) > 1 for row in rows):
        found["finals"] = partial(draw_finals, rows=rows, colors=colors)
    if any(row.speed_ups for row in rows if row.method is not baseline):
        found["speed_ups"] = partial(draw_speed_ups, rows=rows, baseline=baseline, colors=colors)
    return found


def draw(parts: Panels) -> Figure:
    """Returns all panels in one picture, three in a row, with one legend below."""
    columns = min(3, len(parts))
    lines = math.ceil(len(parts) / columns)
    size = max(8, 5.2 * columns), 4.5 * lines
    figure = Figure(size, dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, part in itertools.zip_longest(grid, parts.values()):
        part(axes) if part else axes.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), columns)
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def svg(parts: Panels) -> str:
    """Returns a picture as the text of an <svg>, with words as words."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trainit"}):
        draw(parts).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
