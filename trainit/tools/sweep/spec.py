"""Reads a sweep's file, and determines which runs it asks for, given the results so far."""

import itertools
import math
import runpy
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trainit.config import ConfigError, require
from trainit.tools.compare.runs import RATE

EXTENSIONS = 4  # learning rates that are tried beyond an end of the grid, at most
KEYS = {
    "config": str,  # --config of all runs: FILE or FILE:group=choice,...
    "fields": dict,  # {"steps": 200, ...}, for all runs
    "variants": dict,  # {"muon": {"groups": "optimizer=muon", "fields": {...}, "grid": {...}}, ...}
    "grid": dict,  # {"optimizer.learning_rate": [1e-3, 3e-3], ...}: all combinations
    "random": dict,  # {"optimizer.learning_rate": ("log", 1e-4, 1e-1), "optimizer.beta1": ("uniform", 0, 1)}
    "samples": int,  # number of draws from `random`
    "seeds": list,  # seeds of all runs; with tuning_seeds, of each variant's best setting
    "tuning_seeds": list,  # seeds of the runs that choose each variant's best setting
    "extend": bool,  # while a variant's best learning rate is the last of its grid, try one beyond
    "baseline": str,  # the variant that the others are compared with; default: the first
    "target": float,  # validation loss to reach; default: what all runs of the baseline reach
    "greedy": dict,  # see trainit.tools.sweep.greedy
}
VARIANT_KEYS = ("groups", "fields", "grid", "random")

Point = tuple[tuple[str, object], ...]  # fields of the grid, with their values


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    variant: str
    changes: Point
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of `trainit train`

    def __str__(self) -> str:
        return f"{self.variant} {describe(self.changes)} seed {self.seed}".replace("  ", " ")


# A run's final validation loss; inf if it failed, None if it has not been run.
Losses = Callable[[Job], float | None]


def describe(changes: Iterable[tuple[str, object]]) -> str:
    """Returns "learning_rate=0.001,beta1=0.9", the name of a folder."""

    def text(value: object) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value).replace("/", "_")

    return ",".join(f"{name.rpartition('.')[2]}={text(value)}" for name, value in changes)


@dataclass(frozen=True)
class Variant:
    """Runs of a sweep with the same groups, such as one optimizer."""

    name: str
    config: str  # with its groups
    fields: dict
    grid: dict[str, list]
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked."""

    variants: list[Variant]
    seeds: list[int]
    tuning_seeds: list[int]
    extend: bool
    baseline: str
    target: float | None
    greedy: dict
    output: Path

    def job(self, variant: Variant, changes: Iterable[tuple[str, object]], seed: int) -> Job:
        """Returns the run of a variant at a point of its grid."""
        changes = tuple(changes)
        folder = self.output / variant.name / describe(changes) / f"seed_{seed}"
        fields = {**variant.fields, **dict(changes), "seed": seed}
        arguments = (f"--config={variant.config}", *flags_of(fields), f"--workdir={folder}")
        return Job(variant.name, changes, seed, folder, arguments)

    def wanted(self, losses: Losses) -> list[Job]:
        """Returns all runs that are wanted by now. When they are finished, more may be: call again then."""
        jobs = []
        for variant in self.variants:
            points = variant.points
            if self.tuning_seeds:
                tuning, best = self._tune(variant, losses)
                jobs += tuning
                points = [] if best is None else [best]
            jobs += [self.job(variant, point, seed) for point in points for seed in self.seeds]
        return jobs

    def _tune(self, variant: Variant, losses: Losses) -> tuple[list[Job], Point | None]:
        """Returns the runs that choose a variant's best point; and that point, once they are finished."""
        points = list(variant.points)
        for extension in range(EXTENSIONS + 1):
            by_point = [[self.job(variant, p, seed) for seed in self.tuning_seeds] for p in points]
            jobs = [job for group in by_point for job in group]
            known = {job: loss for job in jobs if (loss := losses(job)) is not None}
            if len(known) < len(jobs):
                return jobs, None
            means = [statistics.fmean(known[job] for job in group) for group in by_point]
            if min(means) == math.inf:
                return jobs, None  # every point has failed
            best = points[means.index(min(means))]
            further = _beyond(best, points) if self.extend and extension < EXTENSIONS else None
            if further is None:
                break
            points.append(further)
        return jobs, best


def _beyond(best: Point, points: Sequence[Point]) -> Point | None:
    """Returns the best point with the next learning rate, if its own is the first or last; otherwise None."""
    own, others = dict(best), [change for change in best if change[0] != RATE]
    rates = sorted(
        float(str(dict(point)[RATE]))
        for point in points
        if RATE in dict(point) and [change for change in point if change[0] != RATE] == others
    )
    if len(rates) < 2 or own[RATE] not in (rates[0], rates[-1]):
        return None
    end, neighbour = (rates[0], rates[1]) if own[RATE] == rates[0] else (rates[-1], rates[-2])
    rate = float(f"{end * end / neighbour:.3g}")
    return tuple((name, rate if name == RATE else value) for name, value in best)


