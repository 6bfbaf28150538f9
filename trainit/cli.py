"""What commands share: --config with its overrides, where a process stands, errors of one line, exit codes.

    --config=FILE:group=choice,... --config.field=value ... [--debug]

Modules that take seconds to import, such as JAX, are imported inside functions, so that --help and wrong
flags are answered at once.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags

from trainit import config as config_lib
from trainit.cluster.place import Place, find_place
from trainit.cluster.process import USAGE
from trainit.config import Config, ConfigDict, ConfigError

if TYPE_CHECKING:
    from trainit.data.training_data import TrainingData

_OVERRIDE = re.compile(r"--(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)
_NUMBER = re.compile(r"-\d")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults only where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if type(action.default) in (int, float) else action.dest.upper()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the nearest flag. It knows --config.FIELD=VALUE."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with a hint at --help."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the values of all flags; `overrides` has those of --config.FIELD: (name, text or None)."""
        # Libraries refuse to work, e.g. Grain in its worker processes, unless absl's flags are parsed.
        flags.FLAGS.mark_as_parsed()
        rest, overrides = _split_overrides(arguments)
        values, unknown = self.parse_known_args(rest)
        if overrides and not hasattr(values, "config"):
            unknown.append(f"--config.{overrides[0][0]}")
        if unknown and unknown[0].startswith("-"):
            known = [*self._option_string_actions, *("--config.",) * hasattr(values, "config")]
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0] + 'FIELD' * near[0].endswith('.')}?" if near else ""
            self.error(f"unknown flag {name}{hint}")
        if unknown:
            self.error(f"{unknown[0]!r} is no flag: options start with --")
        values.overrides = overrides
        return values


def parse_or_exit(parser: Parser) -> argparse.Namespace:
    """Returns the flags of this process. Wrong ones are printed as one line, and end it."""
    try:
        return parser.parse(sys.argv[1:])
    except ConfigError as error:
        print_error(error)
        sys.exit(USAGE)


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Splits --config.NAME=VALUE, --config.NAME VALUE and --noconfig.NAME from the other arguments."""
    rest, overrides, queue = [], [], list(arguments)
    while queue:
        argument = queue.pop(0)
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            rest.append(argument)
            continue
        negated, name, value = match.groups()
        if negated:
            value = "False"
        elif value is None and queue and (not queue[0].startswith("-") or _NUMBER.match(queue[0])):
            value = queue.pop(0)
        overrides.append((name, value))
    return rest, overrides


def true_or_false(text: str) -> bool:
    """Parses the value of a flag that is also given without one."""
    value: bool = config_lib.field(False, "").parse("the flag", text)
    return value


def number(kind: type, at_least: float = -math.inf, at_most: float = math.inf) -> Callable[[str], Any]:
    """Returns a parser of numbers within bounds, for `type=` of a flag."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {config_lib.TYPE_NAMES[kind]}") from None
        if not at_least <= value <= at_most:
            bound = f"at least {at_least}" if value < at_least else f"at most {at_most}"
            raise argparse.ArgumentTypeError(f"{text} must be {bound}")
        return value

    return parse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which config is meant."""
    group = parser.add_argument_group("config")
    group.add_argument(
        "--config",
        metavar="FILE[:GROUP=CHOICE,...]",
        default="",
        help="config file, with choices of whole groups, e.g. configs/pile_gpt.py:model=gpt2_medium",
    )
    group.add_argument(
        "--config.FIELD",
        metavar="VALUE",
        default=argparse.SUPPRESS,
        help="sets a field, e.g. --config.steps=2000; `trainit fields` lists all of them",
    )
    group.add_argument(
        "--debug",
        type=true_or_false,
        metavar="BOOL",
        nargs="?",
        const=True,
        default=False,
        help="the same run, shrunk to this machine and a minute",
    )


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run: its folder and its processes."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workdir", default="", help="the run's folder; empty: runs/ and the config file's name"
    )
    group = parser.add_argument_group("processes", "for jobs that no launcher has started")
    group.add_argument("--coordinator", default="", help="host:port of process 0")
    group.add_argument(
        "--num_processes", type=number(int, 0), default=0, help="processes of the job; 0: ask the launcher"
    )
    group.add_argument("--process_id", type=number(int, 0), default=0, help="this process's number, from 0")
    group.add_argument(
        "--wait_seconds",
        type=number(float, 1),
        default=300.0,
        help="how long processes wait for each other at the start",
    )
    group.add_argument(
        "--silence_seconds",
        type=number(float, 3),
        default=40.0,
        help="without a sign of life for that long, a process counts as lost",
    )


def train_parser(prog: str) -> Parser:
    """Returns the parser of the command that trains."""
    parser = Parser(prog, "Trains the model that a config file describes, or resumes its run.")
    add_config_arguments(parser)
    add_job_arguments(parser)
    return parser


def refuse(file: str, command: str) -> NoReturn:
    """Says how a file that is no program is used, e.g. by "train --config=", and ends with exit code 2."""
    print_error(f"{file} is no program. Use it by: trainit {command}{file}")
    sys.exit(USAGE)


def print_error(error: Exception | str) -> None:
    """Prints an error as one line."""
    print(f"trainit: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def config_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that describe the config, for another process."""
    given = [f"--config.{name}={'True' if text is None else text}" for name, text in arguments.overrides]
    return [f"--config={arguments.config}", *given, *["--debug"] * arguments.debug]


