"""What is said of runs: means with intervals, what it takes to reach a loss, how a rate must be tuned."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from trainit.tools.compare.runs import Method, Run, Setting

LEVEL = 0.95  # of all intervals
COSTS = ("step", "tokens", "flops", "seconds")  # in which the way to a loss is measured
NEAR = 0.01  # a rate is nearly as good as the best if its loss is at most so much larger, as a fraction


@dataclass(frozen=True)
class Estimate:
    """A mean, or a ratio, with its interval; nan bounds where one run alone says nothing of it."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # of no difference, two-sided


def mean(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval."""
    center = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(center):
        return Estimate(center)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(center, center - half, center + half)


def difference(a: dict[int, float], b: dict[int, float]) -> Estimate:
    """The mean of a less that of b, by seed: paired where the seeds are the same, else after Welch.

    Runs of one seed begin with the same parameters and see the same batches, so that what they share
    falls out of the difference of pairs.
    """
    x, y = list(a.values()), list(b.values())
    center = statistics.fmean(x) - statistics.fmean(y)
    if min(len(x), len(y)) < 2 or not math.isfinite(center):
        return Estimate(center)
    if a.keys() == b.keys():
        gaps = [a[seed] - b[seed] for seed in a]
        error, freedom = statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1
    else:
        parts = [statistics.variance(v) / len(v) for v in (x, y)]
        error = math.sqrt(sum(parts))
        squares = sum(part**2 / (len(v) - 1) for part, v in zip(parts, (x, y), strict=True))
        freedom = sum(parts) ** 2 / squares if squares else len(x) + len(y) - 2
    if not error:
        return Estimate(center, center, center, 1.0 if center == 0 else 0.0)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    p = 2 * stats.t.sf(abs(center) / error, freedom)
    return Estimate(center, center - half, center + half, float(p))


def speed_up(baseline: dict[int, float], costs: dict[int, float]) -> Estimate:
    """How many times less it costs than the baseline: the ratio of geometric means over seeds.

    Its interval and significance are those of the difference of logarithms.
    """
    logs = [{seed: math.log(v) for seed, v in group.items()} for group in (baseline, costs)]
    gap = difference(*logs)
    return Estimate(math.exp(gap.value), math.exp(gap.low), math.exp(gap.high), gap.p)


def cost(run: Run, target: float, unit: str) -> float | None:
    """What a run has spent when its validation loss first is at the target; None if it never is.

    Between two validations the loss is taken for a straight line.

    Args:
        run: the run.
        target: a validation loss in nats per token.
        unit: one of COSTS.
    """
    at, losses = run.curve(unit, "valid/loss")
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return at[0]
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return at[i - 1] + share * (at[i] - at[i - 1])
    return None


def costs(setting: Setting, target: float, unit: str) -> dict[int, float]:
    """By seed, of the runs that reach the target; empty where the unit is not known."""
    spent = {run.seed: cost(run, target, unit) for run in setting.runs}
    return {seed: value for seed, value in spent.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Row:
    """A method, at its best learning rate, beside the baseline."""

    method: Method
    loss: Estimate  # final validation loss, nats per token
    gap: Estimate  # that loss less the baseline's
    reached: int  # runs that reach the target
    costs: dict[str, Estimate]  # until then, by unit; of the runs that do
    speed_ups: dict[str, Estimate]  # over the baseline; only where all runs of both reach it

    @property
    def setting(self) -> Setting:
        return self.method.best


def table(methods: Sequence[Method], baseline: Method, target: float) -> list[Row]:
    """A row for each method, the lowest loss first."""
    base, rows = baseline.best, []
    for method in methods:
        setting, spent, gains = method.best, {}, {}
        for unit in COSTS:
            mine, theirs = costs(setting, target, unit), costs(base, target, unit)
            if mine:
                spent[unit] = mean(list(mine.values()))
            if len(mine) == len(setting.runs) and len(theirs) == len(base.runs) and all(mine.values()):
                gains[unit] = speed_up(theirs, mine)
        gap = difference(setting.finals, base.finals)
        reached = len(costs(setting, target, "step"))
        rows.append(Row(method, mean(list(setting.finals.values())), gap, reached, spent, gains))
    return sorted(rows, key=lambda row: (math.isnan(row.loss.value), row.loss.value))


def default_target(setting: Setting) -> float:
    """The loss that every run of this setting reaches: the largest final one."""
    return max(setting.finals.values())


def nearly_best(method: Method) -> tuple[float, float, bool, bool] | None:
    """How well the learning rate must be hit: between which rates the loss is within NEAR of the best.

    The loss is taken for a straight line over the logarithm of the rate between two that were tried.

    Returns:
        lowest rate, highest rate, whether the lowest (the highest) is only the last one that was tried;
        None if fewer than two rates were.
    """
    tried = [(s.rate, s.tuned_loss) for s in method.settings if s.rate > 0]
    if len(tried) < 2:
        return None
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    limit = tried[best][1] * (1 + NEAR)

    def edge(direction: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + direction < len(tried):
            (rate, loss), (further, worse) = tried[i], tried[i + direction]
            if worse > limit:
                if not math.isfinite(worse):
                    return rate, False
                share = (limit - loss) / (worse - loss)
                return math.exp(math.log(rate) + share * math.log(further / rate)), False
            i += direction
        return tried[i][0], True

    (low, low_open), (high, high_open) = edge(-1), edge(1)
    return low, high, low_open, high_open


def at_edge(method: Method) -> bool:
    """Whether the best learning rate is the lowest or the highest of several that were tried."""
    rates = [s.rate for s in method.settings]
    return len(rates) > 1 and method.best.rate in (min(rates), max(rates))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential mean with decay 1 - 1/window, corrected for its start."""
    decay, total, result = 1 - 1 / window, 0.0, []
    for count, value in enumerate(values, start=1):
        total = decay * total + (1 - decay) * value
        result.append(total / (1 - decay**count))
    return result


def band(runs: Sequence[Run], x: str, y: str) -> tuple[list[float], list[Estimate]]:
    """A curve's mean over runs with its interval, at the steps that all of them have."""
    curves = []
    for run in runs:
        by_step = dict(zip(*run.curve("step", y), strict=True))
        steps, at = run.curve("step", y)[0], run.curve(x, y)[0]
        curves.append({s: (a, by_step[s]) for s, a in zip(steps, at, strict=True)})
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    places = [statistics.fmean(curve[s][0] for curve in curves) for s in common]
    return places, [mean([curve[s][1] for curve in curves]) for s in common]
