"""Reads a sweep's file, and determines which runs it asks for, given the results so far."""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainit.config import ConfigError, command_line, require
from trainit.experiments.compare.runs import RATE, exact

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
    "greedy": dict,  # see trainit.experiments.sweep.greedy
}
VARIANT_KEYS = ("groups", "fields", "grid", "random")

Point = tuple[tuple[str, Any], ...]  # fields of the grid, with their values


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


def describe(changes: Point) -> str:
    """Returns "learning_rate=0.001,beta1=0.9", the name of a folder, which no other values have."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return exact(value)
        path = str(value)
        return path.replace("/", "_") + f"-{zlib.crc32(path.encode()):08x}" * ("/" in path)

    return ",".join(f"{name.rpartition('.')[2]}={text(value)}" for name, value in changes)


@dataclass(frozen=True)
class Variant:
    """Runs of a sweep with the same groups, such as one optimizer."""

    name: str
    config: str  # with its groups
    fields: dict
    grid: dict[str, list]
    points: list[Point]

    def job(self, point: Point, seed: int, folder: Path, changes: Mapping[str, Any]) -> Job:
        """Returns a run that is named after a point, and makes these changes to fields."""
        fields = {**self.fields, **changes, "seed": seed}
        flags = (f"--config.{name}={value}" for name, value in fields.items())
        arguments = (f"--config={self.config}", *flags, f"--workdir={folder}")
        return Job(self.name, point, seed, folder, arguments)


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked. KEYS explains the fields."""

    variants: list[Variant]
    output: Path
    baseline: str
    seeds: Sequence[int] = (0,)
    tuning_seeds: Sequence[int] = ()
    extend: bool = False
    target: float | None = None
    greedy: dict = field(default_factory=dict)

    def wanted(self, losses: Losses) -> list[Job]:
        """Returns all runs that are wanted by now. When they are finished, more may be: call again then."""
        jobs = []
        for variant in self.variants:
            points = variant.points
            if self.tuning_seeds:
                tuning, points = self._tune(variant, losses)
                jobs += tuning
            jobs += [job for point in points for job in self._jobs(variant, point, self.seeds)]

        # The same run may be meant twice, but a folder has one run.
        by_folder: dict[Path, Job] = {}
        for job in jobs:
            other = by_folder.setdefault(job.folder, job)
            pairs = itertools.zip_longest(other.arguments, job.arguments)
            changes = "; ".join(f"{a} and {b}" for a, b in pairs if a != b)
            require(
                not changes, f"two runs would have the folder {job.folder}: {changes}; make it two sweeps"
            )
        return list(by_folder.values())

    def undecided(self, losses: Losses) -> list[Job]:
        """Returns the runs of best settings that are not known yet, with BEST for their values."""
        variants = (v for v in self.variants if self.tuning_seeds and not self._tune(v, losses)[1])
        points = ((v, tuple((name, "BEST") for name, _ in v.points[0])) for v in variants)
        return [job for variant, point in points for job in self._jobs(variant, point, self.seeds)]

    def _jobs(self, variant: Variant, point: Point, seeds: Sequence[int]) -> list[Job]:
        folder = self.output / variant.name / describe(point)
        return [variant.job(point, seed, folder / f"seed_{seed}", dict(point)) for seed in seeds]

    def _tune(self, variant: Variant, losses: Losses) -> tuple[list[Job], list[Point]]:
        """Returns the runs that choose a variant's best point; and that point, once they are finished."""
        points = list(variant.points)
        while True:
            jobs = [self._jobs(variant, point, self.tuning_seeds) for point in points]
            known = np.array([[losses(job) for job in row] for row in jobs], float)  # None becomes nan
            means = known.mean(axis=1)
            flat = list(itertools.chain(*jobs))
            if np.isnan(means).any() or means.min() == math.inf:
                return flat, []  # some have not been run, or all have failed
            best = points[means.argmin()]
            extended = len(points) - len(variant.points)
            further = _beyond(best, points) if self.extend and extended < EXTENSIONS else None
            if further is None:
                return flat, [best]
            points.append(further)


def _beyond(best: Point, points: Sequence[Point]) -> Point | None:
    """Returns the best point with the next learning rate, if its own is the first or last; otherwise None."""
    own = dict(best)
    alike = [point for point in map(dict, points) if RATE in point and {**point, RATE: own.get(RATE)} == own]
    rates = sorted(point[RATE] for point in alike)
    if len(rates) < 2 or own[RATE] not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if own[RATE] == rates[0] else rates[-2]
    rate = float(f"{own[RATE] ** 2 / neighbour:.3g}")
    return tuple({**own, RATE: rate}.items())


