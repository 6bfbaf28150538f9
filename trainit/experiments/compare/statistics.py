"""Computes what is reported of runs: means and intervals, the cost of reaching a loss, the best rates."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from trainit.experiments.compare.runs import Method, Run, Seed, Setting

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


def _student(center: float, error: float, freedom: float) -> Estimate:
    """Returns an estimate from its standard error and Student's degrees of freedom."""
    if not error:
        return Estimate(center, center, center, float(center == 0))
    half, p = stats.t.ppf((1 + LEVEL) / 2, freedom) * error, 2 * stats.t.sf(abs(center) / error, freedom)
    return Estimate(center, center - half, center + half, float(p))


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean with Student's interval."""
    center = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(center):
        return Estimate(center)
    return _student(center, statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def difference(a: Mapping[Seed, float], b: Mapping[Seed, float]) -> Estimate:
    """Returns the mean of `a` minus the mean of `b`, by seed: paired if the seeds are equal, else Welch's."""
    groups = list(a.values()), list(b.values())
    center = statistics.fmean(groups[0]) - statistics.fmean(groups[1])
    if min(map(len, groups)) < 2 or not math.isfinite(center):
        return Estimate(center)
    # Runs of the same seed start alike and see the same batches: in pairs, what they have in common cancels.
    if a.keys() == b.keys():
        return mean([a[seed] - b[seed] for seed in a])
    parts = [statistics.variance(group) / len(group) for group in groups]
    squares = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    return _student(center, math.sqrt(sum(parts)), sum(parts) ** 2 / squares if squares else math.inf)


def speed_up(baseline: Mapping[Seed, float], costs: Mapping[Seed, float]) -> Estimate:
    """Returns how many times the baseline's costs are these: a ratio of geometric means over seeds."""
    # Its interval and p are those of the difference of logarithms.
    logs = [{seed: math.log(value) for seed, value in group.items()} for group in (baseline, costs)]
    gap = difference(*logs)
    return Estimate(math.exp(gap.value), math.exp(gap.low), math.exp(gap.high), gap.p)


def cost(run: Run, target: float, unit: str) -> float | None:
    """Returns what a run has spent when its validation loss first reaches the target; None: it never does."""
    at, losses = run.curve(unit, "valid/loss")
    i = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not i:
        return None if i is None else at[0]
    # Between two validations the loss is interpolated linearly.
    return float(np.interp(target, (losses[i], losses[i - 1]), (at[i], at[i - 1])))


def costs(setting: Setting, target: float, unit: str) -> dict[Seed, float]:
    """Returns by seed the costs of the runs that reach the target; none if the unit is unknown."""
    return {run.seed: spent for run in setting.runs if (spent := cost(run, target, unit)) is not None}


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
    finals, rows = baseline.best.finals, []
    goals = {unit: costs(baseline.best, target, unit) for unit in COSTS}
    for method in methods:
        own = method.best.finals
        spent = {unit: reached for unit in COSTS if (reached := costs(method.best, target, unit))}
        # A speed-up is given where all runs of both reach the target, and not from the start.
        gains = {
            unit: speed_up(goals[unit], reached)
            for unit, reached in spent.items()
            if (len(reached), len(goals[unit])) == (len(own), len(finals))
            and all((*reached.values(), *goals[unit].values()))
        }
        means = {unit: mean(list(reached.values())) for unit, reached in spent.items()}
        reached_by = len(spent.get("step", ()))
        rows.append(Row(method, mean(list(own.values())), difference(own, finals), reached_by, means, gains))
    return sorted(rows, key=lambda row: (math.isnan(row.loss.value), row.loss.value))


@dataclass(frozen=True)
class Span:
    """The learning rates whose loss is nearly the best."""

    low: float
    high: float
    low_open: bool  # whether lower rates than `low` may be as good, but were not tried
    high_open: bool


def nearly_best(method: Method) -> Span | None:
    """Returns the rates whose loss is within NEAR of the best; None if fewer than two rates were tried."""
    tried = [(s.rate, s.tuned_loss) for s in method.settings if s.rate > 0]
    if len(tried) < 2:
        return None
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    limit = tried[best][1] * (1 + NEAR)

    def edge(outwards: Sequence[tuple[float, float]]) -> tuple[float, bool]:
        """Returns the last good rate of these, and whether it is the last that was tried."""
        # Between two rates the loss is interpolated linearly over the logarithm of the rate.
        for (rate, loss), (next_rate, next_loss) in itertools.pairwise(outwards):
            if next_loss > limit:
                return math.exp(np.interp(limit, (loss, next_loss), np.log((rate, next_rate)))), False
        return outwards[-1][0], True

    (low, low_open), (high, high_open) = edge(tried[best::-1]), edge(tried[best:])
    return Span(low, high, low_open, high_open)


def at_edge(method: Method) -> bool:
    """Whether the best learning rate is the lowest or the highest of several that were tried."""
    rates = [s.rate for s in method.settings]
    return len(rates) > 1 and method.best.rate in (min(rates), max(rates))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns the exponential mean with decay 1 - 1/window, corrected for its start."""
    decay = 1 - 1 / window
    means = itertools.accumulate(values, lambda mean, value: decay * mean + (1 - decay) * value, initial=0.0)
    return [mean / (1 - decay**count) for count, mean in enumerate(means) if count]


def band(runs: Sequence[Run], x: str, y: str) -> tuple[list[float], list[Estimate]]:
    """Returns a curve's mean over runs with its interval, at the steps that all of them have."""
    curves = [{step: point for step, *point in zip(*run.curve("step", x, y), strict=True)} for run in runs]
    common = sorted(set.intersection(*map(set, curves)))
    at = [statistics.fmean(curve[step][0] for curve in curves) for step in common]
    return at, [mean([curve[step][1] for curve in curves]) for step in common]
