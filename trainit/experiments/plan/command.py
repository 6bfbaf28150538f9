"""What a config's train step costs on a number of GPUs: memory, what devices exchange, time, MFU.

    trainit plan --config=configs/pile_gpt.py:model=llama2_7b --devices=8,64

The real step is compiled for these GPUs if JAX's CUDA plugin is installed (no GPU is needed), or else for as
many virtual CPU devices. What they exchange is compared with the formula, which is used alone above
--compile_up_to devices.
"""

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainit import config as config_lib
from trainit.config import Config, ConfigDict, ConfigError, command_line, require
from trainit.config.exit_codes import DONE
from trainit.experiments.plan.targets import TARGETS

if TYPE_CHECKING:
    from trainit.experiments.plan.plan import Plan

DESCRIPTION = "Predicts memory, what devices exchange, time and MFU of a config's train step on GPUs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_config_arguments(parser)
    add = parser.add_argument_group("plan").add_argument
    number, fraction = command_line.number(int, 0), command_line.number(float, 0.01, 1)
    many = "GPUs of the job, or several numbers of them; by default 8, or with tokens or hours as few as fit"
    add("--devices", metavar="N[,N...]", default="", help=many)
    rows = "sequences of a step on each part of data × fsdp, instead of batch_size; 0: batch_size"
    add("--rows", type=number, default=0, help=rows)
    add("--gpu", choices=TARGETS, default="H100", help="kind of GPU")
    add("--efficiency", type=fraction, default=0.6, help="fraction of the peak that computation reaches")
    bound = "maximum of devices for which the step is compiled"
    add("--compile_up_to", type=number, default=512, help=bound)
    choices = "compile each choice of model.remat, for a table of memory and time"
    add("--sweep", action="store_true", help=choices)
    positive = command_line.number(float, 0)
    tokens = "tokens of a run whose hours and GPU-hours are printed; 0: the config's"
    add("--tokens", type=positive, default=0, help=tokens)
    hours = "GPU-hours that may be spent; also prints how many tokens they are enough for"
    add("--budget-hours", "--budget_hours", type=positive, default=0, help=hours)


def run(arguments: argparse.Namespace) -> int:
    """Prints a plan for each number of devices; returns the exit code."""
    numbers = arguments.devices.split(",") if arguments.devices else []
    require(
        all(number.isdecimal() and int(number) for number in numbers),
        f"--devices={arguments.devices}: write numbers above 0, as 8,64",
    )
    config = command_line.load_config(arguments)
    from trainit.cluster import devices
    from trainit.experiments.plan import budget, gpu, report, sweep

    environment, missing = dict(os.environ), gpu.missing()
    require(not (arguments.sweep and missing), f"--sweep compiles for GPUs, but {missing}")
    asks = bool(arguments.tokens or arguments.budget_hours)
    counts = [int(number) for number in numbers] or list(budget.COUNTS if asks else (8,))
    compiled = max((count for count in counts if count <= arguments.compile_up_to), default=1)
    devices.configure("cpu", compiled if missing else 1, command_line.cache())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    plans = []
    for count in counts:
        try:
            resolved = _resolve(config.copy_and_resolve_references(), count, arguments)
            plans.append(_plan(resolved, count, arguments, environment, missing))
        except ConfigError as error:
            if numbers or not asks or (count == counts[-1] and not plans):
                raise
            print(f"{count} GPUs: {error}", flush=True)  # such as a mesh or a batch that they cannot share
            continue
        print(report.describe(plans[-1], missing), flush=True)
        if arguments.sweep:
            print(sweep.table(resolved, count, arguments.gpu, environment), flush=True)
        if asks and not numbers and budget.fits(plans[-1]) is not False:
            break
    if len(plans) > 1:
        print(report.table(plans))
    if asks:
        print(budget.describe(plans, arguments.tokens, arguments.budget_hours))
    return DONE


def _plan(
    config: Config, count: int, arguments: argparse.Namespace, environment: Mapping[str, str], missing: str
) -> "Plan":
    from trainit.experiments.plan.plan import plan

    compiles = "" if count > arguments.compile_up_to else "CPU" if missing else "GPU"
    return plan(config, count, arguments.gpu, arguments.efficiency, compiles, environment)


def _resolve(config: ConfigDict, count: int, arguments: argparse.Namespace) -> Config:
    """The resolved config for this number of devices. If it has a vocabulary, no dataset is needed."""
    from trainit.parallel.mesh import mesh_sizes

    if arguments.rows:
        config.batch_size = arguments.rows * count  # which every mesh can share
        sizes = mesh_sizes(config, count)
        config.batch_size = arguments.rows * sizes["data"] * sizes["fsdp"]
    if config.model.vocab_size:
        return config_lib.resolve(config, config.model.vocab_size)
    from trainit.train import setup

    return setup.read(config, arguments)[0]
