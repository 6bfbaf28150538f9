"""Measures the loader, the train step, blocking saves, and what processes, optimizers and logits cost.

    trainit benchmark --config=configs/debug.py [--only=loader,step,save,...]
    trainit benchmark --config=configs/debug.py --sweep
    trainit benchmark --suite=cpu
    trainit benchmark --only=prepare --corpus=FILES

Times are medians over repetitions on this machine as it is; what counts is the ratios within one run.
"""

import argparse

from trainit import cli
from trainit.cluster.process import DONE, tune_process
from trainit.config import require

DESCRIPTION = "Measures the loader, the train step, saves, and what processes, optimizers and logits cost."
PARTS = ("loader", "step", "save", "processes", "optimizer", "loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    cli.add_config_arguments(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--only",
        default="loader,step,save",
        help=f"some of {', '.join(PARTS)}; or prepare alone",
    )
    add("--sweep", action="store_true", help="try other settings of the step that change no result")
    add("--suite", choices=("cpu", "gpu"), help="compare other programs on the same work; needs no config")
    add("--corpus", default="", help="files of documents to prepare, for --only=prepare")
    add("--tokens", type=cli.number(int, 1), default=1 << 27, help="tokens of the loader's synthetic dataset")
    add("--rounds", type=cli.number(int, 1), default=3, help="turns of each of the things that are compared")
    add("--steps", type=cli.number(int, 3), default=20, help="train steps that are timed")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code."""
    only = arguments.only.split(",")
    unknown = sorted(set(only) - {*PARTS, "prepare"})
    require(not unknown, f"--only={','.join(unknown)}: there are {', '.join(PARTS)}, prepare")
    # What needs no config, and compares programs that are started without our settings.
    if arguments.suite:
        from trainit.tools.benchmark import suite

        return suite.measure(arguments.suite, arguments.rounds)
    if "prepare" in only:
        alone = only == ["prepare"] and arguments.corpus
        require(bool(alone), "--only=prepare stands alone and needs --corpus=FILES")
        from trainit.tools.benchmark import preparing

        preparing.measure(arguments.corpus, arguments.rounds)
        return DONE

    # As the command that trains.
    tune_process()
    from trainit import logs
    from trainit.tools.benchmark import measures, step

    logs.log_to_terminal(lead=True)
    config, dataset = cli.read(cli.load_config(arguments), arguments)
    config = measures.take_devices(config, arguments.debug)
    if arguments.sweep:
        step.sweep(config, dataset, arguments.steps)
    else:
        measures.measure(only, config, dataset, arguments)
    return DONE
