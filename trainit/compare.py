"""Many runs beside each other: reads their folders, draws their curves.

python -m trainit.compare RUN... --output=curves.png
"""

import argparse
import json
import sys
from pathlib import Path


def read_metrics(workdir: Path) -> list[dict]:
    """The records of a run, in order of steps. A line that a crash left unfinished is passed over.

    Raises:
        FileNotFoundError: the folder holds no metrics.jsonl.
    """
    records = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def series(records: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The points of one curve: records that have both, and a finite y."""
    points = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def smooth(values: list[float], window: int) -> list[float]:
    """Exponential mean with decay 1 - 1/window, corrected for its start."""
    decay, mean, result = 1 - 1 / window, 0.0, []
    for count, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        result.append(mean / (1 - decay**count))
    return result


def draw(runs: dict[str, list[dict]], output: Path):
    """Draws training loss (smoothed, over its raw values) and validation loss over steps into a PNG.

    Args:
        runs: records of each run by its name.
        output: the PNG's path.
    """
    from matplotlib.figure import Figure  # an extra: pip install 'trainit[demo]'

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number}"
        steps, losses = series(records, "step", "train/loss")
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            smooth(losses, max(1, len(losses) // 50)),
            color=color,
            linewidth=1.6,
            label=f"{name}: training, smoothed",
        )
        axes.plot(
            *series(records, "step", "valid/loss"),
            color=color,
            linestyle="--",
            marker="o",
            markersize=4,
            label=f"{name}: validation",
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(output)


def table(runs: dict[str, list[dict]]) -> str:
    """One line a run: steps, tokens, last and best validation loss, bits per byte, median tokens/s."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}}  steps     tokens  valid/loss    best  bits/byte  tokens/s"]
    for name, records in runs.items():
        valid = series(records, "step", "valid/loss")[1] or [float("nan")]
        bits = series(records, "step", "valid/bits_per_byte")[1] or [float("nan")]
        speeds = sorted(series(records, "step", "throughput/tokens_per_second")[1]) or [float("nan")]
        last = records[-1] if records else {"step": 0, "tokens": 0}
        lines.append(
            f"{name:{width}}  {last['step']:5}  {last['tokens']:9}  {valid[-1]:10.4f}  {min(valid):6.4f}  "
            f"{bits[-1]:9.4f}  {speeds[len(speeds) // 2]:8.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainit.compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, help="PNG to draw the curves into")
    arguments = parser.parse_args()
    runs = {}
    for workdir in arguments.runs:
        try:
            runs[str(workdir)] = read_metrics(workdir)
        except OSError as error:
            print(f"trainit: error: {workdir} is no run folder: {error.strerror}", file=sys.stderr)
            return 2
    print(table(runs))
    if arguments.output:
        draw(runs, arguments.output)
        print(f"curves in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
