"""From what a config file says to a config that is checked and data that is open."""

import argparse
from pathlib import Path

from trainit import optimizers
from trainit.checkpoints.convert.pretrained import Pretrained, is_pretrained
from trainit.config import Config, ConfigDict, ConfigError, command_line, resolve, shrink
from trainit.data import training_data
from trainit.data.formats import detect
from trainit.data.training_data import TrainingData
from trainit.prepare.demo import prepare_demo
from trainit.train import tasks
from trainit.train.profiling import tracer


def read(config: ConfigDict, arguments: argparse.Namespace) -> tuple[Config, TrainingData]:
    """Resolves a config and opens its data, before any device. With --debug, shrinks it first, in place."""
    # A model that another program wrote fills the fields of it that are left open.
    load_path = "" if arguments.debug else config.checkpoint.load_path
    pretrained = Pretrained(load_path) if is_pretrained(load_path) else None
    if pretrained:
        pretrained.fill(config)

    folder, is_prepared = config.dataset.path, "streams" not in config.dataset
    if arguments.debug:
        shrink(config, [name for name, _ in arguments.overrides])
        if is_prepared and not Path(folder).is_dir() and not detect.find(Path(folder)):
            folder = "demo"
            config.dataset.update(path=folder, mixture="", tokenizer="", validation_path="", end_of_text="")
    if folder == "demo" and is_prepared:
        try:
            folder = str(prepare_demo(command_line.cache()))
        except OSError as error:
            where = f"dataset.path='demo': the cache {command_line.cache()}"
            raise ConfigError(f"{where} cannot be used: {error}; TRAINIT_CACHE= names another") from None

    def resolved(config: ConfigDict, vocab_size: int, end_of_text: int) -> Config:
        frozen = resolve(config, vocab_size, end_of_text)
        optimizers.check(frozen)
        tracer.ranges(frozen)
        return frozen

    for given in config.eval.tasks:
        tasks.read(given)  # what is wrong with them is reported before anything waits
    config, data = training_data.read(config, folder, resolved, command_line.cache())
    if pretrained:
        pretrained.check_tokenizer(data.tokenizer)
    return config, data