def workdir(arguments: argparse.Namespace) -> Path:
    """Returns the run's folder: as given, or runs/ and the config file's name, with -debug if shrunk."""
    file = Path(str(arguments.config).partition(":")[0])
    return Path(arguments.workdir or Path("runs") / (file.stem + "-debug" * arguments.debug))


def find_own_place(arguments: argparse.Namespace) -> Place:
    """Returns this process's place among the job's processes, from the flags or from the environment.

    Raises:
        ConfigError: the flags contradict each other, or the launcher started this process alone.
    """
    place = find_place(os.environ)
    if arguments.num_processes:
        place = Place("flags", "", arguments.num_processes, arguments.process_id)
        config_lib.require(
            place.process_id < place.num_processes,
            f"--process_id={place.process_id} must be below --num_processes={place.num_processes}",
        )
    return dataclasses.replace(place, coordinator=arguments.coordinator or place.coordinator)


def meet(
    config: Config | ConfigDict,
    place: Place,
    arguments: argparse.Namespace,
    identity: dict[str, str],
    stop_requested: Callable[[], str],
) -> tuple[list[Any], str]:
    """Waits until all processes of the job have come. Returns the connections to them, and JAX's coordinator.

    Args:
        config: for the platform.
        place: where this process stands.
        arguments: for the time to wait.
        identity: what must be the same on all processes.
        stop_requested: says why the job is to stop, or "".

    Raises:
        SetupError: the address of process 0 is missing or cannot be reached.
        MeetingError: some processes are missing, or differ.
        Stopped: the job is to stop.
    """
    from trainit.cluster import devices, rendezvous
    from trainit.cluster.place import check_coordinator

    if place.num_processes == 1:
        return [], ""
    check_coordinator(place)
    gpus = devices.visible_gpus(os.environ, place) if config.platform != "cpu" else []
    return rendezvous.meet(
        *(place.process_id, place.num_processes, place.coordinator, identity, gpus),
        *(arguments.wait_seconds, stop_requested),
    )


def cache() -> Path:
    """Returns the folder where prepared demo data and compiled programs are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRAINIT_CACHE") or Path(home) / "trainit")


def load_config(arguments: argparse.Namespace) -> ConfigDict:
    """Runs the config file and sets the fields that the command line gives. Call it once per process.

    Raises:
        ConfigError: there is no such file, it raises, it sets a field that nothing declares, or a flag sets
            one that is unknown or of another type.
    """
    if not arguments.config:
        raise ConfigError("--config=FILE is missing, for example --config=configs/debug.py")
    name, _, choices = arguments.config.partition(":")
    file = Path(name)
    config_lib.require(file.is_file(), f"--config={file}: there is no such file")
    try:
        config: Any = runpy.run_path(str(file))["get_config"](choices)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config={file} raises {type(error).__name__}: {error}") from None
    config_lib.require(
        isinstance(config, ConfigDict),
        f"--config={file}: get_config must return a config that began as trainit.config.defaults()",
    )
    _set_fields(config, arguments.overrides)
    config_lib.check_names(config, config)
    return config


def _set_fields(config: ConfigDict, overrides: Sequence[tuple[str, str | None]]) -> None:
    """Sets fields by their dotted names. Several values of a field that takes tuples are put together."""
    values: dict[str, Any] = {}
    for name, text in overrides:
        group, *_ = groups = [config]
        *path, last = name.split(".")
        for part in [*path, last]:
            if not isinstance(group, ConfigDict) or part not in group:
                within = group if isinstance(group, ConfigDict) else None
                raise ConfigError(
                    config_lib.unknown_field(".".join([*path[: len(groups) - 1], part]), within)
                )
            group = group[part]
            groups.append(group)
        if isinstance(group, ConfigDict):
            raise ConfigError(
                f"config.{name} is a group of fields: choose it as --config=FILE:{name}=CHOICE, or set its "
                f"fields, as in --config.{name}.{next(iter(group.declared), 'FIELD')}=VALUE"
            )
        known_field = groups[-2].declared.get(last) or config_lib.field(group, "")
        value = known_field.parse(f"config.{name}", text)
        if isinstance(value, tuple) and isinstance(values.get(name), tuple):
            value = values[name] + value
        values[name] = value
    for name, value in values.items():
        config.update_from_flattened_dict({name: value})


def read(config: ConfigDict, arguments: argparse.Namespace) -> tuple[Config, "TrainingData"]:
    """Resolves a config and opens the data that it names. With --debug, shrinks the config first, in place.

    Raises:
        ConfigError: the config or its data cannot work; no device has been touched.
    """
    from trainit.data import training_data
    from trainit.data.formats import detect
    from trainit.prepare.demo import prepare_demo

    if arguments.debug:
        config_lib.shrink(config, [name for name, _ in arguments.overrides])
        path = Path(config.dataset.path)
        if "streams" not in config.dataset and not path.is_dir() and not detect.find(path):
            config.dataset.update(path="demo", mixture="", tokenizer="", validation_path="")
    folder = config.dataset.path
    if folder == "demo" and "streams" not in config.dataset:
        try:
            folder = str(prepare_demo(cache()))
        except OSError as error:
            raise ConfigError(f"dataset.path='demo' (cache {cache()}) cannot be used: {error}") from None
    return training_data.read(config, folder, _resolve, cache())


def _resolve(config: ConfigDict, vocab_size: int, end_of_text: int) -> Config:
    """Resolves the config, and checks what only the optimizer knows."""
    from trainit import optimizers

    resolved = config_lib.resolve(config, vocab_size, end_of_text)
    optimizers.check(resolved)
    return resolved
