"""Reads run folders and groups runs: by seeds into settings, and these by learning rates into methods."""

import contextlib
import itertools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainit.config import FREE, ConfigError, flatten, require
from trainit.data.documents.inputs import files_below

RATE = "optimizer.learning_rate"
Seed = int | None  # None: the run has no config


@dataclass(frozen=True)
class Run:
    """What one run has left in its folder."""

    path: Path
    config: dict  # {"optimizer.name": "adamw", ...}; empty if the folder has none
    facts: dict  # from run.json; empty if the folder has none
    records: list[dict]  # from metrics.jsonl, in order of steps

    @property
    def seed(self) -> Seed:
        return self.config["seed"] if self.config else None

    @property
    def changes(self) -> list[tuple[int, str]]:
        """After which steps the run continued with another config, and what was other."""
        return [(step, what) for step, what in self.facts.get("changes", ())]

    @property
    def steps(self) -> int:
        """How many steps the run should do; without a config, as many as it has done."""
        return self.config["steps"] if self.config else self.done

    @property
    def done(self) -> int:
        """How many steps the run has done."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the last one is validated."""
        return self.done >= self.steps > 0 and self.records[-1].get("valid/loss") is not None

    @property
    def final(self) -> float:
        """The validation loss of the last step; inf if the run is not finished or the loss not finite."""
        loss = self.records[-1]["valid/loss"] if self.finished else math.inf
        return loss if math.isfinite(loss) else math.inf

    def seconds(self) -> list[float]:
        """Returns the training time until each record: without start, compilation, validation and saving."""
        # A step whose time was not measured or not logged counts as the run's median.
        times = [record.get("time/step_seconds") for record in self.records]
        usual = statistics.median(filter(None, times)) if any(times) else math.nan
        steps = [0, *(record["step"] for record in self.records)]
        counts = (step - before for before, step in itertools.pairwise(steps))
        spent = ((t or usual) + (n - 1) * usual if n > 0 else 0.0 for t, n in zip(times, counts, strict=True))
        return list(itertools.accumulate(spent))

    def curve(self, *metrics: str) -> tuple[list[float], ...]:
        """Returns these metrics of the records that have all, finite; also "flops", and "seconds" above."""
        flops = self.facts.get("flops_per_token", math.nan)
        known = {"seconds": self.seconds, "flops": lambda: [flops * r["tokens"] for r in self.records]}
        columns = [known[m]() if m in known else [r.get(m) for r in self.records] for m in metrics]
        rows = zip(*columns, strict=True)
        points = [row for row in rows if None not in row and all(map(math.isfinite, row))]
        return tuple([point[i] for point in points] for i in range(len(metrics)))


@dataclass(frozen=True)
class Setting:
    """Runs whose configs are the same except for the seed."""

    name: str
    config: dict
    runs: list[Run]  # whose losses are reported
    tuning: list[Run]  # whose losses choose the learning rate; the same runs if there are no tuning seeds

    @property
    def rate(self) -> float:
        return self.config[RATE] if self.config else math.nan

    @property
    def finals(self) -> dict[Seed, float]:
        """Final validation losses by seed."""
        return {run.seed: run.final for run in self.runs}

    @property
    def tuned_loss(self) -> float:
        """The mean of the final validation losses that choose the rate; inf if one of them is."""
        return statistics.fmean(run.final for run in self.tuning)


@dataclass(frozen=True)
class Method:
    """Settings that differ only in the learning rate."""

    name: str
    settings: list[Setting] = field(default_factory=list)  # by learning rate

    @property
    def best(self) -> Setting:
        """The setting with the lowest loss of the runs that choose the rate."""
        return min(self.settings, key=lambda setting: setting.tuned_loss)


