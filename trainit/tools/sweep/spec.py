"""What a sweep's file asks for, and which runs that means, given what is known by now."""

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
    "fields": dict,  # {"steps": 200, ...}: of all runs
    "variants": dict,  # {"muon": {"groups": "optimizer=muon", "fields": {...}, "grid": {...}}, ...}
    "grid": dict,  # {"optimizer.learning_rate": [1e-3, 3e-3], ...}: all combinations
    "random": dict,  # {"optimizer.learning_rate": ("log", 1e-4, 1e-1), "optimizer.beta1": ("uniform", 0, 1)}
    "samples": int,  # of `random`
    "seeds": list,  # of all runs; with tuning_seeds, of each variant's best
    "tuning_seeds": list,  # of the runs that choose each variant's best
    "extend": bool,  # while a variant's best learning rate is the last of its grid, try one beyond
    "baseline": str,  # the variant that the others are measured by; the first
    "target": float,  # validation loss to reach; what all runs of the baseline reach
    "greedy": dict,  # see trainit.tools.sweep.greedy
}
VARIANT_KEYS = ("groups", "fields", "grid", "random")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    variant: str
    changes: tuple[tuple[str, object], ...]  # fields of the grid and their values
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of trainit.main

    def __str__(self) -> str:
        return f"{self.variant} {describe(self.changes)} seed {self.seed}".replace("  ", " ")


Losses = Callable[[Job], float | None]  # final validation loss; inf of a run that failed, None: not run yet


def describe(changes: Iterable[tuple[str, object]]) -> str:
    """ "learning_rate=0.001,beta1=0.9": the name of a folder."""
    return ",".join(f"{name.rpartition('.')[2]}={_text(value)}" for name, value in changes)


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("/", "_")


@dataclass(frozen=True)
class Variant:
    name: str
    config: str  # with its groups
    fields: dict
    grid: dict[str, list]
    points: list[tuple[tuple[str, object], ...]] = field(default_factory=list)


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

    def job(self, variant: Variant, changes: Sequence[tuple[str, object]], seed: int) -> Job:
        """A run of a variant at a point of its grid."""
        changes = tuple(changes)
        folder = self.output / variant.name / describe(changes) / f"seed_{seed}"
        fields = {**variant.fields, **dict(changes), "seed": seed}
        arguments = (f"--config={variant.config}", *flags_of(fields), f"--workdir={folder}")
        return Job(variant.name, changes, seed, folder, arguments)

    def wanted(self, losses: Losses) -> list[Job]:
        """All runs that are wanted by now. More may be when these are done: call again then."""
        found = []
        for variant in self.variants:
            if not self.tuning_seeds:
                found += [self.job(variant, p, seed) for p in variant.points for seed in self.seeds]
                continue
            tuning, best = self._tune(variant, losses)
            found += tuning
            if best is not None:
                found += [self.job(variant, best, seed) for seed in self.seeds]
        return found

    def _tune(self, variant: Variant, losses: Losses) -> tuple[list[Job], tuple | None]:
        """The runs that choose the best point of a variant; that point, once they are done."""
        points = list(variant.points)
        for _ in range(EXTENSIONS + 1):
            jobs = [self.job(variant, p, seed) for p in points for seed in self.tuning_seeds]
            known = {job: losses(job) for job in jobs}
            if None in known.values():
                return jobs, None
            means = [
                statistics.fmean(known[self.job(variant, p, s)] for s in self.tuning_seeds) for p in points
            ]
            if min(means) == math.inf:
                return jobs, None  # nothing works: there is no best
            best = points[means.index(min(means))]
            further = _beyond(best, points) if self.extend else None
            if further is None:
                return jobs, best
            points.append(further)
        return jobs, best


def _beyond(best: tuple, points: Sequence[tuple]) -> tuple | None:
    """The best point with the next learning rate behind the end that it is at; None if it is at none."""
    rest = [change for change in best if change[0] != RATE]
    rates = sorted(
        dict(p)[RATE] for p in points if RATE in dict(p) and [c for c in p if c[0] != RATE] == rest
    )
    if len(rates) < 2 or dict(best)[RATE] not in (rates[0], rates[-1]):
        return None
    end, neighbour = (rates[0], rates[1]) if dict(best)[RATE] == rates[0] else (rates[-1], rates[-2])
    rate = float(f"{end * end / neighbour:.3g}")
    return tuple((name, rate if name == RATE else value) for name, value in best)


