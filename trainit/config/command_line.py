"""What commands share: flags, --config with its overrides, folders, errors of one line."""

import argparse
import difflib
import itertools
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from trainit.config import ConfigDict, ConfigError, check_fields, field, require
from trainit.config.exit_codes import USAGE
from trainit.config.schema import describe_error, expand_home, unknown_field, walk

_OVERRIDE = re.compile(r"--(no)?config\.([\w.]*)(?:=(.*))?", re.DOTALL)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults only where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", False, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if type(action.default) in (int, float) else action.dest.upper()


class Parser(argparse.ArgumentParser):
    """A parser of flags and of --config.FIELD=VALUE, whose errors are one line."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The values of all flags; those of --config.FIELD are in `overrides`, as (name, text or None)."""
        # Libraries refuse to work, e.g. Grain in its worker processes, unless absl's flags are parsed.
        flags.FLAGS.mark_as_parsed()
        arguments = [expand_home(argument) for argument in arguments]
        takes_fields = "--config.FIELD" in self._option_string_actions
        rest, overrides = _split_overrides(arguments) if takes_fields else (arguments, [])
        values, unknown = self.parse_known_args(rest)
        if unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            known = {flag.removesuffix("FIELD"): flag for flag in self._option_string_actions}
            near = difflib.get_close_matches(name, known, 1)
            self.error(f"unknown flag {name}" + "".join(f", did you mean {known[flag]}?" for flag in near))
        if unknown:
            self.error(f"{unknown[0]!r} is no flag: options start with --")
        values.overrides = overrides
        return values


def parse_or_exit(parser: Parser) -> argparse.Namespace:
    """The flags of this process, which ends if they are wrong."""
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
        if not (match := _OVERRIDE.fullmatch(argument)):
            rest.append(argument)
            continue
        negated, name, value = match.groups()
        if value is None and not negated and queue and re.match(r"[^-]|-\d|$", queue[0]):
            value = queue.pop(0)
        overrides.append((name, "False" if negated else value))
    return rest, overrides


def true_or_false(text: str) -> bool:
    """Parses the value of a flag that is also given without one."""
    return bool(field(False, "").parse("the flag", text))


