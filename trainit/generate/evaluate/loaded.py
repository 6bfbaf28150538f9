"""A trained model on this machine's devices, with data to evaluate it on."""

import argparse
from dataclasses import dataclass

import jax
from absl import logging

from trainit import config, optimizers, tokenizers
from trainit.checkpoints.finished_run import FinishedRun, PretrainedModel, open_model
from trainit.cluster import devices
from trainit.config import Config, ConfigDict, ConfigError, command_line, require
from trainit.data.jsonl.dataset import is_chat
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import RunShape
from trainit.tokenizers import Tokenizer
from trainit.train import setup
from trainit.train import step as train_step
from trainit.train.automatic import choice
from trainit.train.evaluate import Validation
from trainit.train.step import CompiledSteps

ROWS = 8  # sequences of a device at once


@dataclass(frozen=True)
class LoadedModel:
    """The parameters of a model on the mesh that its config asks for, and the functions of its steps."""

    source: FinishedRun | PretrainedModel
    config: Config
    shape: RunShape
    steps: CompiledSteps
    params: dict
    tokenizer: Tokenizer
    data: TrainingData | None

    def validate(self) -> dict[str, float]:
        """The metrics that a training run logs when it validates these parameters on the data."""
        assert self.data is not None
        metrics = Validation(self.config, self.data, self.shape, self.steps).measure(self.params)
        assert metrics is not None
        return metrics


def load(arguments: argparse.Namespace, needs_data: bool = True) -> LoadedModel:
    """Loads what the flags of the command say. Raises ConfigError if model and data do not fit.

    Without data, fields of the dataset mean nothing.
    """
    overrides, cache = arguments.overrides, command_line.cache()
    platform = config.defaults()  # before anything uses devices
    command_line.set_fields(
        platform, [given for given in overrides if given[0] in ("platform", "cpu_devices")]
    )
    devices.configure(platform.platform, platform.cpu_devices, cache)
    model = open_model(arguments.run, arguments.step)
    wanted = _config(model.config, arguments.dataset)
    command_line.set_fields(wanted, overrides)
    wanted.batch_size = ROWS * jax.device_count()
    if "streams" in wanted.dataset:
        wanted.dataset.streams = 1
    data = None
    if needs_data:
        resolved, data = setup.read(wanted, argparse.Namespace(debug=False, overrides=()))
        tokenizer = data.tokenizer
        _check_tokenizer(model, tokenizer, arguments.tokenizer)
    else:
        own = model.tokenizer(arguments.tokenizer, cache)
        require(own is not None, "--tokenizer=none: tasks need a tokenizer; name the model's")
        assert own is not None
        resolved, tokenizer = config.resolve(wanted, own.vocab_size, own.end_of_text), own

    resolved, shape, _ = choice.on_devices(resolved)
    steps = train_step.build(resolved, shape)
    params = model.parameters(steps.abstract_state.params)
    return LoadedModel(model, resolved, shape, steps, params, tokenizer, data)


def _config(own: Config, dataset: str | None) -> ConfigDict:
    """A config of a model, its precision and data, that is otherwise as `defaults` has it."""
    wanted, saved = config.defaults(), own.to_dict()
    wanted.optimizer = optimizers.choices()["adamw"]()  # which is not used
    wanted.device_batch_size = ROWS
    wanted.update({name: saved[name] for name in ("precision", "precision_of", "seed", "model", "eval")})
    if "streams" in saved["dataset"]:
        wanted.dataset = config.DATASETS["chat" if is_chat(saved["dataset"]) else "jsonl"]()
    wanted.dataset.update(saved["dataset"])
    wanted.dataset.whole_batches = False  # of what is trained on, in other batches than these
    if dataset:
        wanted.dataset = config.DATASETS[dataset]()
        if "streams" in wanted.dataset and "streams" in saved["dataset"]:
            wanted.dataset.update(tokenizer=own.dataset.tokenizer, end_of_text=own.dataset.end_of_text)
    return wanted


def _check_tokenizer(model: FinishedRun | PretrainedModel, tokenizer: Tokenizer, choice: str) -> None:
    """Raises ConfigError if the data's tokenizer is another than the model's, where that is still there."""
    try:
        own = model.tokenizer(choice, command_line.cache())
    except ConfigError as error:
        logging.warning("tokenizer  that of the model cannot be compared with that of the data: %s", error)
        return
    if own is not None:
        tokenizers.check_same(tokenizer, own, model.name)