def read(given: str, output: Path | None) -> Sweep:
    """Reads a sweep's file, FILE or FILE:ARGUMENT, whose get_sweep(argument) returns a dict of KEYS.

    Without an output folder, that is runs/ and the file's name. Raises ConfigError for what cannot be meant.
    """
    asked = command_line.run_file(given, "get_sweep")
    file, _, argument = given.partition(":")
    output = output or Path("runs") / "-".join(filter(None, (Path(file).stem, argument.replace("/", "_"))))
    try:
        _check_keys(asked)
        return _sweep(asked, output)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_keys(asked: object):
    """Checks names and types of what a sweep's file asks for."""
    if not isinstance(asked, dict):
        raise ConfigError(f"get_sweep returns {type(asked).__name__}, not a dict")
    unknown = sorted(set(asked) - set(KEYS))
    require(not unknown, f"unknown {', '.join(unknown)}; a sweep has {', '.join(KEYS)}")
    kinds = {float: (int, float), list: (list, tuple)}
    for key, value in asked.items():
        right = isinstance(value, kinds.get(KEYS[key], KEYS[key]))
        require(right, f"{key}={value!r} is no {KEYS[key].__name__}")
    require("config" in asked, "config is missing: the config file of the runs")


def _sweep(asked: dict, output: Path) -> Sweep:
    variants = [_variant(asked, *item) for item in asked.get("variants", {"": {}}).items()]
    require(bool(variants), "variants={} has none")
    names = [variant.name for variant in variants]
    own = {"baseline", "seeds", "tuning_seeds", "extend", "target", "greedy"} & set(asked)
    sweep = Sweep(variants, output, **{"baseline": names[0]} | {key: asked[key] for key in own})
    for key, seeds in (("seeds", sweep.seeds), ("tuning_seeds", sweep.tuning_seeds)):
        whole = all(type(seed) is int and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds)
        require(whole, f"{key}={seeds} must be different whole numbers")
    require(len(sweep.seeds) > 0, f"seeds={sweep.seeds} has none: nothing would be run")
    require(sweep.target is None or math.isfinite(sweep.target), f"target={sweep.target} must be finite")
    both = sorted(set(sweep.seeds) & set(sweep.tuning_seeds))
    require(not both, f"{both} are in seeds and in tuning_seeds; what chose a rate must not judge it")
    require(bool(not sweep.extend or sweep.tuning_seeds), "extend needs tuning_seeds: they choose the rate")
    require(sweep.baseline in names, f"baseline={sweep.baseline!r}; there are {', '.join(names)}")
    return sweep


def _variant(asked: dict, name: str, own: dict) -> Variant:
    """Returns a variant: what all runs have, and its own."""
    inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    require(inside, f"variant {name!r}: its name is that of a folder in the sweep's, without ..")
    require(isinstance(own, dict), f"variant {name}: {own!r} is no dict of {', '.join(VARIANT_KEYS)}")
    unknown = sorted(set(own) - set(VARIANT_KEYS))
    require(not unknown, f"variant {name} has {', '.join(unknown)}; it may have {', '.join(VARIANT_KEYS)}")
    config = with_groups(asked["config"], own.get("groups", ""))
    fields, grid, ranges = ({**asked.get(k, {}), **own.get(k, {})} for k in ("fields", "grid", "random"))
    twice = "seed" in {*fields, *grid, *ranges}
    require(not twice, "seed is no field of a sweep: give all of them as 'seeds', or as 'tuning_seeds'")
    for key, values in grid.items():
        listed = isinstance(values, list | tuple) and len(values) > 0
        require(listed, f"grid {key}={values!r} is no list of values")
    combinations = itertools.product(*grid.values())
    points: list[Point] = [tuple(zip(grid, values, strict=True)) for values in combinations]
    if ranges:
        samples = asked.get("samples", 0)
        require(samples > 0, "random needs samples, their number")
        draws = [_draw(ranges, name, sample) for sample in range(samples)]
        points = [point + draw for point in points for draw in draws]
    return Variant(name, config, fields, grid, points)


def with_groups(config: str, groups: str) -> str:
    """Returns FILE:GROUP=CHOICE,... with more groups."""
    return config + (":" if ":" not in config else ",") * bool(groups) + groups


def _draw(ranges: dict, variant: str, sample: int) -> Point:
    """Draws values from ranges: always the same ones for a variant's name and a sample's number."""
    random = np.random.default_rng([sample, *variant.encode()])
    drawn = {}
    for key, given in ranges.items():
        match given:
            case ("log", low, high) if 0 < low < high:
                value = math.exp(random.uniform(math.log(low), math.log(high)))
            case ("uniform", low, high) if low < high:
                value = random.uniform(low, high)
            case list() if given:
                value = given[random.integers(len(given))]
            case _:
                forms = "('log', LOW, HIGH), ('uniform', LOW, HIGH) or a list"
                raise ConfigError(f"random {key}={given!r}: write {forms}")
        drawn[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    return tuple(drawn.items())