def read(path: Path) -> Run:
    """Reads a run's folder. Skips lines that are no steps, such as one that a crash left unfinished.

    Raises OSError without metrics.jsonl, ConfigError if config.json or run.json is damaged, or not Trainit's.
    """
    records = []
    for line in (path / "metrics.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            record = {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
            records += [record] if "step" in record else []
    config, facts = flatten(_read_json(path / "config.json")), _read_json(path / "run.json")
    lacking = [key for key in ("seed", "steps", RATE, "optimizer.name") if key not in config]
    lacking += [] if lacking or isinstance(config[RATE], int | float) else [f"number as {RATE}"]
    require(
        not config or not lacking,
        f"{path / 'config.json'} is no config of Trainit: it has no {', '.join(lacking)}; move it away",
    )
    run = Run(path, config, facts, records)
    if run.config and run.changes:  # a run that was put together is no run of its last config
        run.config["changed"] = "after " + ", ".join(str(step) for step, _ in run.changes)
    return run


def _read_json(file: Path) -> dict:
    """Returns the object in a file, {} if there is no file; ConfigError if it is damaged."""
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
        require(isinstance(content, dict), f"it is a {type(content).__name__} instead of an object")
    except ValueError as error:  # a ConfigError is one
        raise ConfigError(f"{file} is damaged: {error}; remove it, or move the folder away") from None
    return content


def find(paths: Iterable[Path]) -> list[Run]:
    """Reads the runs in these folders: each is a run's folder or contains some at any depth, else OSError."""
    folders: dict[Path, Path] = {}  # in order, each once, whatever links lead to it
    for path in paths:
        is_run = (path / "metrics.jsonl").exists()
        below = [] if is_run or not path.is_dir() else files_below(path)
        found = [path] if is_run else sorted(file.parent for file in below if file.name == "metrics.jsonl")
        if not found:
            raise FileNotFoundError(2, "no metrics.jsonl: it is no run folder, and none is in it", str(path))
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [read(folder) for folder in folders.values()]


def exact(value: float) -> str:
    """Returns six digits, or as many as no other number shares."""
    return text if float(text := f"{value:g}") == value else repr(float(value))


def group(runs: Sequence[Run], tuning_seeds: Collection[int] = ()) -> list[Method]:
    """Groups runs into methods and settings, in the order of their first runs.

    They are named after the optimizer and the fields in which they differ, without values that the majority
    has. Runs without a config, or with equal ones, are named after their folders. Runs with tuning seeds only
    choose the learning rate: where a setting has others, these alone are reported, since what was chosen for
    its luck must not be judged by it.
    """
    # Runs with equal configs are a setting, unless their seeds are equal, too.
    by_setting: dict[object, list[Run]] = {}
    for run in runs:
        meaning: tuple = tuple(sorted((k, str(v)) for k, v in run.config.items() if _is_meaningful(k)))
        meaning += tuple(str(change) for change in run.changes)
        seeds = {other.seed for other in by_setting.get(meaning, [])}
        key = meaning if meaning and run.seed not in seeds else run.path
        by_setting.setdefault(key, []).append(run)

    # Names that are empty or not unique are replaced by the folder.
    configs = [members[0].config for members in by_setting.values()]
    differing = _differing(configs)
    shared = [name for name in differing if not name.startswith("optimizer.")]
    counts = {name: Counter(str(c[name]) for c in configs if name in c).most_common(1)[0] for name in shared}
    usual = {name: value for name, (value, count) in counts.items() if count > len(configs) / 2}
    names = [_name(config, differing, usual) for config in configs]
    methods: dict[str, Method] = {}
    for config, members, name in zip(configs, by_setting.values(), names, strict=True):
        shown, method = name, _name(config, [part for part in differing if part != RATE], usual)
        if not name or names.count(name) > 1 or len(names) == 1:
            shown = method = str(members[0].path)
        tuning = [run for run in members if run.seed in tuning_seeds]
        reported = [run for run in members if run.seed not in tuning_seeds]
        setting = Setting(shown, config, reported or members, tuning or members)
        methods.setdefault(method, Method(method)).settings.append(setting)
    for found in methods.values():
        found.settings.sort(key=lambda setting: setting.rate)
    return list(methods.values())


def _is_meaningful(name: str) -> bool:
    """Whether a config field changes what is trained, other than by its randomness."""
    return name != "seed" and (name.startswith("dataset.") or not FREE.match(name))


def _differing(configs: Sequence[dict]) -> list[str]:
    """Returns the fields that tell configs apart; an optimizer's or schedule's own only among its configs."""
    values = defaultdict(set)
    names = filter(_is_meaningful, set().union(*configs))
    for name, fields in itertools.product(names, filter(None, configs)):
        part, _, own = name.partition(".")
        kind = fields.get(f"{part}.name") if part in ("optimizer", "schedule") and own != "name" else None
        values[name, kind].add(str(fields.get(name)))
    # Names of settings begin with the optimizer anyway.
    return sorted({name for (name, _), found in values.items() if len(found) > 1} - {"optimizer.name"})


def _name(config: dict, fields: Sequence[str], usual: dict[str, str]) -> str:
    """Returns "adamw, beta1 0.95": the optimizer, and the fields whose values are not the usual ones."""
    if not config:
        return ""
    optimizer = str(config["optimizer.name"])
    parts = [Path(optimizer).name if optimizer.endswith(".py") else optimizer]
    for name in fields:
        if name in config and usual.get(name) != str(value := config[name]):
            short = re.sub(r"^(optimizer|model|schedule|dataset)\.(?!name$)|\.name$", "", name)
            parts.append(f"{short} {exact(value) if isinstance(value, float) else value}")
    return ", ".join(parts)
