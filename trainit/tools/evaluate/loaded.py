"""A trained model on this machine's devices, with data to evaluate it on."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging

from trainit import cli, config, optimizers, tokenizers
from trainit.cluster import devices
from trainit.config import Config, ConfigDict, ConfigError
from trainit.convert.pretrained import Pretrained, is_pretrained
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import RunShape, run_shape
from trainit.train import step as train_step
from trainit.train.evaluate import Validation
from trainit.train.finished.run import FinishedRun, open_run
from trainit.train.step import CompiledSteps

ROWS = 8  # sequences of a device at once


@dataclass(frozen=True)
class LoadedModel:
    """The parameters of a model on the mesh that its config asks for, and the functions of its steps."""

    config: Config
    shape: RunShape
    steps: CompiledSteps
    params: dict
    data: TrainingData
    step: int | None  # of the checkpoint; None: it is of another program

    def validate(self) -> dict[str, float]:
        """The metrics that a training run logs when it validates these parameters."""
        metrics = Validation(self.config, self.data, self.shape, self.steps).measure(self.params)
        assert metrics is not None
        return metrics


def load(source: str, step: int | None, dataset: str | None, overrides: Sequence, cache: Path) -> LoadedModel:
    """Loads a run's folder, or hf:FOLDER, with fields of the config set as on a command line.

    `dataset` is a choice of that group; None: the run's own. Raises ConfigError if model and data do not fit.
    """
    platform = config.defaults()  # before anything uses devices
    cli.set_fields(platform, [given for given in overrides if given[0] in ("platform", "cpu_devices")])
    devices.configure(platform.platform, platform.cpu_devices, cache)
    run = None if is_pretrained(source) else open_run(Path(source), step)
    wanted = _config(run, source, dataset)
    cli.set_fields(wanted, overrides)
    wanted.batch_size = ROWS * jax.device_count()
    if "streams" in wanted.dataset:
        wanted.dataset.streams = 1
    resolved, data = cli.read(wanted, argparse.Namespace(debug=False, overrides=()))
    if run:
        _check_tokenizer(run, data.tokenizer, cache)

    shape = run_shape(resolved, jax.devices())
    steps = train_step.build(resolved, shape)
    layout = steps.abstract_state.params
    params = run.store.restore_params(run.step, layout) if run else Pretrained(source).parameters(layout)
    return LoadedModel(resolved, shape, steps, params, data, run.step if run else None)


def _config(run: FinishedRun | None, source: str, dataset: str | None) -> ConfigDict:
    """A config of the run's model, precision and data, that is otherwise as `defaults` has it."""
    wanted = config.defaults()
    wanted.optimizer = optimizers.choices()["adamw"]()  # which is not used
    wanted.device_batch_size = ROWS
    if run is None:
        wanted.checkpoint.load_path = source
    else:
        saved = run.config.to_dict()
        wanted.update({name: saved[name] for name in ("precision", "precision_of", "seed", "model", "eval")})
        if "streams" in saved["dataset"]:
            wanted.dataset = config.DATASETS["jsonl"]()
        wanted.dataset.update(saved["dataset"])
    if dataset:
        wanted.dataset = config.DATASETS[dataset]()
    return wanted


def _check_tokenizer(run: FinishedRun, tokenizer: tokenizers.Tokenizer, cache: Path) -> None:
    """Raises ConfigError if the data's tokenizer is another than the run's, where that is still there."""
    try:
        own = run.tokenizer("", cache)
    except ConfigError as error:
        logging.warning("tokenizer  that of the run cannot be compared with that of the data: %s", error)
        return
    if own is not None:
        tokenizers.check_same(tokenizer, own, f"run {run.workdir}")