def flags_of(fields: Mapping[str, object]) -> list[str]:
    """["--config.steps=200", ...]"""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def read(given: str, output: Path | None) -> Sweep:
    """A sweep's file.

    Args:
        given: FILE or FILE:ARGUMENT; the file has get_sweep(argument), which returns a dict of KEYS.
        output: where its runs go; None: runs/ and the file's name.

    Raises:
        ConfigError: it is not there, raises, or asks for what there is not.
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
    require(isinstance(asked, dict), f"{file}: get_sweep returns {type(asked).__name__}, not a dict")
    unknown = sorted(set(asked) - set(KEYS))
    require(not unknown, f"{file}: unknown {', '.join(unknown)}; a sweep has {', '.join(KEYS)}")
    for key, value in asked.items():
        kinds = (int, float) if KEYS[key] is float else (list, tuple) if KEYS[key] is list else KEYS[key]
        require(isinstance(value, kinds), f"{file}: {key}={value!r} is no {KEYS[key].__name__}")
    require("config" in asked, f"{file}: config is missing: the config file of the runs")
    output = output or Path("runs") / "-".join(filter(None, (file.stem, argument.replace("/", "_"))))
    seeds = list(asked.get("seeds", [0]))
    tuning = list(asked.get("tuning_seeds", []))
    for key, value in (("seeds", seeds), ("tuning_seeds", tuning)):
        whole = all(type(seed) is int and seed >= 0 for seed in value) and len(set(value)) == len(value)
        require(whole, f"{file}: {key}={value} must be different whole numbers")
    both = sorted(set(seeds) & set(tuning))
    require(not both, f"{file}: {both} are in seeds and in tuning_seeds; what chose a rate must not judge it")
    variants = [_variant(file, asked, *item) for item in asked.get("variants", {"": {}}).items()]
    base = asked.get("baseline", variants[0].name)
    require(
        base in [v.name for v in variants],
        f"{file}: baseline={base!r}; there are {', '.join(v.name for v in variants)}",
    )
    target = asked.get("target")
    extend = asked.get("extend", False)
    require(not extend or bool(tuning), f"{file}: extend needs tuning_seeds: by them the best rate is chosen")
    return Sweep(variants, seeds, tuning, extend, base, target, asked.get("greedy", {}), output)


def _variant(file: Path, asked: dict, name: str, own: dict) -> Variant:
    unknown = sorted(set(own) - set(VARIANT_KEYS))
    require(
        not unknown, f"{file}: variant {name} has {', '.join(unknown)}; it may have {', '.join(VARIANT_KEYS)}"
    )
    config = ("," if ":" in asked["config"] else ":").join(
        filter(None, (asked["config"], own.get("groups", "")))
    )
    grid = {**asked.get("grid", {}), **own.get("grid", {})}
    for key, values in grid.items():
        listed = isinstance(values, list | tuple) and len(values) > 0
        require(listed, f"{file}: grid {key}={values!r} is no list of values")
    points = [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    ranges = {**asked.get("random", {}), **own.get("random", {})}
    if ranges:
        samples = asked.get("samples", 0)
        require(samples > 0, f"{file}: random needs samples, their number")
        draws = [_draw(file, ranges, name, number) for number in range(samples)]
        points = [(*point, *draw) for point in points for draw in draws]
    return Variant(name, config, {**asked.get("fields", {}), **own.get("fields", {})}, grid, points)


def _draw(file: Path, ranges: dict, variant: str, number: int) -> list[tuple[str, object]]:
    """The same values each time: drawn from the variant's name and the sample's number."""
    random = np.random.default_rng([number, *variant.encode()])
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
                raise ConfigError(
                    f"{file}: random {key}={given!r}: write ('log', LOW, HIGH), ('uniform', LOW, HIGH) "
                    f"or a list"
                )
        drawn.append((key, float(f"{value:.4g}") if isinstance(value, float) else value))
    return drawn


def command(job: Job) -> str:
    """As one would type it."""
    return shlex.join(["python", "-m", "trainit.main", *job.arguments])
