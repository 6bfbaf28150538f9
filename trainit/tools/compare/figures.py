"""Pictures of what runs have done, of matplotlib (an extra: pip install 'trainit[demo]')."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainit.tools.compare import statistics
from trainit.tools.compare.runs import Method, Setting
from trainit.tools.compare.statistics import Row

LABELS = {"step": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training"}
LOSS = "validation loss (nats per token)"
SHADE = 0.15  # opacity of intervals


def colors(methods: Sequence[Method]) -> dict[str, str]:
    """A color for each method, the same in all pictures; more than twenty repeat."""
    palette = [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["tab10"].colors]
    palette += [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["Dark2"].colors]
    return {method.name: palette[i % len(palette)] for i, method in enumerate(methods)}


def curves(axes: Axes, rows: Sequence[Row], x: str, color: dict[str, str]):
    """Validation loss of each method at its best rate: mean over seeds, and its interval as a band.

    The first part of the way, in which all fall from the same height, is cut off at the top.
    """
    ends, lows, early = [], [], []
    for row in rows:
        at, estimates = statistics.band(row.setting.runs, x, "valid/loss")
        if not at:
            continue
        values = [e.value for e in estimates]
        axes.plot(
            at,
            values,
            color=color[row.method.name],
            label=row.setting.name,
            marker="o" if len(at) < 30 else "",
            markersize=3,
        )
        axes.fill_between(
            at,
            [e.low for e in estimates],
            [e.high for e in estimates],
            color=color[row.method.name],
            alpha=SHADE,
            linewidth=0,
        )
        ends.append(values[-1])
        lows.append(estimates[-1].low)
        early += [v for a, v in zip(at, values, strict=True) if a >= 0.15 * at[-1]][:1]
    if ends and max(early) > min(ends):
        room = max(early) - min(ends)
        bottom = min([low for low in lows if math.isfinite(low)] + ends)
        axes.set_ylim(max(bottom, min(ends) - 0.5 * room) - 0.05 * room, max(early) + 0.05 * room)
    axes.set_xlabel(LABELS[x])
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel(LOSS)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def one(axes: Axes, setting: Setting, color: str):
    """Training loss (smoothed, over its raw values) and validation loss of single runs over steps."""
    for run in setting.runs:
        steps, losses = run.curve("step", "train/loss")
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        smooth = statistics.smooth(losses, max(1, len(losses) // 50))
        axes.plot(steps, smooth, color=color, linewidth=1.6, label=f"{run.path}: training, smoothed")
        axes.plot(
            *run.curve("step", "valid/loss"),
            color=color,
            linestyle="--",
            marker="o",
            markersize=4,
            label=f"{run.path}: validation",
        )
    axes.set_xlabel(LABELS["step"])
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def rates(axes: Axes, methods: Sequence[Method], color: dict[str, str]):
    """Final loss over the learning rate; a ring around the best, a cross at the top where a run failed."""
    tuned = [m for m in methods if len(m.settings) > 1]
    losses = [s.tuned_loss for m in tuned for s in m.settings if math.isfinite(s.tuned_loss)]
    if losses:
        best = min(losses)
        # What is far worse than the best of the worst method needs no room.
        ceiling = max(m.best.tuned_loss for m in tuned if math.isfinite(m.best.tuned_loss))
        top = min(max(losses), ceiling + max(ceiling - best, 0.1 * best))
        axes.set_ylim(best - 0.06 * (top - best or 1), top + 0.1 * (top - best or 1))
    for method in tuned:
        points = [(s.rate, s.tuned_loss) for s in method.settings if math.isfinite(s.tuned_loss)]
        axes.plot(*zip(*points, strict=True), color=color[method.name], marker="o", markersize=4)
        axes.plot(
            method.best.rate,
            method.best.tuned_loss,
            marker="o",
            markersize=10,
            fillstyle="none",
            color=color[method.name],
        )
        failed = [s.rate for s in method.settings if not math.isfinite(s.tuned_loss)]
        for rate in failed:
            axes.plot(rate, 0.97, marker="x", color=color[method.name], transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"final {LOSS}")
    axes.grid(alpha=0.3)


def finals(axes: Axes, rows: Sequence[Row], color: dict[str, str]):
    """Final loss of each seed as a dot, their mean and its interval as a bar; the lowest at the top."""
    shown = [row for row in rows if math.isfinite(row.loss.value)]
    for place, row in enumerate(reversed(shown)):
        mine = color[row.method.name]
        values = list(row.setting.finals.values())
        axes.plot(values, [place] * len(values), "o", color=mine, markersize=4, alpha=0.6)
        axes.plot([row.loss.low, row.loss.high], [place] * 2, color=mine, linewidth=2)
        axes.plot(row.loss.value, place, "|", color=mine, markersize=14, markeredgewidth=2)
    _name_lines(axes, shown)
    axes.set_xlabel(f"final {LOSS}")


def speed_ups(axes: Axes, rows: Sequence[Row], baseline: Method, color: dict[str, str]):
    """How many times fewer steps (full) and seconds (open) to the target than the baseline's."""
    shown = [row for row in rows if row.method is not baseline and row.speed_ups]
    for place, row in enumerate(reversed(shown)):
        for unit, shift, fill in (("step", 0.12, "full"), ("seconds", -0.12, "none")):
            if unit in row.speed_ups:
                gain, mine, at = row.speed_ups[unit], color[row.method.name], [place + shift] * 2
                axes.plot([gain.low, gain.high], at, color=mine, linewidth=2 if fill == "full" else 1)
                axes.plot(gain.value, at[0], "o", color=mine, fillstyle=fill, markersize=6)
    axes.axvline(1, color="gray", linewidth=1)
    _name_lines(axes, shown)
    axes.set_xlabel(f"speed-up over {baseline.name} (steps ●, seconds ○)")


