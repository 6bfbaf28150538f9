"""Run folders read, and put together: runs that differ in their seed alone are one setting, settings that
differ in their learning rate alone one method."""

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
NAMED = ("optimizer", "schedule")  # parts of a config whose fields go with their name


@dataclass(frozen=True)
class Run:
    """What one run has left in its folder."""

    path: Path
    config: dict  # {"optimizer.name": "adamw", ...}; empty if the folder has none
    facts: dict  # of run.json; empty if the folder has none
    records: list[dict]  # of metrics.jsonl, in order of steps

    @property
    def seed(self) -> int | None:
        return self.config["seed"] if self.config else None

    @property
    def steps(self) -> int:
        """That were asked for; without a config nobody knows, and what was done is all."""
        return self.config["steps"] if self.config else self.done

    @property
    def done(self) -> int:
        """Steps."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the last one is validated."""
        return self.done >= self.steps > 0 and self.records[-1].get("valid/loss") is not None

    @property
    def final(self) -> float:
        """Validation loss of the last step; inf if the run is not finished, or the loss not finite."""
        return self.records[-1]["valid/loss"] if self.finished else math.inf

    def seconds(self) -> list[float]:
        """Training time at the end of each record's step: without start, compilation, validation, saving.

        A step whose time was not measured, or not logged, counts as the run's median.
        """
        times = [r["time/step_seconds"] for r in self.records if r.get("time/step_seconds")]
        usual, total, last, result = statistics.median(times) if times else math.nan, 0.0, 0, []
        for record in self.records:
            count = record["step"] - last
            if count > 0:
                total += record.get("time/step_seconds", usual) + (count - 1) * usual
            last = record["step"]
            result.append(total)
        return result

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The points of one curve: records that have both, and a finite y.

        Args:
            x: a metric, or "seconds", or "flops" (model FLOPs, see `trainit.train.metrics.flops_per_token`).
            y: a metric.
        """
        if x == "seconds":
            values = self.seconds()
        elif x == "flops":
            per_token = self.facts.get("flops_per_token", math.nan)
            values = [r["tokens"] * per_token for r in self.records]
        else:
            values = [r.get(x) for r in self.records]
        pairs = zip(values, (r.get(y) for r in self.records), strict=True)
        points = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in points], [b for _, b in points]


@dataclass(frozen=True)
class Setting:
    """Runs of one config but for the seed."""

    name: str
    method: str  # its name without the learning rate
    config: dict
    runs: list[Run]  # what is reported of it
    tuning: list[Run]  # by what it is chosen among other learning rates; the same ones without tuning seeds

    @property
    def rate(self) -> float:
        return self.config[RATE] if self.config else math.nan

    @property
    def finals(self) -> dict[int, float]:
        """Final validation losses by seed."""
        return {run.seed: run.final for run in self.runs}

    @property
    def tuned_loss(self) -> float:
        """Mean of the final validation losses by which it is chosen; inf if one of them is not finite."""
        return statistics.fmean(run.final for run in self.tuning)


@dataclass(frozen=True)
class Method:
    """Settings that differ in the learning rate alone."""

    name: str
    settings: list[Setting] = field(default_factory=list)  # by learning rate

    @property
    def best(self) -> Setting:
        """The setting of the lowest loss, by the runs that are for choosing it."""
        return min(self.settings, key=lambda s: s.tuned_loss)


def read(path: Path) -> Run:
    """A run's folder. A line that a crash left unfinished is passed over.

    Raises:
        OSError: the folder holds no metrics.jsonl.
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
    """The runs in these folders, each a run's or one that holds such at any depth.

    Raises:
        OSError: a folder is not there, or there is no run in it.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        is_run = (path / "metrics.jsonl").exists()
        folders = [path] if is_run else sorted(file.parent for file in path.rglob("metrics.jsonl"))
        if not folders:
            raise FileNotFoundError(2, "no metrics.jsonl: it is no run folder, and none is in it", str(path))
        for folder in folders:
            found.setdefault(folder, read(folder))
    return list(found.values())


def group(runs: Sequence[Run], tuning_seeds: Collection[int] = ()) -> list[Method]:
    """Methods and settings, in the order in which their first runs stand.

    They are named by the optimizer and by the fields in which they differ, but for what most of them have;
    runs that have no config, or do not differ in it, by their folders.

    Args:
        runs: as they were read.
        tuning_seeds: runs with them choose the learning rate, and count for nothing else where a setting
            has others: what was chosen for its good luck is not judged by it.
    """
    settings: dict[object, list[Run]] = {}
    for run in runs:
        meaning = tuple(sorted((k, str(v)) for k, v in run.config.items() if _tells_apart(k)))
        seeds = {other.seed for other in settings.get(meaning, [])}
        key = meaning if meaning and run.seed not in seeds else run.path
        settings.setdefault(key, []).append(run)
    groups = list(settings.values())
    differing = _differing([members[0].config for members in groups])
    usual = _usual([members[0].config for members in groups], differing)
    named = [_name(members[0].config, differing, usual) for members in groups]
    methods: dict[str, Method] = {}
    for members, name in zip(groups, named, strict=True):
        config, folder = members[0].config, str(members[0].path)
        by_folder = not name or named.count(name) > 1 or len(groups) == 1
        method = folder if by_folder else _name(config, [f for f in differing if f != RATE], usual)
        setting = Setting(folder if by_folder else name, method, config, *_split(members, tuning_seeds))
        methods.setdefault(method, Method(method)).settings.append(setting)
    for method in methods.values():
        method.settings.sort(key=lambda s: s.rate)
    return list(methods.values())


def _split(runs: list[Run], tuning_seeds: Collection[int]) -> tuple[list[Run], list[Run]]:
    """Those to report and those to choose by; each all of them where there would be none."""
    tuning = [run for run in runs if run.seed in tuning_seeds]
    return [run for run in runs if run not in tuning] or runs, tuning or runs


def _tells_apart(name: str) -> bool:
    return name != "seed" and (name.startswith("dataset.") or not FREE.match(name))


def _differing(configs: Sequence[dict]) -> list[str]:
    """The fields that tell configs apart; those of an optimizer or a schedule, among others of its name."""

    def differ(names: Iterable[str], among: Sequence[dict]) -> set[str]:
        return {n for n in names if _tells_apart(n) and len({str(c.get(n)) for c in among}) > 1}

    names = {name for config in configs for name in config}
    found = differ((n for n in names if n.partition(".")[0] not in NAMED), configs)
    for part in NAMED:
        own, which = [n for n in names if n.startswith(f"{part}.")], f"{part}.name"
        kinds = {c[which] for c in configs if which in c}
        found |= {which} if len(kinds) > 1 else set()
        for kind in kinds:
            found |= differ(own, [c for c in configs if which in c and c[which] == kind])
    return sorted(found - {"optimizer.name"})  # which stands first anyway


def _usual(configs: Sequence[dict], fields: Sequence[str]) -> dict[str, str]:
    """What more than half of the configs have in fields that are not the optimizer's."""
    usual = {}
    for name in fields:
        value, count = Counter(str(c[name]) for c in configs if name in c).most_common(1)[0]
        if count > len(configs) / 2 and not name.startswith("optimizer."):
            usual[name] = value
    return usual


def _name(config: dict, fields: Sequence[str], usual: dict[str, str]) -> str:
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
