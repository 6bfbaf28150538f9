"""The command `trainit`: finds the sub-command and runs it.

Each is a module with a DESCRIPTION, add_arguments(parser) and run(arguments), which returns the exit code and
imports what takes seconds, so that --help is answered at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from trainit import __version__
from trainit.cluster import files, tuning
from trainit.cluster.process import block_stop_signals, outlive_readers
from trainit.config import ConfigError, command_line
from trainit.config.exit_codes import DONE, FAILED, USAGE

COMMANDS = {
    "train": "train a model, or resume a run that has stopped",
    "prepare": "turn text into token ids on disk",
    "compare": "compare runs: tables, curves, a page",
    "sweep": "start many runs from one file, and compare them",
    "generate": "continue texts with a run's model",
    "export": "write a run's model as a folder that transformers loads",
    "import": "make a run of a model in such a folder",
    "evaluate": "measure a trained model's loss on any data",
    "verify": "compare a run's checkpoints, or prepared data, with their digests",
    "replay": "do steps of a run again, and compare losses and norms with its log",
    "plan": "predict memory, communication and time on many GPUs",
    "benchmark": "measure the loader, the train step and saves on this machine",
    "doctor": "check a config, the processes and the machines before a run",
    "init": "write a folder with configs, launch scripts and an optimizer to start from",
    "fields": "list the fields of configs, with default, bounds and meaning",
    "completion": "print a script with which a shell completes all of this",
}
HELP = f"""usage: trainit COMMAND ...    (python -m trainit COMMAND ... is the same)

Trainit {__version__} pre-trains GPT models with JAX on many hosts.

{chr(10).join(f"  {name:11}{text}" for name, text in COMMANDS.items())}

`trainit COMMAND --help` lists the flags of a command. A first run: trainit train --config=configs/debug.py
"""


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line, by default that of this process: the exit code."""
    if given is None:
        outlive_readers(lasting=sys.argv[1:2] == ["train"])
    name, *rest = given if given is not None else sys.argv[1:] or [""]
    if name in ("-h", "--help", "help", "--version"):
        print(f"trainit {__version__}\n" if name == "--version" else HELP, end="")
        return DONE
    if name == "train":
        tuning.tune_process()
        block_stop_signals()  # the imports that follow take seconds; signals wait until JobMonitor listens
    try:
        if name not in COMMANDS:
            raise ConfigError(_unknown(name))
        arguments = command_parser(name).parse(rest)
        code = int(_module(name).run(arguments))
        sys.stdout.flush()  # what cannot be written is an error below
        return code
    except ConfigError as error:
        command_line.print_error(error)
        return USAGE
    except OSError as error:
        command_line.print_error(files.describe_os_error(error))
        return FAILED


def command_parser(name: str) -> command_line.Parser:
    """The parser of a sub-command."""
    if name == "train":
        return command_line.train_parser("trainit train")
    module = _module(name)
    parser = command_line.Parser(f"trainit {name}", module.DESCRIPTION)
    module.add_arguments(parser)
    if name == "completion":  # which completes the flags of all commands
        parser.set_defaults(commands=COMMANDS, command_parser=command_parser)
    return parser


def _module(name: str):
    path = {"train": "main", "prepare": "prepare.command", "generate": "generate.command"}
    path |= {"export": "checkpoints.convert.export", "import": "checkpoints.convert.import_model"}
    path |= {name: f"tools.{name}" for name in ("completion", "fields", "init", "verify")}
    path |= {"evaluate": "generate.evaluate.command"}
    path |= {name: f"experiments.{name}.command" for name in ("compare", "sweep", "plan")}
    return importlib.import_module(f"trainit.{path.get(name, f'tools.{name}.command')}")


def _unknown(name: str) -> str:
    is_config = name.startswith("--config") or name.endswith(".py")
    near = ["train"] if is_config else difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    what = f"unknown command {name!r}" if name else "the command is missing"
    hint = f"did you mean trainit {near[0]}?" if near else f"it is one of {', '.join(COMMANDS)}."
    return f"{what}; {hint} See trainit --help"


if __name__ == "__main__":
    sys.exit(main())
