"""Computes what is reported of runs: means and intervals, the cost of reaching a loss, the best rates."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from trainit.tools.compare.runs import Method, Run, Seed, Setting

LEVEL = 0.95  # of all intervals
COSTS = ("step", "tokens", "flops", "seconds")  # units of the cost of reaching a loss
NEAR = 0.01  # a rate is nearly as good as the best if its loss is larger by at most this fraction


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio with its interval, whose bounds are nan for a single run."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # the probability of a difference at least this large by chance, two-sided


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean with Student's interval."""
    center = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(center):
        return Estimate(center)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(center, center - half, center + half)


def difference(a: Mapping[Seed, float], b: Mapping[Seed, float]) -> Estimate:
    """Returns the mean of `a` minus the mean of `b`, by seed: paired if the seeds are equal, else Welch's.

    Runs of the same seed start with the same parameters and see the same batches, so that what they have in
    common cancels in the difference of pairs.
    """
    x, y = list(a.values()), list(b.values())
    center = statistics.fmean(x) - statistics.fmean(y)
    if min(len(x), len(y)) < 2 or not math.isfinite(center):
        return Estimate(center)
    freedom: float
    if a.keys() == b.keys():
        gaps = [a[seed] - b[seed] for seed in a]
        error, freedom = statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1
    else:
        parts = [statistics.variance(values) / len(values) for values in (x, y)]
        error = math.sqrt(sum(parts))
        squares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (x, y), strict=True))
        freedom = sum(parts) ** 2 / squares if squares else len(x) + len(y) - 2
    if not error:
        return Estimate(center, center, center, 1.0 if center == 0 else 0.0)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    p = 2 * stats.t.sf(abs(center) / error, freedom)
    return Estimate(center, center - half, center + half, float(p))


def speed_up(baseline: Mapping[Seed, float], costs: Mapping[Seed, float]) -> Estimate:
    """Returns how many times lower the costs are than the baseline's: a ratio of geometric means over seeds.

    Its interval and p are those of the difference of logarithms.
    """
    logs = [{seed: math.log(value) for seed, value in group.items()} for group in (baseline, costs)]
    gap = difference(*logs)
    return Estimate(math.exp(gap.value), math.exp(gap.low), math.exp(gap.high), gap.p)


def cost(run: Run, target: float, unit: str) -> float | None:
    """Returns what a run has spent when its validation loss first reaches the target; None if it never does.

    Between two validations the loss is interpolated linearly.

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


def costs(setting: Setting, target: float, unit: str) -> dict[Seed, float]:
    """Returns by seed the costs of the runs that reach the target; none if the unit is unknown."""
    spent = {run.seed: cost(run, target, unit) for run in setting.runs}
    return {seed: value for seed, value in spent.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Row:
    """A method at its best learning rate, compared with the baseline."""

    method: Method
    loss: Estimate  # final validation loss, nats per token
    gap: Estimate  # that loss minus the baseline's
    reached: int  # number of runs that reach the target
    costs: dict[str, Estimate]  # by unit, until the target, for the runs that reach it
    speed_ups: dict[str, Estimate]  # over the baseline; only if all runs of both reach the target

    @property
    def setting(self) -> Setting:
        return self.method.best


def table(methods: Sequence[Method], baseline: Method, target: float) -> list[Row]:
    """Returns a row for each method, the lowest loss first."""
    base, rows = baseline.best, []
    for method in methods:
        setting, spent, gains = method.best, {}, {}
        for unit in COSTS:
            own, others = costs(setting, target, unit), costs(base, target, unit)
            if own:
                spent[unit] = mean(list(own.values()))
            if len(own) == len(setting.runs) and len(others) == len(base.runs) and all(own.values()):
                gains[unit] = speed_up(others, own)
        gap = difference(setting.finals, base.finals)
        reached = len(costs(setting, target, "step"))
        rows.append(Row(method, mean(list(setting.finals.values())), gap, reached, spent, gains))
    return sorted(rows, key=lambda row: (math.isnan(row.loss.value), row.loss.value))


def default_target(setting: Setting) -> float:
    """Returns the loss that every run of this setting reaches: the largest final one."""
    return max(setting.finals.values())


@dataclass(frozen=True)
class Span:
    """The learning rates whose loss is nearly the best."""

    low: float
    high: float
    low_open: bool  # whether lower rates than `low` may be as good, but were not tried
    high_open: bool


def nearly_best(method: Method) -> Span | None:
    """Returns the rates whose loss is within NEAR of the best; None if fewer than two rates were tried.

    Between two rates the loss is interpolated linearly over the logarithm of the rate.
    """
    tried = [(s.rate, s.tuned_loss) for s in method.settings if s.rate > 0]
    if len(tried) < 2:
        return None
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    limit = tried[best][1] * (1 + NEAR)

    def edge(direction: int) -> tuple[float, bool]:
        """Returns the last good rate in this direction, and whether it is the last that was tried."""
        i = best
        while 0 <= i + direction < len(tried):
            (rate, loss), (next_rate, next_loss) = tried[i], tried[i + direction]
            if next_loss > limit:
                if not math.isfinite(next_loss):
                    return rate, False
                share = (limit - loss) / (next_loss - loss)
                return math.exp(math.log(rate) + share * math.log(next_rate / rate)), False
            i += direction
        return tried[i][0], True

    (low, low_open), (high, high_open) = edge(-1), edge(1)
    return Span(low, high, low_open, high_open)


def at_edge(method: Method) -> bool:
    """Whether the best learning rate is the lowest or the highest of several that were tried."""
    rates = [s.rate for s in method.settings]
    return len(rates) > 1 and method.best.rate in (min(rates), max(rates))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns the exponential mean with decay 1 - 1/window, corrected for its start."""
    decay, total, result = 1 - 1 / window, 0.0, []
    for count, value in enumerate(values, start=1):
        total = decay * total + (1 - decay) * value
        result.append(total / (1 - decay**count))
    return result


def band(runs: Sequence[Run], x: str, y: str) -> tuple[list[float], list[Estimate]]:
    """Returns a curve's mean over runs with its interval, at the steps that all of them have."""
    curves = []
    for run in runs:
        steps, values = run.curve("step", y)
        curves.append(dict(zip(steps, zip(run.curve(x, y)[0], values, strict=True), strict=True)))
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    at = [statistics.fmean(curve[step][0] for curve in curves) for step in common]
    return at, [mean([curve[step][1] for curve in curves]) for step in common]
