"""Steps of a run, done again, and how far rounding may move them."""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainit import optimizers
from trainit.checkpoints.store import CheckpointStore
from trainit.cluster import sync
from trainit.cluster.devices import computed_on
from trainit.config import DATASETS, FREE, Config, ConfigDict, command_line, defaults, flatten, require
from trainit.data import training_data
from trainit.data.jsonl.dataset import is_chat
from trainit.data.training_data import TrainingData
from trainit.experiments.compare import runs
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.prepare.demo import prepare_demo
from trainit.train import step as train_step
from trainit.train.automatic import choice
from trainit.train.reports import metrics
from trainit.train.resume import Resume, differences
from trainit.train.step import CompiledSteps

DRAWS, QUANTILE = 4, 15.5  # see `rounding`
FLOAT32, TF32 = 2.0**-24, 2.0**-11  # unit roundoffs
NOT_LOGGED = {"tokens", "rows_tokens", "skipped_in_a_row"}  # of what a step leaves on the devices
COMPUTING = re.compile(r"(device_batch_size|logits_mib|model\..*)$")  # fields on which rounding depends
Steps = Mapping[int, Mapping[str, float]]  # metrics by step


class Job(NamedTuple):
    """Steps that one job of a run did, as the log has them: a resume drops what follows its checkpoint."""

    end: float  # the last of these steps; inf: the run's last job
    config: dict
    computed_on: str  # "" for jobs of earlier versions


def jobs(folder: Path) -> list[Job]:
    """Who did the steps until each checkpoint of a run, in order, and those after the newest one."""
    require((folder / "metrics.jsonl").is_file(), f"{folder} is no folder of a run: it has no metrics.jsonl")
    found, facts = [], runs.read(folder).facts
    for meta in (folder / "checkpoints").glob("[0-9]*/meta/metadata"):
        if (step := meta.parts[-3]).isdigit():  # others are put aside
            about = json.loads(meta.read_bytes())
            found.append(Job(int(step), about["config"], about.get("computed_on", "")))
    config = json.loads((folder / "config.json").read_bytes())
    return [*sorted(found), Job(math.inf, config, facts.get("computed_on", ""))]


def with_fields(saved: dict, overrides: Sequence[tuple[str, str | None]]) -> Config:
    """A run's config with the fields of the command line. ConfigError: the run would be another with them."""
    declared = defaults()
    if "streams" in saved["dataset"]:
        declared.dataset = DATASETS["chat" if is_chat(saved["dataset"]) else "jsonl"]()
    command_line.set_fields(declared, overrides)
    given, config = flatten(declared), ConfigDict(saved, type_safe=False)
    for name, _ in overrides:
        require(bool(FREE.match(name)), f"--config.{name} would make another run of it")
        config.update_from_flattened_dict({name: given[name]})
    files = optimizers.own_files_hash(config.optimizer, config.parameter_groups)
    return Config({**config.to_dict(), "optimizer_files": files})


@dataclass(frozen=True)
class Replay:
    """Steps of a run that are to be done again."""

    config: Config
    data: TrainingData
    shape: RunShape
    compiled: CompiledSteps
    begin: int  # steps done before
    end: int
    logged: dict[int, dict]  # by step
    there: str  # where the run did them; "" if it has not recorded that
    here: str

    @property
    def sum_error(self) -> float:
        """The relative error of the longest sum that a step has, over a batch or a width, in float32."""
        m, positions = self.config.model, max(self.shape.batch_sizes.sizes) * self.shape.batch_at(0).length
        return math.sqrt(max(positions, m.vocab_size, m.mlp_dim)) * FLOAT32

    def redo(self, draw: int = 0) -> dict[int, dict[str, float]]:
        """The metrics of these steps. If `draw` is not 0, the parameters have errors that it seeds."""
        # As a new run that begins from this checkpoint: all that a resume checks is checked here, too.
        nowhere = CheckpointStore(Path(os.devnull), read_only=True)
        start = Resume(self.config, self.data, self.shape, self.compiled, nowhere).start_point()
        require(start.step == self.begin, f"the run began at step {start.step} of another: replay that one")
        state, position, sizes = start.state, start.position, self.shape.batch_sizes
        if draw:
            state = replace(state, params=self._disturbed(state.params, draw))

        # Batches as the loop reads them: where their size changes, or some are left out, is another reader.
        rows, layout = position.rows, batch_sharding(self.shape.device_mesh)
        found: dict[int, dict[str, float]] = {}
        for left_out, size, count in sizes.stretches(self.begin, self.end):
            rows += left_out * size
            reader = self.data.reader(self.shape.batch_of(size), layout, position)
            for batch in itertools.islice(reader.batches(left_out + count), left_out, None):
                state, on_device = self.compiled.train(state, batch)
                step, rows = self.begin + len(found) + 1, rows + size
                values = metrics.numbers(self.config, step, on_device)
                found[step] = {name: values[name] for name in values if name not in NOT_LOGGED}
            position = reader.position(rows)
        return found

    def _disturbed(self, params: dict, draw: int) -> dict:
        """The parameters, each times 1 ± the error of a result, with signs drawn at random."""
        # GPUs multiply float32 in TF32; float8 has four bits.
        types = {self.config.precision, *filter(None, self.config.precision_of.values())}
        own = max(2.0**-4 if name == "float8" else float(jnp.finfo(name).eps) / 2 for name in types)
        on_cpus = all("× cpu" in text for text in (self.here, self.there))
        error = max(own, 0.0 if on_cpus else TF32) + self.sum_error

        def disturb(params: dict) -> dict:
            leaves, tree = jax.tree.flatten(params)
            keys = jax.random.split(jax.random.key(draw), len(leaves))
            pairs = zip(leaves, keys, strict=True)
            moved = [x + x * error * jax.random.rademacher(key, x.shape, x.dtype) for x, key in pairs]
            return jax.tree.unflatten(tree, moved)

        layout = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(disturb, out_shardings=layout, donate_argnums=0)(params)


