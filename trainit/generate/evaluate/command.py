"""The validation loss of a finished run, or of a model that `transformers` reads, on any data.

trainit evaluate runs/debug
trainit evaluate hf:models/pythia --dataset=jsonl --config.dataset.validation_path=books.jsonl
"""

import argparse
import importlib.util
import json
import math
from typing import TYPE_CHECKING

from trainit.cluster import logs
from trainit.config import DATASETS, ConfigError, command_line
from trainit.config.exit_codes import DONE

if TYPE_CHECKING:
    from trainit.generate.evaluate.loaded import LoadedModel

DESCRIPTION = "The validation loss of a trained model, by subset, on any data that the trainer reads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_finished_run_arguments(parser)
    add = parser.add_argument_group("data").add_argument
    kinds = "another kind of data than the run's; its fields are set by --config.dataset.FIELD"
    add("--dataset", choices=DATASETS, default=None, help=kinds)
    example = "sets a field, e.g. --config.eval.sequences=0 for all of the data"
    add("--config.FIELD", metavar="VALUE", default=argparse.SUPPRESS, help=example)
    add = parser.add_argument_group("tasks of lm-evaluation-harness (package lm-eval)").add_argument
    add("--tasks", metavar="NAME[,NAME...]", default="", help="run these, in place of a validation")
    add("--include_path", metavar="FOLDER", default="", help="more tasks, in YAML, as of lm_eval")
    add(
        "--limit",
        type=command_line.number(int, 1),
        default=None,
        help="documents of each task; by default all",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one object of JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Prints the metrics, and returns the exit code."""
    logs.log_to_terminal(lead=not arguments.json)
    from trainit.generate.evaluate.loaded import load

    model = load(arguments, needs_data=not arguments.tasks)
    if arguments.tasks:
        return _tasks(model, arguments)
    metrics = model.validate()
    assert model.data is not None
    if arguments.json:
        about = {"model": arguments.run, "step": model.source.step, "data": model.data.source}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        print(json.dumps(about | finite))
        return DONE
    print(f"{model.source.name}, on {model.data.source}")
    print(_table(metrics))
    for name, value in metrics.items():
        if name.startswith("tasks/"):
            print(f"{name.removeprefix('tasks/')}  {value:.4f}")
    return DONE


def _tasks(model: "LoadedModel", arguments: argparse.Namespace) -> int:
    """Runs tasks of lm-evaluation-harness, and prints what it prints."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'trainit[tasks]'")
    from trainit.generate.evaluate import harness

    results, table = harness.run(model, arguments.tasks, arguments.include_path, arguments.limit)
    print(json.dumps(results) if arguments.json else table)
    return DONE


def _table(metrics: dict[str, float]) -> str:
    """A row for all of the data, and one for each subset."""
    from tabulate import tabulate

    rows = [["all", metrics["valid/loss"], metrics["valid/bits_per_byte"], metrics["valid/accuracy"]]]
    for name, loss in metrics.items():
        if name.startswith("valid/loss/"):
            subset = name.removeprefix("valid/loss/")
            rows.append([subset, loss, metrics.get(f"valid/bits_per_byte/{subset}", math.nan)])
    headers = ["", "nats per token", "bits per byte", "accuracy"]
    return tabulate(rows, headers, floatfmt=".4f", disable_numparse=[0])
