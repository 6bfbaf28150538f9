"""What a config's train step costs on a number of GPUs: memory, what devices exchange, time, MFU.

    trainit plan --config=configs/pile_gpt.py:model=llama2_7b --devices=8,64

The real step is compiled for these GPUs if JAX's CUDA plugin is installed (no GPU is needed), or else for as
many virtual CPU devices. What they exchange is compared with the formula, which is used alone above
--compile_up_to devices.
"""

import argparse
import os

from trainit import cli
from trainit import config as config_lib
from trainit.cluster.process import DONE
from trainit.config import Config, ConfigDict, require
from trainit.experiments.plan.targets import TARGETS

DESCRIPTION = "Predicts memory, what devices exchange, time and MFU of a config's train step on GPUs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    cli.add_config_arguments(parser)
    add = parser.add_argument_group("plan").add_argument
    number, fraction = cli.number(int, 0), cli.number(float, 0.01, 1)
    add("--devices", metavar="N[,N...]", default="8", help="GPUs of the job, or several numbers of them")
    rows = "sequences of a step on each part of data × fsdp, instead of batch_size; 0: batch_size"
    add("--rows", type=number, default=0, help=rows)
    add("--gpu", choices=TARGETS, default="H100", help="kind of GPU")
    add("--efficiency", type=fraction, default=0.6, help="fraction of the peak that computation reaches")
    bound = "maximum of virtual devices for which the step is compiled"
    add("--compile_up_to", type=number, default=512, help=bound)


def run(arguments: argparse.Namespace) -> int:
    """Prints a plan for each number of devices; returns the exit code."""
    numbers = arguments.devices.split(",")
    require(
        all(number.isdecimal() and int(number) for number in numbers),
        f"--devices={arguments.devices}: write numbers above 0, as 8,64",
    )
    counts = [int(number) for number in numbers]
    config = cli.load_config(arguments)
    from trainit.cluster import devices
    from trainit.experiments.plan import gpu, report
    from trainit.experiments.plan.plan import plan

    compiled = [count for count in counts if count <= arguments.compile_up_to]
    environment, missing = dict(os.environ), gpu.missing()
    devices.configure("cpu", max(compiled, default=1) if missing else 1, cli.cache())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    plans = []
    for count in counts:
        resolved = _resolve(config.copy_and_resolve_references(), count, arguments)
        compiles = "" if count not in compiled else "CPU" if missing else "GPU"
        plans.append(plan(resolved, count, arguments.gpu, arguments.efficiency, compiles, environment))
        print(report.describe(plans[-1], missing), flush=True)
    if len(plans) > 1:
        print(report.table(plans))
    return DONE


def _resolve(config: ConfigDict, count: int, arguments: argparse.Namespace) -> Config:
    """The resolved config for this number of devices. If it has a vocabulary, no dataset is needed."""
    from trainit.parallel.mesh import mesh_sizes

    if arguments.rows:
        config.batch_size = arguments.rows * count  # which every mesh can share
        sizes = mesh_sizes(config, count)
        config.batch_size = arguments.rows * sizes["data"] * sizes["fsdp"]
    if config.model.vocab_size:
        return config_lib.resolve(config, config.model.vocab_size)
    return cli.read(config, arguments)[0]
