"""What commands share: --config with its overrides, --debug, and errors that are one line.

--config=FILE:group=choice,... --config.field=value ... [--debug]
"""

import dataclasses
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from trainit import config as config_lib
from trainit import optimizers
from trainit.cluster.place import Place, find_place
from trainit.config import Config, ConfigError
from trainit.data import training_data
from trainit.data.formats import detect
from trainit.data.training_data import TrainingData
from trainit.prepare.demo import prepare_demo

USAGE_ERROR = 2  # exit code of a bad config or usage

_CONFIG = config_flags.DEFINE_config_file("config", help_string="config file, FILE:group=choice,...")
_DEBUG = flags.DEFINE_bool("debug", False, "the same run, shrunk to this machine")
_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default: runs/ and the config file's name")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where a launcher does not say")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "processes of the job; 0: found out", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "this process's number, from 0", lower_bound=0)
_WAIT_SECONDS = flags.DEFINE_float("wait_seconds", 300, "how long to wait for the others", lower_bound=1)

_SILENCE_SECONDS = flags.DEFINE_float(
    "silence_seconds", 40, "without a sign of life for so long, a process counts as lost", lower_bound=3
)


def run(main: Callable[[], int | None], needs_config: bool = True):
    """Parses the flags, calls `main` and exits with what it returns; wrong flags exit with 2."""
    app.run(lambda argv: main(), flags_parser=_parse if needs_config else _parse_alone)


def say(error: Exception | str):
    """Prints an error as one line."""
    print(f"trainit: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def is_debug() -> bool:
    return _DEBUG.value


def workdir() -> Path:
    """The run's folder: as given, or runs/ and the config file's name, marked if the run is shrunk."""
    return Path(_WORKDIR.value or Path("runs") / (_file()[0].stem + "-debug" * _DEBUG.value))


def unresolved() -> ConfigDict:
    """The config that the flags describe, unchecked."""
    return _CONFIG.value


def place() -> Place:
    """This process's place among the job's processes, from the flags or from the environment.

    Raises:
        ConfigError, SetupError: it has no right one.
    """
    found = find_place(os.environ)
    if _NUM_PROCESSES.value:
        found = Place("flags", "", _NUM_PROCESSES.value, _PROCESS_ID.value)
        if found.process_id >= found.num_processes:
            raise ConfigError(
                f"--process_id={found.process_id} must be below --num_processes={found.num_processes}"
            )
    return dataclasses.replace(found, coordinator=_COORDINATOR.value or found.coordinator)


def wait_seconds() -> float:
    """How long the processes of a job wait for each other at the start."""
    return _WAIT_SECONDS.value


def silence_seconds() -> float:
    """After how long without a sign of life a process counts as lost."""
    return _SILENCE_SECONDS.value


def cache() -> Path:
    """Where prepared demo data and compiled programs are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRAINIT_CACHE") or Path(home) / "trainit")


def read() -> tuple[Config, TrainingData]:
    """The resolved config that the flags describe, and the data that it names.

    Raises:
        ConfigError, DatasetError: one of them cannot work; no device has been touched.
    """
    config = _CONFIG.value
    if _DEBUG.value:
        config = config_lib.shrink(config, config_flags.get_override_values(flags.FLAGS["config"]))
        path = Path(config.dataset.path)
        if "streams" not in config.dataset and not path.is_dir() and not detect.find(path):
            config.dataset.update(path="demo", mixture="", tokenizer="", validation_path="")
    path = config.dataset.path
    if path == "demo" and "streams" not in config.dataset:
        try:
            path = str(prepare_demo(cache()))
        except OSError as error:
            raise ConfigError(f"dataset.path='demo' (cache {cache()}) cannot be used: {error}") from None
    return training_data.read(config, path, _resolve, cache())


def _resolve(config: ConfigDict, vocab_size: int, end_of_text: int) -> Config:
    resolved = config_lib.resolve(config, vocab_size, end_of_text)
    optimizers.check(resolved)
    return resolved


def _parse(argv: list[str]) -> list[str]:
    try:
        file, arg = _file()
        if not file.is_file():
            raise ConfigError(f"--config={file}: there is no such file")
        base = _run_config_file(file, arg)
        try:
            rest = flags.FLAGS(argv)
        except (AttributeError, KeyError):
            raise ConfigError(_unknown_field(base)) from None
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is no flag: options start with --")
        _ = _CONFIG.value.steps
        return rest
    except (flags.Error, ConfigError) as error:
        say(error)
    sys.exit(USAGE_ERROR)


def _parse_alone(argv: list[str]) -> list[str]:
    """Flags of a command that needs no config."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        say(error)
    sys.exit(USAGE_ERROR)


def _run_config_file(file: Path, arg: str) -> ConfigDict:
    """What the file's get_config returns. Whatever goes wrong in it is told as the file's error."""
    try:
        return runpy.run_path(str(file))["get_config"](arg)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config={file} raises {type(error).__name__}: {error}") from None


def _file() -> tuple[Path, str]:
    """The config file and what stands behind its colon, as --config gives them."""
    flag = re.compile(r"--?config(=.*)?")
    at = [i for i, argument in enumerate(sys.argv) if flag.fullmatch(argument)]
    given = (sys.argv[at[-1]].partition("=")[2] or "".join(sys.argv[at[-1] + 1 : at[-1] + 2])) if at else ""
    if not given:
        if {"--help", "--helpfull", "--helpshort"} & set(sys.argv):
            flags.FLAGS(sys.argv)  # prints the flags and exits
        raise ConfigError("--config=FILE is missing, for example --config=configs/debug.py")
    file, _, arg = given.partition(":")
    return Path(file), arg


def _unknown_field(base: ConfigDict) -> str:
    """The first --config.a.b that the config lacks, with what there is in its place."""
    for argument in sys.argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        group, path = base, "config"
        for part in match[1].split(".") if match else ():
            if not isinstance(group, ConfigDict) or part not in group:
                there = ", ".join(sorted(group)) if isinstance(group, ConfigDict) else "no fields"
                return f"unknown field {path}.{part}; {path} has {there}"
            group, path = group[part], f"{path}.{part}"
    return "a field of the config is unknown"
