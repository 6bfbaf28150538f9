"""Reads run folders and groups runs.

Runs that differ only in their seed are one setting; settings that differ only in their learning rate are one
method.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainit.config import FREE, flatten

RATE = "optimizer.learning_rate"
NAMED = ("optimizer", "schedule")  # parts of a config whose fields depend on their name
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
        return self.records[-1]["valid/loss"] if self.finished else math.inf

    def seconds(self) -> list[float]:
        """Returns the training time until each record: without start, compilation, validation and saving.

        A step whose time was not measured or not logged counts as the run's median.
        """
        times = [record["time/step_seconds"] for record in self.records if record.get("time/step_seconds")]
        usual, total, last, result = statistics.median(times) if times else math.nan, 0.0, 0, []
        for record in self.records:
            count = record["step"] - last
            if count > 0:
                total += record.get("time/step_seconds", usual) + (count - 1) * usual
            last = record["step"]
            result.append(total)
        return result

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Returns the points of a curve: x and y of the records that have both, with finite y.

        Args:
            x: a metric, "seconds", or "flops" (model FLOPs, see `trainit.train.metrics.flops_per_token`).
            y: a metric.
        """
        values: Sequence[float | None]
        if x == "seconds":
            values = self.seconds()
        elif x == "flops":
            per_token = self.facts.get("flops_per_token", math.nan)
            values = [record["tokens"] * per_token for record in self.records]
        else:
            values = [record.get(x) for record in self.records]
        pairs = zip(values, (record.get(y) for record in self.records), strict=True)
        points = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in points], [b for _, b in points]


@dataclass(frozen=True)
class Setting:
    """Runs whose configs are the same except for the seed."""

    name: str
    method: str  # the name without the learning rate
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
    """Reads a run's folder. Skips a line that a crash left unfinished.

    Raises:
        OSError: the folder has no metrics.jsonl.
    """
    records = []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    config, facts = (
        json.loads(file.read_text()) if file.is_file() else {}
        for file in (path / "config.json", path / "run.json")
    )
    return Run(path, flatten(config), facts, records)


def find(paths: Iterable[Path]) -> list[Run]:
    """Reads the runs in these folders: each is a run's folder, or contains some at any depth.

    Raises:
        OSError: a folder does not exist, or there is no run in it.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        is_run = (path / "metrics.jsonl").exists()
        folders = [path] if is_run else sorted(file.parent for file in path.rglob("metrics.jsonl"))
        if not folders:
            raise FileNotFoundError(2, "no metrics.jsonl: it is no run folder, and none is in it", str(path))
        for folder in folders:
            runs.setdefault(folder, read(folder))
    return list(runs.values())


def group(runs: Sequence[Run], tuning_seeds: Collection[int] = ()) -> list[Method]:
    """Groups runs into methods and settings, in the order of their first runs.

    They are named after the optimizer and the fields in which they differ, without values that the majority
    has. Runs without a config, or with equal ones, are named after their folders.

    Args:
        runs: from `read`.
        tuning_seeds: the seeds of runs that only choose the learning rate. They are not reported where a
            setting has other runs, since what was chosen for its luck must not be judged by it.
    """
    # Runs with equal configs are a setting, unless their seeds are equal, too.
    by_setting: dict[object, list[Run]] = {}
    for run in runs:
        meaning = tuple(sorted((k, str(v)) for k, v in run.config.items() if _is_meaningful(k)))
        seeds = {other.seed for other in by_setting.get(meaning, [])}
        key = meaning if meaning and run.seed not in seeds else run.path
        by_setting.setdefault(key, []).append(run)

    # Names that are empty or not unique are replaced by the folder.
    groups = list(by_setting.values())
    configs = [members[0].config for members in groups]
    differing = _differing(configs)
    usual = _usual(configs, differing)
    names = [_name(config, differing, usual) for config in configs]
    methods: dict[str, Method] = {}
    for members, name in zip(groups, names, strict=True):
        config = members[0].config
        if not name or names.count(name) > 1 or len(groups) == 1:
            setting_name = method_name = str(members[0].path)
        else:
            setting_name, method_name = name, _name(config, [f for f in differing if f != RATE], usual)
        tuning = [run for run in members if run.seed in tuning_seeds]
        reported = [run for run in members if run not in tuning]
        setting = Setting(setting_name, method_name, config, reported or members, tuning or members)
        methods.setdefault(method_name, Method(method_name)).settings.append(setting)
    for method in methods.values():
        method.settings.sort(key=lambda setting: setting.rate)
    return list(methods.values())


def _is_meaningful(name: str) -> bool:
    """Whether a config field changes what is trained, other than by its randomness."""
    return name != "seed" and (name.startswith("dataset.") or not FREE.match(name))


def _differing(configs: Sequence[dict]) -> list[str]:
    """Returns the fields that tell configs apart.

    An optimizer's or schedule's own fields only count among configs with the same optimizer or schedule.
    """

    def differ(names: Iterable[str], among: Sequence[dict]) -> set[str]:
        return {n for n in names if _is_meaningful(n) and len({str(c.get(n)) for c in among}) > 1}

    names = {name for config in configs for name in config}
    found = differ((n for n in names if n.partition(".")[0] not in NAMED), configs)
    for part in NAMED:
        own, name_field = [n for n in names if n.startswith(f"{part}.")], f"{part}.name"
        kinds = {config[name_field] for config in configs if name_field in config}
        found |= {name_field} if len(kinds) > 1 else set()
        for kind in kinds:
            found |= differ(own, [c for c in configs if name_field in c and c[name_field] == kind])
    return sorted(found - {"optimizer.name"})  # names start with it anyway


def _usual(configs: Sequence[dict], fields: Sequence[str]) -> dict[str, str]:
    """Returns the values that more than half of the configs have, of fields that are not the optimizer's."""
    usual = {}
    for name in fields:
        value, count = Counter(str(c[name]) for c in configs if name in c).most_common(1)[0]
        if count > len(configs) / 2 and not name.startswith("optimizer."):
            usual[name] = value
    return usual


def _name(config: dict, fields: Sequence[str], usual: dict[str, str]) -> str:
    """Returns "adamw, beta1 0.95": the optimizer, and the fields whose values are not the usual ones."""
    if not config:
        return ""
    optimizer = str(config["optimizer.name"])
    parts = [Path(optimizer).name if optimizer.endswith(".py") else optimizer]
    for name in fields:
        if name in config and usual.get(name) != str(config[name]):
            value = config[name]
            short = re.sub(r"^(optimizer|model|schedule|dataset)\.(?!name$)|\.name$", "", name)
            parts.append(f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(parts)
