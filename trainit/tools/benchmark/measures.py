"""What the benchmark measures, by the names that --only takes."""

import os
from collections.abc import Collection

import jax

from trainit import cli
from trainit.cluster import devices
from trainit.cluster.place import Place
from trainit.config import Config, ConfigError
from trainit.data.training_data import TrainingData
from trainit.tools.benchmark import loader, overheads, preparing, step

PARTS = ("loader", "step", "save", "processes", "optimizer", "loss")


def take_devices(config: Config):
    """Starts JAX as a run in one process would, and prints the devices."""
    devices.configure(config.platform, config.cpu_devices, cli.cache())
    devices.initialize(config.platform, Place("alone"))
    device = jax.devices()[0]
    print(f"{jax.device_count()} × {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")


def measure(
    names: Collection[str], config: Config, dataset: TrainingData, tokens: int, steps: int, rounds: int
):
    """Measures some of PARTS, in their order, and prints a few lines about each.

    Args:
        names: of PARTS.
        config: resolved.
        dataset: that it names.
        tokens: of the synthetic dataset that the loader reads.
        steps: train steps that are timed.
        rounds: how often each of the things that are compared gets its turn.
    """
    measures = {
        "loader": lambda: loader.measure(tokens),
        "step": lambda: step.measure(config, dataset, steps),
        "save": lambda: overheads.measure_save(config),
        "processes": lambda: overheads.measure_processes(steps),
        "optimizer": lambda: overheads.measure_optimizer(config, steps),
        "loss": lambda: overheads.measure_loss(config, rounds),
    }
    for part in PARTS:
        if part in names:
            measures[part]()


def measure_prepare(corpus: str, rounds: int):
    """Measures preparing a corpus, without a config and without JAX.

    Raises:
        ConfigError: there is no such corpus, or it cannot be prepared.
    """
    try:
        for line in preparing.measure(corpus, rounds=rounds):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
