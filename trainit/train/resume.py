"""Where a run begins: at step 0, at its own newest checkpoint, or at another run's checkpoint."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from absl import logging

from trainit.cluster import sync
from trainit.config import Config, ConfigError
from trainit.data.loader import START, DataPosition, has_same_order
from trainit.data.training_data import TrainingData, abstract_batch
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train.checkpoint import CheckpointStore, check_same_run
from trainit.train.state import TrainState
from trainit.train.step import CompiledSteps


@dataclass(frozen=True)
class StartPoint:
    """Where a run, or the part of it that this job does, begins."""

    state: TrainState
    step: int  # steps done
    position: DataPosition  # in the training data
    saved_step: int | None  # step of the run's own checkpoint, if it is resumed
    wandb_id: str  # of the W&B run
    postponed: dict | None  # record of `step` whose validation the job before has left to this one

    def is_validated(self, workdir: Path) -> bool:
        """Whether no validation after `step` is left to do. All processes call it together."""
        path, is_logged = workdir / "metrics.jsonl", False
        if self.postponed is not None and path.exists():
            last = (path.read_text().splitlines() or ["{}"])[-1]
            is_logged = f'"step": {self.step},' in last and '"valid/loss"' in last
        return bool(sync.agree(self.postponed is None or is_logged))


class Resume:
    """Finds the checkpoint that a run begins from, checks that it fits, and makes the first state."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        shape: RunShape,
        steps: CompiledSteps,
        checkpoints: CheckpointStore,
    ):
        """
        Args:
            config: resolved.
            data: to train on.
            shape: the run's.
            steps: its functions, of which the train step is compiled while the state is made or read.
            checkpoints: the run's own.
        """
        self._config, self._data, self._shape = config, data, shape
        self._steps, self._checkpoints = steps, checkpoints
        # All processes take the checkpoint that process 0 sees: a shared file system may show others less.
        latest = checkpoints.latest()
        self._latest = sync.agree(-1 if latest is None else latest)
        self.reads_checkpoint = self._latest >= 0 or bool(config.checkpoint.load_path)
        # Set from the meta data of the checkpoint, if there is one.
        self._position, self._config_before = START, None

    def start_point(self) -> StartPoint:
        """Makes or reads the first state.

        Raises:
            ConfigError: the checkpoint does not fit the config or the data.
        """
        meta: dict = {}
        if self._latest >= 0:
            meta = self._accept(self._checkpoints, self._latest)
            logging.info("resume     at step %d of %d", self._latest, self._config.steps)
            state = self._restore(self._checkpoints, self._latest)
        elif self._config.checkpoint.load_path:
            state = self._load()
        else:
            state = self._init()
        state = jax.block_until_ready(state)
        step = int(state.step)
        if self._config_before:
            self._data.check_resume(self._config_before, self._position, step)
        return StartPoint(
            state=state,
            step=step,
            position=self._position,
            saved_step=step if self._latest >= 0 else None,
            wandb_id=meta.get("wandb_id") or secrets.token_hex(4),
            postponed=meta.get("postponed"),
        )

    def _init(self) -> TrainState:
        self._compile_ahead(0)
        return self._steps.init()

    def _load(self) -> TrainState:
        """The state of another run's checkpoint, or a new one with its parameters."""
        c = self._config.checkpoint
        source = CheckpointStore(Path(c.load_path), read_only=True)
        available = source.steps()
        step = max(available, default=None) if c.load_step < 0 else c.load_step
        if step is None or step not in available:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} has no checkpoint of "
                f"load_step={c.load_step}; there are {available or 'none'}"
            )
        self._accept(source, step)

        # A new optimizer begins at step 0 of its schedule; the data continue where they were.
        if c.overwrite_optimizer:
            logging.info("begin      with parameters of %s step %d, new optimizer", c.load_path, step)
            new = self._init()
            params = source.restore_params(step, self._steps.abstract_state.params)
            return replace(new, params=params, diagnostics=self._steps.begin_diagnostics(params))

        if step >= self._config.steps:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} is at step {step}, steps={self._config.steps}: "
                f"nothing is left to do; raise steps, or take its parameters alone with "
                f"checkpoint.overwrite_optimizer=True"
            )
        logging.info("begin      from %s step %d", c.load_path, step)
        return self._restore(source, step)

    def _accept(self, source: CheckpointStore, step: int) -> dict:
        """The meta data of a checkpoint that fits config and data; sets the position in the data."""
        meta, c = source.meta(step), self._config
        origin = f"checkpoint {source.folder / str(step)}"
        overwrite = c.checkpoint.overwrite_config
        for line in check_same_run(meta["config"], c.to_dict(), overwrite, origin):
            logging.info("changed    %s", line)

        # The position in the data means something for the same data only.
        same_data = meta["dataset"] == self._data.fingerprint
        if not same_data and not overwrite:
            raise ConfigError(
                f"{origin} was trained on dataset {meta['dataset']}, but dataset.path={c.dataset.path!r} is "
                f"{self._data.fingerprint}; set --config.checkpoint.overwrite_config=True to continue with it"
            )
        same_order = has_same_order(meta)
        if same_data and not same_order and not overwrite:
            raise ConfigError(
                f"{origin} was trained on sequences in an order that this version of Trainit "
                f"does not have; set --config.checkpoint.overwrite_config=True to continue from the "
                f"beginning of the data, or use the version that began the run"
            )
        if same_data and same_order:
            self._position = DataPosition.from_meta(meta, c.model.context_length)
        else:
            logging.info("data       from the beginning of %s", c.dataset.path)
        self._config_before = meta["config"]
        return meta

    def _restore(self, source: CheckpointStore, step: int) -> TrainState:
        """The whole state of a checkpoint. What it lacks because the config was another begins now."""
        self._compile_ahead(step)
        state = source.restore(step, self._steps.abstract_state)
        if self._config.diagnostics.every_steps and not state.diagnostics:
            logging.info("statistics begin here: the checkpoint has none of this kind")
            state = replace(state, diagnostics=self._steps.begin_diagnostics(state.params))
        if self._steps.abstract_state.loss_scale and not state.loss_scale:
            logging.info("loss scale begins here: the checkpoint has none")
            state = replace(state, loss_scale=self._steps.begin_loss_scale())
        return state

    def _compile_ahead(self, step: int):
        """Starts to compile the step that follows `step` others, in another thread."""
        if step < self._config.steps:
            layout = batch_sharding(self._shape.device_mesh)
            batch = abstract_batch(self._data.dtype, self._shape.batch_at(step), layout)
            self._steps.train.compile_ahead(self._steps.abstract_state, batch)