def number(kind: type, at_least: float | None = None, at_most: float | None = None) -> Callable[[str], Any]:
    """A parser of numbers within bounds, for `type=` of a flag."""
    known = field(kind(), "", at_least=at_least, at_most=at_most)

    def parse(text: str) -> Any:
        try:
            known.check("", value := known.parse("", text))
        except ConfigError:
            what = ", ".join(filter(None, (known.bounds, known.type_name)))
            raise argparse.ArgumentTypeError(f"{text} must be {what}") from None
        return value

    return parse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which config is meant."""
    add = parser.add_argument_group("config").add_argument
    file = "config file, with choices of whole groups, e.g. configs/pile_gpt.py:model=gpt2_medium"
    add("--config", metavar="FILE[:GROUP=CHOICE,...]", default="", help=file)
    example = "sets a field, e.g. --config.steps=2000; `trainit fields` lists all of them"
    add("--config.FIELD", metavar="VALUE", default=argparse.SUPPRESS, help=example)
    shrunk = "the same run, shrunk to this machine and a minute"
    add("--debug", type=true_or_false, metavar="BOOL", nargs="?", const=True, default=False, help=shrunk)


def add_job_arguments(parser: argparse.ArgumentParser, has_folder: bool = True) -> None:
    """Adds the flags of a run: its folder and its processes."""
    if has_folder:
        add = parser.add_argument_group("run").add_argument
        add("--workdir", default="", help="the run's folder; empty: runs/ and the config file's name")
    add = parser.add_argument_group("processes", "for jobs that no launcher has started").add_argument
    add("--coordinator", default="", help="host:port of process 0")
    add("--num_processes", type=number(int, 0), default=0, help="processes of the job; 0: ask the launcher")
    add("--process_id", type=number(int, 0), default=0, help="this process's number, from 0")
    wait, silence = "longest wait for each other at the start", "time without a sign of life that means loss"
    add("--wait_seconds", type=number(float, 1), default=300.0, help=wait)
    add("--silence_seconds", type=number(float, 3), default=40.0, help=silence)


def add_finished_run_arguments(parser: argparse.ArgumentParser, foreign: bool = True) -> None:
    """Adds the flags that say which checkpoint of which run is meant, and its tokenizer."""
    of = "folder of the run, or hf: and a folder that transformers reads" if foreign else "folder of the run"
    parser.add_argument("run", metavar="RUN", help=of)
    add = parser.add_argument_group("model").add_argument
    add("--step", type=number(int, 0), default=None, help="checkpoint to take; by default the newest")
    known = "the tokenizer, if the run's dataset is elsewhere now; none: without one"
    add("--tokenizer", default="", help=known)


def train_parser(prog: str) -> Parser:
    """The parser of the command that trains."""
    parser = Parser(prog, "Trains the model that a config file describes, or resumes its run.")
    add_config_arguments(parser)
    add_job_arguments(parser)
    return parser


def refuse(file: str, command: str) -> NoReturn:
    """Ends a file that is no program, and says which command takes it, such as "train --config="."""
    print_error(f"{file} is no program. Use it by: trainit {command}{file}")
    sys.exit(USAGE)


def print_error(error: Exception | str) -> None:
    """Prints an error as one line."""
    print(f"trainit: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def workdir(arguments: argparse.Namespace) -> Path:
    """The run's folder: as given, or runs/ and the config file's name, with -debug if shrunk."""
    name = Path(arguments.config.partition(":")[0]).stem
    return Path(arguments.workdir or f"runs/{name}{'-debug' * arguments.debug}")


def cache() -> Path:
    """The folder where prepared demo data and compiled programs are kept between runs."""
    folder = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/trainit"
    return Path(expand_home(os.environ.get("TRAINIT_CACHE") or folder))


def run_file(given: str, function: str, flag: str = "") -> Any:
    """Returns what a function of FILE returns for ARGUMENT, where given is FILE or FILE:ARGUMENT."""
    file, _, argument = given.partition(":")
    require(Path(file).is_file(), f"{flag}{file}: there is no such file")
    try:
        return runpy.run_path(file)[function](argument)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{flag}{file} raises {describe_error(error, file)}") from None


def load_config(arguments: argparse.Namespace) -> ConfigDict:
    """Runs the config file, checks what it sets, and sets the fields that the command line gives, once."""
    require(arguments.config, "--config=FILE is missing, for example --config=configs/debug.py")
    config = run_file(arguments.config, "get_config", "--config=")
    returned = f"--config={arguments.config}: get_config returns a {type(config).__name__}"
    require(isinstance(config, ConfigDict), f"{returned}, not a config that began as config.defaults()")
    check_fields(config, config)
    set_fields(config, arguments.overrides)
    texts = {name: expand_home(value) for name, value, _ in walk(config) if type(value) is str}
    config.update_from_flattened_dict(texts)
    return config


def set_fields(config: ConfigDict, overrides: Sequence[tuple[str, str | None]]) -> None:
    """Sets fields by their dotted names. Several values of a field that takes tuples are put together."""
    fields = {name: known for name, _, known in walk(config)}
    values: dict[str, Any] = {}
    for name, text in overrides:
        if name not in fields:
            raise ConfigError(_no_field(name, config))
        value = fields[name].parse(f"config.{name}", text)
        together = isinstance(value, tuple) and isinstance(values.get(name), tuple)
        values[name] = values[name] + value if together else value
    config.update_from_flattened_dict(values)


def _no_field(name: str, config: ConfigDict) -> str:
    """Why the field of a dotted name cannot be set: its first part that is unknown, or it is a group."""
    group: Any = config
    for path in itertools.accumulate(name.split("."), "{}.{}".format):
        part = path.rpartition(".")[2]
        if not isinstance(group, ConfigDict) or part not in group:
            return unknown_field(path, group)
        group = group[part]
    example = f"--config.{name}.{next(iter(group), 'FIELD')}=VALUE"
    return f"config.{name} is a group: choose it by --config=FILE:{name}=CHOICE, or set its fields: {example}"
