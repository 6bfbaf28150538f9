"""The measurements of the benchmark, by the names that --only takes."""

import argparse
import os
from collections.abc import Collection

import jax

from trainit import cli
from trainit.cluster import devices
from trainit.cluster.place import Place
from trainit.config import Config
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import run_shape
from trainit.tools.benchmark import loader, overheads, step


def take_devices(config: Config, debug: bool) -> Config:
    """Starts JAX as a run in one process would, and prints the devices. Returns the config for these devices.

    Args:
        config: resolved.
        debug: whether its mesh may shrink to the devices.
    """
    devices.configure(config.platform, config.cpu_devices, cli.cache())
    devices.initialize(config.platform, Place("alone"))
    device = jax.devices()[0]
    print(f"{jax.device_count()} × {device.device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")
    sizes = run_shape(config, jax.devices(), shrink_to_fit=debug).sizes
    return Config({**config.to_dict(), "mesh": dict(sizes)})


def measure(names: Collection[str], config: Config, dataset: TrainingData, arguments: argparse.Namespace):
    """Makes some of the measurements and prints a few lines about each.

    Args:
        names: some of the command's PARTS; their order does not count.
        config: resolved.
        dataset: the config's.
        arguments: the command's flags, for tokens, steps, rounds and the config of other processes.
    """
    tokens, steps, rounds = arguments.tokens, arguments.steps, arguments.rounds
    given = [f"--config.{name}={'True' if text is None else text}" for name, text in arguments.overrides]
    same_config = [f"--config={arguments.config}", *given, *["--debug"] * arguments.debug]
    measurements = {
        "loader": lambda: loader.measure(tokens),
        "step": lambda: step.measure(config, dataset, steps),
        "save": lambda: overheads.measure_save(config),
        "processes": lambda: overheads.measure_processes(steps, same_config),
        "optimizer": lambda: overheads.measure_optimizer(config, steps),
        "loss": lambda: overheads.measure_loss(config, rounds),
    }
    for name, measurement in measurements.items():
        if name in names:
            measurement()
