"""Finds a learning-rate schedule segment by segment.

Each segment of the steps is trained from the best state of the one before, once for each of several rates,
which the learning rate approaches in a straight line. The best of them is kept, and the next segment starts
there. All runs see the same data.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from absl import logging

from trainit.cluster.files import write_json
from trainit.config import field, require
from trainit.experiments.compare import statistics
from trainit.experiments.compare.runs import RATE, read
from trainit.experiments.sweep.launch import finished
from trainit.experiments.sweep.spec import Job, Sweep, describe, with_groups

FIELDS = {
    "boundaries": field((), "steps at which segments start and end, from 0 to the last: [0, 200, 400]"),
    "first": field((1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5), "rates to try while the rate is 0"),
    "factor": field(2.0, "between two rates that are tried around the one before", above=1),
    "each_side": field(2, "number of rates to try above it, and below it; it and 0 are tried, too", above=0),
    "epsilon": field(0.0, "the largest rate is best whose loss is this much above the lowest", at_least=0),
    "window": field(10, "steps over which the training loss that decides is averaged", above=0),
}


def check(sweep: Sweep) -> dict:
    """Returns the fields of a greedy search, with defaults for those that are missing."""
    unknown = sorted(set(sweep.greedy) - set(FIELDS))
    require(not unknown, f"greedy: unknown {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    g = {name: sweep.greedy.get(name, known.default) for name, known in FIELDS.items()}
    for name, known in FIELDS.items():
        known.check(f"greedy: {name}", g[name])
    at = g["boundaries"]
    rising = len(at) > 1 and at[0] == 0 and all(type(b) is int and a < b for a, b in itertools.pairwise(at))
    require(rising, f"greedy: boundaries={at} must be whole steps that rise from 0")
    single = len(sweep.variants) == len(sweep.seeds) == 1 and not sweep.variants[0].grid
    require(single, "greedy: it searches for the schedule of one variant and one seed, without a grid")
    return g


def candidates(rate: float, is_first: bool, g: dict) -> list[float]:
    """Returns the rates to try at the end of a segment that starts with this rate, in rising order."""
    if is_first:
        return sorted(g["first"])
    if rate == 0:
        return sorted({0.0, *g["first"]})
    n = g["each_side"]
    return [0.0, *(float(f"{rate * g['factor'] ** j:.6g}") for j in range(-n, n + 1))]


def search(sweep: Sweep, run: Callable[[Sequence[Job]], None]) -> list[float]:
    """Runs all segments by `run`; returns the rates at the boundaries. ConfigError if all of one fail."""
    g = check(sweep)
    at, rates, source = g["boundaries"], [0.0], None
    while len(rates) < len(at):
        jobs = _jobs(sweep, g, rates, source)
        if todo := [job for job in jobs.values() if not finished(job)]:
            run(todo)
        best = _best(jobs, g)
        for rate, job in jobs.items():
            if rate != best:  # only the checkpoints of the best one are kept
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        rates.append(best)
        source = jobs[best].folder

    file = sweep.output / "schedule.json"
    write_json(file, {"boundaries": at, "values": rates})
    logging.info(
        "the schedule, also in %s:\n  :schedule=piecewise_linear --config.optimizer.learning_rate=1.0 "
        "--config.steps=%d --config.schedule.boundaries='%s' --config.schedule.values='%s'",
        *(file, at[-1], tuple(at), tuple(rates)),
    )
    return rates


def plan(sweep: Sweep) -> tuple[list[Job], list[str]]:
    """Returns the runs of the first segment that is not finished, and a line for each segment after it."""
    g = check(sweep)
    at, rates, source = g["boundaries"], [0.0], None
    while len(rates) < len(at):
        jobs = _jobs(sweep, g, rates, source)
        if todo := [job for job in jobs.values() if not finished(job)]:
            after = itertools.pairwise(at[len(rates) :])
            return todo, [f"steps {begin} to {end}, from the best at {begin}" for begin, end in after]
        rates.append(_best(jobs, g))
        source = jobs[rates[-1]].folder
    return [], []


def _jobs(sweep: Sweep, g: dict, rates: list[float], source: Path | None) -> dict[float, Job]:
    """Returns by rate the runs that try the segment after these rates, from the best state so far."""
    tried, at = candidates(rates[-1], len(rates) == 1, g), g["boundaries"][: len(rates) + 1]
    return {rate: _job(sweep, at, [*rates, rate], source) for rate in tried}


def _best(jobs: dict[float, Job], g: dict) -> float:
    """Returns the best rate of a segment's runs; ConfigError if none has finished."""
    segment = next(iter(jobs.values())).variant
    ends = {rate: _loss(job, g["window"]) for rate, job in jobs.items()}
    losses = {rate: loss for rate, loss in ends.items() if math.isfinite(loss)}
    require(bool(losses), f"greedy: no run of {segment} has finished")
    best = max(rate for rate in losses if losses[rate] <= min(losses.values()) + g["epsilon"])
    results = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
    logging.info("%s: rate %g of %s", segment, best, results)
    return best


def _job(sweep: Sweep, at: Sequence[int], rates: Sequence[float], source: Path | None) -> Job:
    """Returns the run of the last of these segments; the source is the folder of the run before it."""
    begin, end = at[-2], at[-1]
    changes = {"steps": end, "schedule.boundaries": tuple(at), "schedule.values": tuple(rates), RATE: 1.0}
    changes |= {"checkpoint.save_steps": 0, "log.every_steps": 1}
    if source:
        changes |= {"checkpoint.load_path": source, "checkpoint.load_step": begin}
        changes |= {"checkpoint.overwrite_config": True}
    config = with_groups(sweep.variants[0].config, "schedule=piecewise_linear")
    variant = replace(sweep.variants[0], name=f"steps {begin} to {end}", config=config)
    # It is named after its segment and rate, not after all changes.
    shown = (("rate", rates[-1]),)
    folder = sweep.output / f"steps_{begin}-{end}" / describe(shown)
    return variant.job(shown, sweep.seeds[0], folder, changes)


def _loss(job: Job, window: int) -> float:
    losses = read(job.folder).curve("train/loss")[0] if finished(job) else ()
    return statistics.smooth(losses, window)[-1] if losses else math.inf