def _name_lines(axes: Axes, rows: Sequence[Row]):
    """A line of the picture for each row, the first at the top; a name of many fields is broken."""
    names = [row.method.name.replace(", ", ",\n") for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(alpha=0.3, axis="x")


def panels(rows: Sequence[Row], methods: Sequence[Method], baseline: Method) -> dict:
    """What there is to draw: {name: function of axes}."""
    color = colors(methods)
    if len(methods) == 1 and len(methods[0].settings) == 1:
        return {"one": lambda axes: one(axes, methods[0].settings[0], color[methods[0].name])}
    found = {
        x: lambda axes, x=x: curves(axes, rows, x, color)
        for x in LABELS
        if any(row.setting.runs[0].curve(x, "valid/loss")[0] for row in rows)
    }
    if any(len(m.settings) > 1 for m in methods):
        found["rates"] = lambda axes: rates(axes, methods, color)
    if any(len(row.setting.runs) > 1 for row in rows):
        found["finals"] = lambda axes: finals(axes, rows, color)
    if any(row.speed_ups for row in rows if row.method is not baseline):
        found["speed_ups"] = lambda axes: speed_ups(axes, rows, baseline, color)
    return found


def png(parts: dict, path: Path):
    """All panels in one picture, three in a row, with one legend below."""
    columns = min(3, len(parts))
    lines = math.ceil(len(parts) / columns)
    width = 8 if columns == 1 else 5.2 * columns
    figure = Figure(figsize=(width, 4.5 * lines), dpi=150, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, draw in zip(grid, parts.values(), strict=False):
        draw(axes)
    for axes in grid[len(parts) :]:
        axes.axis("off")
    if "one" not in parts:
        handles, labels = grid[0].get_legend_handles_labels()
        columns = min(len(labels), columns)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path)


def svg(draw) -> str:
    """One panel as the text of an <svg>, with words as words."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    handles, labels = axes.get_legend_handles_labels()
    if labels and not axes.get_legend():
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trainit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
