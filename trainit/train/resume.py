"""Where a run begins: anew, at its own newest checkpoint, or at another run's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from absl import logging

from trainit.config import Config, ConfigError
from trainit.data.loader import START, DataPosition
from trainit.data.training_data import TrainingData
from trainit.train import step
from trainit.train.checkpoint import CheckpointStore, check_same_run
from trainit.train.state import TrainState


class Resume:
    """Finds a run's first state; `position` then says where it is in the data.

    Both of its ways raise ConfigError where the checkpoint does not fit the config or the dataset.
    """

    def __init__(
        self,
        config: Config,
        dataset: TrainingData,
        steps: step.CompiledSteps,
        compile_ahead: Callable[[int], None],
    ):
        """
        Args:
            config: resolved.
            dataset: to train on.
            steps: of the run.
            compile_ahead: is told behind which step the run begins, before the state is made or read.
        """
        self._config, self._dataset, self._steps = config, dataset, steps
        self._compile_ahead = compile_ahead
        self.position = START  # in the training data
        self.trained_as: dict | None = None  # config of the checkpoint
        self.meta: dict = {}  # of the run's own checkpoint

    def begin(self) -> TrainState:
        """A new state, or that of another run's checkpoint."""
        c = self._config.checkpoint
        if not c.load_path:
            self._compile_ahead(0)
            return self._steps.init()
        source = CheckpointStore(Path(c.load_path), read_only=True)
        steps = source.steps()
        number = max(steps, default=None) if c.load_step < 0 else c.load_step
        if number not in steps:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} has no checkpoint of "
                f"load_step={c.load_step}; there are {steps or 'none'}"
            )
        self._accept(source, number)
        if c.overwrite_optimizer:
            logging.info("begin      with parameters of %s step %d, new optimizer", c.load_path, number)
            self._compile_ahead(0)
            fresh = self._steps.init()
            layout = self._steps.abstract_state.params
            params = source.restore_params(number, layout)
            return replace(fresh, params=params, diagnostics=self._steps.begin_diagnostics(params))
        if number >= self._config.steps:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} is at step {number}, steps={self._config.steps}: "
                f"nothing is left to do; raise steps, or take its parameters alone with "
                f"checkpoint.overwrite_optimizer=True"
            )
        logging.info("begin      from %s step %d", c.load_path, number)
        return self._restore(source, number)

    def resume(self, checkpoints: CheckpointStore, number: int) -> TrainState:
        """The state of the run's own checkpoint of this step; its meta data are in `meta`."""
        self.meta = self._accept(checkpoints, number)
        logging.info("resume     at step %d of %d", number, self._config.steps)
        return self._restore(checkpoints, number)

    def _restore(self, source: CheckpointStore, number: int) -> TrainState:
        self._compile_ahead(number)
        state = source.restore(number, self._steps.abstract_state)
        if self._config.diagnostics.every_steps and not state.diagnostics:
            logging.info("statistics begin here: the checkpoint has none of this kind")
            state = replace(state, diagnostics=self._steps.begin_diagnostics(state.params))
        if self._steps.abstract_state.loss_scale and not state.loss_scale:
            logging.info("loss scale begins here: the checkpoint has none")
            state = replace(state, loss_scale=self._steps.begin_loss_scale())
        return state

    def _accept(self, source: CheckpointStore, number: int) -> dict:
        """The meta data of a checkpoint of this config and dataset; sets the position in the data."""
        meta, c = source.meta(number), self._config
        origin = f"checkpoint {source.folder / str(number)}"
        overwrite = c.checkpoint.overwrite_config
        for line in check_same_run(meta["config"], c.to_dict(), overwrite, origin):
            logging.info("changed    %s", line)
        if meta["dataset"] != self._dataset.fingerprint and not overwrite:
            raise ConfigError(
                f"{origin} was trained on dataset {meta['dataset']}, but dataset.path={c.dataset.path!r} is "
                f"{self._dataset.fingerprint}; set --config.checkpoint.overwrite_config=True to go on with it"
            )
        if meta["dataset"] == self._dataset.fingerprint:  # else from the start of the new one
            self.position = DataPosition.from_meta(meta, c.model.context_length)
        else:
            logging.info("data       from the beginning of %s", c.dataset.path)
        self.trained_as = meta["config"]
        return meta
