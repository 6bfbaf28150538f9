"""Where a run begins: at step 0, at its own newest checkpoint, or at another run's checkpoint."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from absl import logging

from trainit.checkpoints.convert.pretrained import Pretrained, is_pretrained
from trainit.checkpoints.fallback import before_skipped, set_aside, whole
from trainit.checkpoints.snapshots.keeper import Snapshot, Snapshots
from trainit.checkpoints.state import TrainState
from trainit.checkpoints.store import CheckpointStore
from trainit.cluster import sync
from trainit.config import FREE, SCHEDULES, Config, batch_sizes, defaults, flatten, require
from trainit.config.schema import as_tuple
from trainit.data.documents import inputs
from trainit.data.loader import START, DataPosition, has_same_order
from trainit.data.training_data import TrainingData, abstract_batch
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train.step import CompiledSteps
from trainit.transforms import schedules


@dataclass(frozen=True)
class StartPoint:
    """Where a run, or the part of it that this job does, begins."""

    state: TrainState
    step: int  # steps done
    position: DataPosition  # in the training data
    saved_step: int | None  # step of the run's own newest checkpoint, if it is resumed
    wandb_id: str  # of the W&B run
    postponed: dict | None  # record of `step` whose validation the job before has left to this one
    changes: list  # [step, what]: where the run continued with another config
    metrics: dict | None = None  # what the checkpoint has of metrics.jsonl; None: nothing
    is_resumed: bool = False  # the run's own checkpoint or snapshot is continued

    def is_validated(self, workdir: Path) -> bool:
        """Whether no validation after `step` is left to do. All processes call it together."""
        path, is_done = workdir / "metrics.jsonl", self.postponed is None
        if not is_done and path.exists():
            last = (path.read_text(errors="replace").splitlines() or [""])[-1]
            is_done = f'"step": {self.step},' in last and '"valid/loss"' in last
        return bool(sync.agree(is_done))


@dataclass
class Resume:
    """Finds the checkpoint that a run begins from, checks that it fits, and makes the first state."""

    config: Config
    data: TrainingData
    shape: RunShape
    steps: CompiledSteps  # the train step of these is compiled while the state is made or read
    checkpoints: CheckpointStore  # the run's own
    snapshots: Snapshots | None = None  # the run's own

    def __post_init__(self):
        # All processes take the checkpoint that process 0 sees: a shared file system may show others less.
        self._latest = sync.agree(max(self.checkpoints.steps(), default=-1))
        c = self.config.checkpoint
        self.reads_checkpoint = self._latest >= 0 or bool(c.load_path)
        # Another beginning than the newest checkpoint is for a folder of its own.
        is_other = c.load_step not in (-1, self._latest) or c.overwrite_optimizer
        is_own = (
            c.load_path and Path(c.load_path, "checkpoints").resolve() == self.checkpoints.folder.resolve()
        )
        require(
            self._latest < 0 or not (is_other and is_own),
            f"checkpoint.load_path={c.load_path!r} is the run's own folder, which continues at its newest "
            f"step {self._latest}; to begin at another one or with a new optimizer, take a new --workdir",
        )

    def start_point(self) -> StartPoint:
        """Makes or reads the first state. Raises ConfigError if a checkpoint does not fit config or data."""
        c, wandb_id = self.config.checkpoint, secrets.token_hex(4)
        if self.snapshots and (snapshot := self.snapshots.newest(after=self._latest)):
            return self._continue(snapshot)
        if not self.reads_checkpoint:
            self._compile_ahead(0)
            return StartPoint(jax.block_until_ready(self.steps.init()), 0, START, None, wandb_id, None, [])
        if self._latest < 0 and is_pretrained(c.load_path):
            logging.info("begin      with parameters of %s, new optimizer", c.load_path)
            params = Pretrained(c.load_path).parameters(self.steps.abstract_state.params)
            return StartPoint(self._begin(params), 0, START, None, wandb_id, None, [])

        # Which checkpoint is it, and does it fit?
        is_resumed = self._latest >= 0
        source, step = (self.checkpoints, self._latest) if is_resumed else self._find_to_load()
        takes_newest = is_resumed or c.load_step < 0
        option = f"--config.checkpoint.{'fallback=True' if takes_newest else 'load_step={step}'}"
        step = whole(source, step, option, c.fallback and takes_newest)
        newest = step
        step = newest if c.overwrite_optimizer else before_skipped(source, newest, self.config)
        if is_resumed and step < self._latest:
            set_aside(source, step, "damaged" if step == newest else "rewound")
        meta = source.meta(step)
        position, changes = self._check(meta, f"checkpoint {source.folder / str(step)}", step)

        # The state. A new optimizer begins at step 0 of its schedule; the data continue where they were.
        if is_resumed:
            logging.info("resume     at step %d of %d", step, self.config.steps)
            state = self._restore(source, step)
        elif c.overwrite_optimizer:
            logging.info("begin      with parameters of %s step %d, new optimizer", c.load_path, step)
            state = self._begin(source.restore_params(step, self.steps.abstract_state.params))
        else:
            require(
                step < self.config.steps,
                f"checkpoint.load_path={c.load_path!r} is at step {step}, steps={self.config.steps}: nothing "
                f"is left to do; raise steps, or take its parameters alone with "
                f"checkpoint.overwrite_optimizer=True",
            )
            logging.info("begin      from %s step %d", c.load_path, step)
            state = self._restore(source, step)
        step = int(jax.block_until_ready(state).step)
        self.data.check_resume(meta["config"], position, step)
        if not is_resumed:
            return StartPoint(state, step, position, None, wandb_id, None, changes if step else [])
        wandb_id, postponed = meta.get("wandb_id") or wandb_id, meta.get("postponed")
        about = postponed, changes, meta.get("metrics"), True
        return StartPoint(state, step, position, step, wandb_id, *about)

    def _continue(self, snapshot: Snapshot) -> StartPoint:
        """The start from a snapshot that is newer than all checkpoints."""
        step, meta, latest = snapshot.step, snapshot.meta, self._latest
        position, changes = self._check(meta, f"the snapshot of step {step}", step)
        text = "resume     at step %d of %d, from the hosts' snapshot; the newest checkpoint is of step %s"
        logging.info(text, step, self.config.steps, latest if latest >= 0 else "none")
        self._compile_ahead(step)
        state = snapshot.state(self.steps.abstract_state)
        self.data.check_resume(meta["config"], position, step)
        about = meta["wandb_id"], None, changes, meta["metrics"], True
        return StartPoint(state, step, position, latest if latest >= 0 else None, *about)

    def _begin(self, params: dict) -> TrainState:
        self._compile_ahead(0)
        return jax.block_until_ready(self.steps.begin(params))

    def _find_to_load(self) -> tuple[CheckpointStore, int]:
        """Another run's checkpoints, and the step of the one that the config names."""
        checkpoint = self.config.checkpoint
        source = CheckpointStore(Path(checkpoint.load_path), read_only=True)
        available = source.steps()
        step = max(available, default=-1) if checkpoint.load_step < 0 else checkpoint.load_step
        lacking = f"{checkpoint.load_path=} has no checkpoint" + f" of load_step={step}" * (step >= 0)
        require(step in available, f"{lacking}; there are {available or 'none'} in {source.folder}")
        return source, step

    def _check(self, meta: dict, origin: str, step: int) -> tuple[DataPosition, list]:
        """Checks that config and data may follow a checkpoint; its position in the data, and all changes."""
        c, overwrite = self.config, self.config.checkpoint.overwrite_config
        remedy = "set --config.checkpoint.overwrite_config=True to continue"

        # The config may change in FREE fields; elsewhere it changes what the state means.
        changed = differences(meta["config"], c.to_dict())
        lines = {field: f"{field}: {before!r} -> {after!r}" for field, (before, after) in changed.items()}
        fatal = "; ".join(line for field, line in lines.items() if not FREE.match(field))
        require(
            overwrite or not fatal,
            f"{origin} was made with another config ({fatal}); {remedy} with the new one, or a new --workdir",
        )
        for line in lines.values():
            logging.info("changed    %s", line)
        if fatal and (self._latest >= 0 or not c.checkpoint.overwrite_optimizer):
            self._compare_rates(meta["config"], step)
        changes = meta.get("changes", []) + [[step, fatal]] * bool(fatal)

        # The position in the data means something for the same data only.
        same_order, other_data = has_same_order(meta), inputs.changes(meta, self.data.identity)
        for text in other_data.values():
            require(overwrite, f"{origin} was made with other data: {text}; {remedy} with these")
            logging.info("changed    data: %s", text)
        require(
            overwrite or same_order,
            f"{origin} was trained on sequences in an order that this version of Trainit does not have; "
            f"{remedy} from the beginning of the data, or use the version that began the run",
        )
        if "dataset" not in other_data and same_order:
            return DataPosition.from_meta(meta, c.model.context_length), changes
        logging.info("data       from the beginning of %s", c.dataset.path)
        return START, changes

    def _compare_rates(self, before: Mapping, step: int):
        """Logs the learning rates around `step` if another config than the one before changes them."""
        # What an earlier version's config lacks is as it was before there was such a field.
        before, schedule = {**defaults(), **before}, before["schedule"]
        before["schedule"] = {**SCHEDULES.get(schedule["name"], dict)(), **schedule}
        old, new = (
            schedules.build(c["schedule"], c["optimizer"]["learning_rate"], batch_sizes(c))
            for c in (before, self.config)
        )
        last, planned, now = float(old(step - 1)), float(old(step)), float(new(step))
        if not math.isclose(planned, now, rel_tol=1e-4):
            logging.info("rate       %.3g in step %d, %.3g in step %d", last, step, now, step + 1)
            logging.info("           to warm up again there: %s", warm_up_again(before, step))

    def _restore(self, source: CheckpointStore, step: int) -> TrainState:
        """The whole state of a checkpoint. What it lacks because the config was another begins now."""
        self._compile_ahead(step)
        state = source.restore(step, self.steps.abstract_state)
        for name, begin in self.steps.begin_separate.items():
            if getattr(self.steps.abstract_state, name) and not getattr(state, name):
                logging.info("begin      %s here: the checkpoint has none of this kind", name)
                state = replace(state, **{name: begin(state.params)})
        return state

    def _compile_ahead(self, step: int):
        """Starts to compile the step that follows `step` others, in another thread."""
        if step < self.config.steps:
            layout = batch_sharding(self.shape.device_mesh)
            batch = abstract_batch(self.data.dtype, self.shape.batch_at(step), layout)
            self.steps.train.compile_ahead(self.steps.abstract_state, batch)


def warm_up_again(config: Mapping, step: int) -> str:
    """Flags with which a run of this config that is trained for longer warms up again after `step` steps."""
    schedule, sizes = config["schedule"], batch_sizes(config)
    at = [*map(sizes.duration, as_tuple(schedule["rewarm_at"])), step]
    # What was given in percent of all steps stays as long as it was.
    warmup = sizes.duration(schedule["warmup"])
    rise = "" if sizes.duration(schedule["rewarm"], begin=step) else " --config.schedule.rewarm=1"
    return f"--config.schedule.warmup={warmup} --config.schedule.rewarm_at={','.join(map(str, at))}{rise}"


def differences(old: Mapping, new: Mapping) -> dict[str, tuple]:
    """The fields in which two resolved configs differ: {"steps": (old value, new value)}; None: has none."""
    old, new = flatten(old), flatten(new)
    pairs = {field: (old.get(field), new.get(field)) for field in sorted(old.keys() | new.keys())}
    return {field: (before, after) for field, (before, after) in pairs.items() if before != after}
