"""Finds a learning-rate schedule segment by segment.

The steps are divided into segments. Each segment is trained from the best state of the one before, once for
each of several rates, which the learning rate approaches in a straight line. The best of them is kept, and
the next segment starts there. All runs see the same data.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from absl import logging

from trainit.config import ConfigError, require
from trainit.tools.compare import statistics
from trainit.tools.compare.runs import RATE, read
from trainit.tools.sweep.launch import finished
from trainit.tools.sweep.spec import Job, Sweep, describe

FIELDS: dict = {
    "boundaries": None,  # steps at which segments start and end, from 0 to the last: [0, 200, 400]
    "first": [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5],  # rates to try while the rate is 0
    "factor": 2.0,  # between two rates that are tried around the one before; > 1
    "each_side": 2,  # number of rates to try above it, and below it; it and 0 are tried, too
    "epsilon": 0.0,  # the largest rate counts as best whose loss is at most this much above the lowest; >= 0
    "window": 10,  # steps over which the training loss that decides is averaged; > 0
}


def check(asked: dict, sweep: Sweep) -> dict:
    """Returns the fields of a greedy search, with defaults for those that are missing.

    Raises:
        ConfigError: a field is unknown or out of bounds, or the sweep has several variants or seeds.
    """
    unknown = sorted(set(asked) - set(FIELDS))
    require(not unknown, f"greedy: unknown {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    g = {**FIELDS, **asked}
    at = g["boundaries"]
    rising = isinstance(at, list | tuple) and len(at) > 1 and at[0] == 0
    rising = rising and all(type(b) is int and a < b for a, b in itertools.pairwise(at))
    require(rising, f"greedy: boundaries={at} must be whole steps that rise from 0")
    require(g["factor"] > 1, f"greedy: factor={g['factor']} must be above 1")
    require(g["each_side"] >= 1, f"greedy: each_side={g['each_side']} must be above 0")
    require(g["epsilon"] >= 0, f"greedy: epsilon={g['epsilon']} must not be below 0")
    require(g["window"] >= 1, f"greedy: window={g['window']} must be above 0")
    require(
        len(sweep.variants) == 1 and len(sweep.seeds) == 1 and not sweep.variants[0].grid,
        "greedy: it searches for the schedule of one variant and one seed, without a grid",
    )
    return g


def candidates(rate: float, is_first: bool, g: dict) -> list[float]:
    """Returns the rates to try at the end of a segment that starts with this rate, in rising order."""
    if is_first:
        return sorted(g["first"])
    if rate == 0:
        return sorted({0.0, *g["first"]})
    n = g["each_side"]
    return [0.0, *(float(f"{rate * g['factor'] ** j:.6g}") for j in range(-n, n + 1))]


def choose(losses: dict[float, float], epsilon: float) -> float:
    """Returns the largest rate whose loss is at most `epsilon` above the lowest."""
    lowest = min(losses.values())
    return max(rate for rate, loss in losses.items() if loss <= lowest + epsilon)


def search(sweep: Sweep, run: Callable[[Sequence[Job]], None]) -> list[float]:
    """Runs all segments; returns the rates at the boundaries.

    Args:
        sweep: one with `greedy`.
        run: starts runs and returns when they have ended.

    Raises:
        ConfigError: no run of a segment has finished.
    """
    g = check(sweep.greedy, sweep)
    at, rates, source = g["boundaries"], [0.0], None
    for end in range(1, len(at)):
        # Try all candidates from the best state so far.
        tried = candidates(rates[-1], end == 1, g)
        jobs = {rate: _job(sweep, at[: end + 1], [*rates, rate], source) for rate in tried}
        todo = [job for job in jobs.values() if not finished(job)]
        if todo:
            run(todo)
        losses = {rate: _loss(job, g["window"]) for rate, job in jobs.items() if finished(job)}
        losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if not losses:
            raise ConfigError(f"greedy: no run of steps {at[end - 1]} to {at[end]} has finished")

        # Keep the checkpoints of the best one only.
        best = choose(losses, g["epsilon"])
        results = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        logging.info("steps %d to %d: rate %g of %s", at[end - 1], at[end], best, results)
        for rate, job in jobs.items():
            if rate != best:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        rates.append(best)
        source = jobs[best].folder
    _report(sweep.output / "schedule.json", at, rates)
    return rates


def _job(sweep: Sweep, at: Sequence[int], rates: Sequence[float], source: Path | None) -> Job:
    """Returns the run of the last of these segments, whose schedule has all rates until its end.

    Args:
        sweep: the sweep.
        at: the boundaries until the end of the segment.
        rates: the learning rates there.
        source: the folder of the run that it continues; None for the first segment.
    """
    begin, end = at[-2], at[-1]
    changes: list[tuple[str, object]] = [
        ("steps", end),
        ("schedule.boundaries", tuple(at)),
        ("schedule.values", tuple(rates)),
        (RATE, 1.0),
        ("checkpoint.save_steps", 0),
        ("log.every_steps", 1),
    ]
    if source:
        changes += [("checkpoint.load_path", source), ("checkpoint.load_step", begin)]
        changes += [("checkpoint.overwrite_config", True)]
    (variant,) = sweep.variants
    config = variant.config + (",", ":")[":" not in variant.config] + "schedule=piecewise_linear"
    job = sweep.job(replace(variant, config=config), changes, sweep.seeds[0])
    # It is named after its segment and rate, not after all changes.
    shown = (("rate", rates[-1]),)
    folder = sweep.output / f"steps_{begin}-{end}" / describe(shown)
    arguments = (*job.arguments[:-1], f"--workdir={folder}")
    return Job(f"steps {begin} to {end}", shown, job.seed, folder, arguments)


def _loss(job: Job, window: int) -> float:
    losses = read(job.folder).curve("step", "train/loss")[1]
    return statistics.smooth(losses, window)[-1] if losses else math.inf


def _report(file: Path, at: Sequence[int], rates: Sequence[float]):
    """Writes the schedule to a file and logs the flags that choose it."""
    file.write_text(json.dumps({"boundaries": list(at), "values": list(rates)}, indent=1) + "\n")
    logging.info("the schedule, also in %s:", file)
    logging.info(
        "  :schedule=piecewise_linear --config.optimizer.learning_rate=1.0 --config.steps=%d "
        "--config.schedule.boundaries='%s' --config.schedule.values='%s'",
        *(at[-1], tuple(at), tuple(rates)),
    )