def flags_of(fields: Mapping[str, object]) -> list[str]:
    """Returns ["--config.steps=200", ...]."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def read(given: str, output: Path | None) -> Sweep:
    """Reads a sweep's file.

    Args:
        given: FILE or FILE:ARGUMENT; the file has get_sweep(argument), which returns a dict of KEYS.
        output: the folder of its runs; None: runs/ and the file's name.

    Raises:
        ConfigError: the file does not exist, raises, or asks for something that does not exist.
    """
    name, _, argument = given.partition(":")
    file = Path(name)
    require(file.is_file(), f"{file}: there is no such file")
    try:
        asked = runpy.run_path(str(file))["get_sweep"](argument)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{file} raises {type(error).__name__}: {error}") from None
    _check_keys(file, asked)

    seeds, tuning = list(asked.get("seeds", [0])), list(asked.get("tuning_seeds", []))
    for key, value in (("seeds", seeds), ("tuning_seeds", tuning)):
        whole = all(type(seed) is int and seed >= 0 for seed in value) and len(set(value)) == len(value)
        require(whole, f"{file}: {key}={value} must be different whole numbers")
    both = sorted(set(seeds) & set(tuning))
    require(not both, f"{file}: {both} are in seeds and in tuning_seeds; what chose a rate must not judge it")
    extend = asked.get("extend", False)
    require(not extend or bool(tuning), f"{file}: extend needs tuning_seeds: by them the best rate is chosen")

    variants = [_variant(file, asked, *item) for item in asked.get("variants", {"": {}}).items()]
    names = [variant.name for variant in variants]
    base = asked.get("baseline", names[0])
    require(base in names, f"{file}: baseline={base!r}; there are {', '.join(names)}")
    output = output or Path("runs") / "-".join(filter(None, (file.stem, argument.replace("/", "_"))))
    target = asked.get("target")
    return Sweep(variants, seeds, tuning, extend, base, target, asked.get("greedy", {}), output)


def _check_keys(file: Path, asked: object):
    """Checks names and types of what a sweep's file asks for."""
    if not isinstance(asked, dict):
        raise ConfigError(f"{file}: get_sweep returns {type(asked).__name__}, not a dict")
    unknown = sorted(set(asked) - set(KEYS))
    require(not unknown, f"{file}: unknown {', '.join(unknown)}; a sweep has {', '.join(KEYS)}")
    kinds = {float: (int, float), list: (list, tuple)}
    for key, value in asked.items():
        right = isinstance(value, kinds.get(KEYS[key], KEYS[key]))
        require(right, f"{file}: {key}={value!r} is no {KEYS[key].__name__}")
    require("config" in asked, f"{file}: config is missing: the config file of the runs")


def _variant(file: Path, asked: dict, name: str, own: dict) -> Variant:
    """Returns a variant: what all runs have, and its own."""
    unknown = sorted(set(own) - set(VARIANT_KEYS))
    may = ", ".join(VARIANT_KEYS)
    require(not unknown, f"{file}: variant {name} has {', '.join(unknown)}; it may have {may}")
    config = asked["config"]
    if own.get("groups"):
        config += ("," if ":" in config else ":") + own["groups"]
    grid = {**asked.get("grid", {}), **own.get("grid", {})}
    for key, values in grid.items():
        listed = isinstance(values, list | tuple) and len(values) > 0
        require(listed, f"{file}: grid {key}={values!r} is no list of values")
    points = [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    ranges = {**asked.get("random", {}), **own.get("random", {})}
    if ranges:
        samples = asked.get("samples", 0)
        require(samples > 0, f"{file}: random needs samples, their number")
        draws = [_draw(file, ranges, name, sample) for sample in range(samples)]
        points = [point + draw for point in points for draw in draws]
    return Variant(name, config, {**asked.get("fields", {}), **own.get("fields", {})}, grid, points)


def _draw(file: Path, ranges: dict, variant: str, sample: int) -> Point:
    """Draws values from ranges: always the same ones for a variant's name and a sample's number."""
    random = np.random.default_rng([sample, *variant.encode()])
    drawn = []
    for key, given in ranges.items():
        match given:
            case ("log", low, high) if 0 < low < high:
                value = math.exp(random.uniform(math.log(low), math.log(high)))
            case ("uniform", low, high) if low < high:
                value = random.uniform(low, high)
            case list():
                value = given[random.integers(len(given))]
            case _:
                forms = "('log', LOW, HIGH), ('uniform', LOW, HIGH) or a list"
                raise ConfigError(f"{file}: random {key}={given!r}: write {forms}")
        drawn.append((key, float(f"{value:.4g}") if isinstance(value, float) else value))
    return tuple(drawn)


def command(job: Job) -> str:
    """Returns the command of a run as one would type it."""
    return shlex.join(["trainit", "train", *job.arguments])