def rounding(done: Steps, draws: Sequence[Steps], sum_error: float) -> Steps:
    """How far losses and norms may differ where sums are added up in another order, for each step.

    A product's result has a relative error of u + sqrt(n) * 2^-24, that of the type in
    which the model computes, and that of a sum of n terms whose errors are independent (Higham and Mary 2019,
    SIAM J. Sci. Comput. 41, A2815). `draws` are the same steps from parameters with this error. The root of
    the mean square of how far they move is exceeded QUANTILE times once in 10,000 comparisons (Student's t,
    with DRAWS degrees of freedom). The error of a metric's own sum is added.
    """
    bounds: dict[int, dict[str, float]] = {}
    for step, values in done.items():
        for name in (name for name in values if re.search("(loss|norm)(?!_scale)", name)):
            squares = [(draw[step][name] - values[name]) ** 2 for draw in draws]
            moved = math.sqrt(sum(squares) / len(squares))
            bounds.setdefault(step, {})[name] = QUANTILE * moved + sum_error * abs(values[name])
    return bounds


def first_wrong(logged: Steps, done: Steps, bounds: Steps | None = None) -> str:
    """The first step and metric that differ from the log, by more than bounds if these are given; or ""."""
    for step, record in logged.items():
        for metric, value in done[step].items():
            if bounds is not None and metric not in bounds[step]:
                continue
            known, bound = record.get(metric, math.nan), bounds[step][metric] if bounds else 0.0
            # The log lacks numbers that are not finite.
            if not abs(known - value) <= bound and (math.isfinite(known) or math.isfinite(value)):
                found = (
                    f"step {step} is the first that differs: {metric} is {known!r} in the log, {value!r} now"
                )
                return found + f", which is more than ± {bound:.1g}" * (bounds is not None)
    return ""


def prepare(
    folder: Path, begin: int | None, count: int, overrides: Sequence[tuple[str, str | None]]
) -> Replay:
    """Finds the steps to do again, opens their data, and builds their functions. A collective.

    Raises ConfigError if there is no such checkpoint, or none of its steps is logged.
    """
    # Which steps? Process 0 decides: the run may be writing more of them.
    logged = {record["step"]: record for record in runs.read(folder).records if "train/loss" in record}
    last, available = max(logged, default=0), [0, *CheckpointStore(folder, read_only=True).steps()]
    begin = sync.agree(max(step for step in available if step < max(last, 1)) if begin is None else begin)
    lacking = f"{folder} has no checkpoint of step {begin}; there are {available}, where 0 is how it began"
    require(begin in available, lacking)
    # They end where the run continued on other devices or with another config.
    mine, *later = [job for job in jobs(folder) if job.end > begin]
    alike = itertools.takewhile(lambda job: job[1:] == mine[1:], later)
    end = sync.agree(int(min(begin + count, last, [mine, *alike][-1].end)))
    logged = {step: logged[step] for step in sorted(logged) if begin < step <= end}
    require(bool(logged), f"{folder / 'metrics.jsonl'} has no step from {begin + 1} to {begin + count}")

    config = with_fields(mine.config, overrides)
    if begin > 0:
        new = {"load_path": str(folder), "load_step": begin, "overwrite_optimizer": False}
        config = Config({**config.to_dict(), "checkpoint": {**config.checkpoint.to_dict(), **new}})
    d, cache = config.dataset, command_line.cache()
    path = str(prepare_demo(cache)) if d.path == "demo" and "streams" not in d else d.path
    config, data = training_data.read(
        ConfigDict(config.to_dict()), path, lambda *_, known=config: known, cache
    )
    config, shape, _ = choice.on_devices(config)
    fields = differences(mine.config, config.to_dict()).items()
    others = (f", {name}={new}" for name, (_, new) in fields if COMPUTING.match(name))
    here = computed_on(shape.sizes, shape.attention) + "".join(others)
    compiled = train_step.build(config, shape)
    return Replay(config, data, shape, compiled, begin, end, logged, mine.computed_on, here)
