"""A learning-rate schedule found piece by piece.

The steps are cut into segments. Each is trained from the best state so far once for each of several rates,
to which the rate goes in a straight line from where it is; the best of them is kept, and the next segment
starts from there. All see the same data.
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

FIELDS = {
    "boundaries": None,  # steps at which segments begin and end, from 0 to the last: [0, 200, 400]
    "first": [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5],  # rates to try while the rate is 0
    "factor": 2.0,  # between two rates that are tried around the one before; > 1
    "each_side": 2,  # so many above and below it, itself, and 0
    "epsilon": 0.0,  # of those whose loss is at most so much above the lowest, the largest rate; >= 0
    "window": 10,  # steps over which the training loss is averaged to judge by; > 0
}


def check(asked: dict, sweep: Sweep) -> dict:
    """The fields of a greedy search, with what is not given.

    Raises:
        ConfigError: they cannot work.
    """
    unknown = sorted(set(asked) - set(FIELDS))
    require(not unknown, f"greedy: unknown {', '.join(unknown)}; there are {', '.join(FIELDS)}")
    g = {**FIELDS, **asked}
    at = g["boundaries"]
    rising = isinstance(at, list | tuple) and len(at) > 1 and at[0] == 0
    rising = rising and all(type(b) is int and a < b for a, b in itertools.pairwise(at))
    require(bool(rising), f"greedy: boundaries={at} must be whole steps that rise from 0")
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
    """The rates to try at the end of a segment that begins with this one, in rising order."""
    if is_first:
        return sorted(g["first"])
    if rate == 0:
        return sorted({0.0, *g["first"]})
    n = g["each_side"]
    return [0.0, *(float(f"{rate * g['factor'] ** j:.6g}") for j in range(-n, n + 1))]


def choose(losses: dict[float, float], epsilon: float) -> float:
    """The rate of the lowest loss, or the largest one that is at most `epsilon` above it."""
    best = min(losses.values())
    return max(rate for rate, loss in losses.items() if loss <= best + epsilon)


def search(sweep: Sweep, run: Callable[[Sequence[Job]], None]) -> list[float]:
    """Runs the segments; returns the rates at the boundaries.

    Args:
        sweep: with `greedy`.
        run: starts runs and returns when they have ended.

    Raises:
        ConfigError: a segment has no run that came to its end.
    """
    g = check(sweep.greedy, sweep)
    at, rates, source = g["boundaries"], [0.0], None
    for number in range(1, len(at)):
        tried = candidates(rates[-1], number == 1, g)
        jobs = {rate: _job(sweep, at[: number + 1], [*rates, rate], source) for rate in tried}
        todo = [job for job in jobs.values() if not finished(job)]
        if todo:
            run(todo)
        losses = {rate: _loss(job, g["window"]) for rate, job in jobs.items() if finished(job)}
        losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if not losses:
            raise ConfigError(f"greedy: no run of steps {at[number - 1]} to {at[number]} came to its end")
        rate = choose(losses, g["epsilon"])
        told = ", ".join(f"{r:g}: {loss:.4f}" for r, loss in losses.items())
        logging.info("steps %d to %d: rate %g of %s", at[number - 1], at[number], rate, told)
        for other, job in jobs.items():
            if other != rate:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
        rates.append(rate)
        source = jobs[rate].folder
    _tell(sweep, at, rates)
    return rates


def _job(sweep: Sweep, at: Sequence[int], rates: Sequence[float], source: Path | None) -> Job:
    """The run of one segment to one rate. The schedule is the whole way to it."""
    begin, end = at[-2], at[-1]
    changes = [
        ("steps", end),
        ("schedule.boundaries", tuple(at)),
        ("schedule.values", tuple(rates)),
        (RATE, 1.0),
    ]
    changes += [("checkpoint.save_steps", 0), ("log.every_steps", 1)]
    if source:
        changes += [("checkpoint.load_path", source), ("checkpoint.load_step", begin)]
        changes += [("checkpoint.overwrite_config", True)]
    (variant,) = sweep.variants
    config = variant.config + (",", ":")[":" not in variant.config] + "schedule=piecewise_linear"
    job = sweep.job(replace(variant, config=config), changes, sweep.seeds[0])
    name = describe([("rate", rates[-1])])
    folder = sweep.output / f"steps_{begin}-{end}" / name
    arguments = (*job.arguments[:-1], f"--workdir={folder}")
    return replace(
        job,
        variant=f"steps {begin} to {end}",
        changes=(("rate", rates[-1]),),
        folder=folder,
        arguments=arguments,
    )


def _loss(job: Job, window: int) -> float:
    losses = read(job.folder).curve("step", "train/loss")[1]
    return statistics.smooth(losses, window)[-1] if losses else math.inf


def _tell(sweep: Sweep, at: Sequence[int], rates: Sequence[float]):
    found = {"boundaries": list(at), "values": rates}
    (sweep.output / "schedule.json").write_text(json.dumps(found, indent=1) + "\n")
    logging.info("the schedule, also in %s:", sweep.output / "schedule.json")
    logging.info(
        "  :schedule=piecewise_linear --config.optimizer.learning_rate=1.0 --config.steps=%d "
        "--config.schedule.boundaries='%s' --config.schedule.values='%s'",
        at[-1],
        tuple(at),
        tuple(rates),
    )
