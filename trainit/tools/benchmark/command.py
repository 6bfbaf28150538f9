"""Measures the loader, the train step and its products, saves, and what parts of a run cost.

    trainit benchmark --config=configs/debug.py [--only=loader,step,save,...]
    trainit benchmark --config=configs/debug.py --sweep
    trainit benchmark --suite=cpu
    trainit benchmark --suite=gpu --minutes=8
    trainit benchmark --only=prepare --corpus=FILES
    trainit benchmark --only=generate

Times are medians over repetitions on this machine as it is; what counts is the ratios within one run.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from trainit.cluster.tuning import collect_garbage_rarely, tune_process
from trainit.config import Config, command_line, require
from trainit.config.exit_codes import DONE

DESCRIPTION = "Measures the loader, the train step and its products, saves, and what parts of a run cost."
PARTS = ("loader", "step", "save", "processes", "optimizer", "loss", "products")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_config_arguments(parser)
    add = parser.add_argument_group("what is measured").add_argument
    count, steps = command_line.number(int, 1), command_line.number(int, 3)
    add(
        "--only", default="loader,step,save", help=f"some of {', '.join(PARTS)}; or prepare or generate alone"
    )
    add("--sweep", action="store_true", help="try other settings of the step that change no result")
    add("--suite", choices=("cpu", "gpu"), help="compare other programs on the same work, or measure a GPU")
    add("--minutes", type=command_line.number(float, 0.1), default=8.0, help="longest time of --suite=gpu")
    add("--output", default="benchmark-gpu.md", help="file for the table of --suite=gpu")
    add("--corpus", default="", help="files of documents to prepare, for --only=prepare")
    add("--tokens", type=count, default=1 << 27, help="tokens of the loader's synthetic dataset")
    add("--length", type=count, default=256, help="tokens of each text, for --only=generate")
    add("--rounds", type=count, default=3, help="turns of each of the things that are compared")
    add("--steps", type=steps, default=20, help="train steps that are timed")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code."""
    only, steps, rounds = arguments.only.split(","), arguments.steps, arguments.rounds
    unknown = sorted(set(only) - {*PARTS, "prepare", "generate"})
    require(not unknown, f"--only={','.join(unknown)}: there are {', '.join(PARTS)}, prepare, generate")
    # What needs no config, and compares programs that are started without our settings.
    if arguments.suite == "cpu":
        from trainit.tools.benchmark import suite

        return suite.measure(rounds)
    if arguments.suite == "gpu":
        from trainit.tools.benchmark import card

        stopped = f"trainit: error: stopped; {arguments.output} has the table so far"
        for number in (signal.SIGINT, signal.SIGTERM):  # what it has started ends, too
            signal.signal(number, lambda *_: sys.exit(stopped))
        return card.measure(arguments.minutes, rounds, Path(arguments.output))
    if "prepare" in only:
        alone = only == ["prepare"] and arguments.corpus
        require(bool(alone), "--only=prepare stands alone and needs --corpus=FILES")
        from trainit.tools.benchmark import preparing

        return _print("prepare", preparing.measure(arguments.corpus, rounds))
    if "generate" in only:
        require(only == ["generate"], "--only=generate stands alone")
        from trainit.tools.benchmark import generating

        return _print("texts", generating.measure(arguments.length, rounds))

    # As the command that trains.
    tune_process()
    from trainit.cluster import logs
    from trainit.tools.benchmark import loader, overheads, products, step
    from trainit.train import setup

    collect_garbage_rarely()
    logs.log_to_terminal(lead=True)
    config, dataset = setup.read(command_line.load_config(arguments), arguments)
    config = _take_devices(config, arguments.debug)
    if arguments.sweep:
        return _print("sweep", step.sweep(config, dataset, steps))
    given = [f"--config.{name}={'True' if text is None else text}" for name, text in arguments.overrides]
    same_config = [f"--config={arguments.config}", *given, *["--debug"] * arguments.debug]
    measurements = {
        "loader": lambda: loader.measure(arguments.tokens),
        "step": lambda: step.measure(config, dataset, steps),
        "save": lambda: overheads.measure_save(config),
        "processes": lambda: overheads.measure_processes(steps, same_config),
        "optimizer": lambda: overheads.measure_optimizer(config, dataset, steps),
        "loss": lambda: overheads.measure_loss(config, rounds),
        "products": lambda: products.measure(config, rounds),
    }
    for name in PARTS:
        if name in only:
            _print(name, measurements[name]())
    return DONE


def _print(name: str, lines: Iterable[str]) -> int:
    """Prints what a measurement finds, as soon as it is found; returns the exit code."""
    for line in lines:
        print(f"{name:7} {line}", flush=True)
    return DONE


def _take_devices(config: Config, debug: bool) -> Config:
    """Starts JAX as a run in one process would, and prints the devices. Returns the config for these devices.

    With `debug`, its mesh may shrink to the devices.
    """
    import jax

    from trainit.cluster import devices
    from trainit.cluster.place import Place
    from trainit.parallel.mesh import mesh_sizes

    devices.configure(config.platform, config.cpu_devices, command_line.cache())
    devices.initialize(config.platform, Place("alone"))
    kind, cores = jax.devices()[0].device_kind, os.cpu_count()
    print(f"{jax.device_count()} × {kind}, {cores} cores, JAX {jax.__version__}", flush=True)
    sizes = mesh_sizes(config, jax.device_count(), shrink_to_fit=debug)
    return Config({**config.to_dict(), "mesh": sizes})
