"""The command: flags, process start-up, exit code.

    python -m trainit.main --config=configs/pile_gpt.py:model=gpt2_medium --config.steps=2000

Exit codes: 0 all steps are done, 75 stopped on request with everything saved, 2 bad config or
usage, 1 anything else.
"""

import os
import re
import runpy
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from trainit import config as config_lib
from trainit import distributed, trackers, train
from trainit.config import ConfigError
from trainit.data import prepare, tokens

USAGE_ERROR = 2

_CONFIG = config_flags.DEFINE_config_file("config", help_string="config file, FILE:group=choice,...")
_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default: runs/ and the config file's name")
_DEBUG = flags.DEFINE_bool("debug", False, "the same run, shrunk to this machine")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where there are several")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "processes of the job", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "this process's number", lower_bound=0)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one line and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is no flag: options start with --")
        if not flags.FLAGS["config"].present:
            raise ConfigError("--config=FILE is missing, for example --config=configs/debug.py")
        if not _config_file()[0].is_file():
            raise ConfigError(f"--config={_config_file()[0]}: there is no such file")
        _ = _CONFIG.value.steps  # the file is read now; that is where its errors come up
        return rest
    except (AttributeError, KeyError):
        _say(_unknown_field())
    except Exception as error:  # whatever a config file raises is a usage error
        # Of a traceback that came as text, the last line says what was wrong.
        _say(str(error).strip().splitlines()[-1].removeprefix("trainit.config.ConfigError: "))
    sys.exit(USAGE_ERROR)


def _config_file() -> tuple[Path, str]:
    """The config file and what stands behind its colon, as --config gives them."""
    flag = re.compile(r"--?config(=.*)?")
    at = next(i for i, argument in enumerate(sys.argv) if flag.fullmatch(argument))
    given = sys.argv[at].partition("=")[2] or sys.argv[at + 1]
    file, _, arg = given.partition(":")
    return Path(file), arg


def _unknown_field() -> str:
    """The first --config.a.b that the config lacks, with what there is in its place."""
    file, arg = _config_file()
    for argument in sys.argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        group, name = runpy.run_path(str(file))["get_config"](arg), "config"
        for part in match[1].split(".") if match else ():
            if not isinstance(group, ConfigDict) or part not in group:
                there = ", ".join(sorted(group)) if isinstance(group, ConfigDict) else "no fields"
                return f"unknown field {name}.{part}; {name} has {there}"
            group, name = group[part], f"{name}.{part}"
    return "a field of the config is unknown"


def _say(error):
    print(f"trainit: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _cache() -> Path:
    return Path(
        os.environ.get("TRAINIT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainit"
    )


def _read_config():
    """The config that the flags describe and the dataset that it names."""
    config = _CONFIG.value
    if _DEBUG.value:
        config = config_lib.shrink(config, config_flags.get_override_values(flags.FLAGS["config"]))
        if not Path(config.dataset.path).is_dir():
            config.dataset.path = "demo"
    path = config.dataset.path
    dataset = tokens.open_dataset(prepare.demo(_cache()) if path == "demo" else Path(path))
    config = config_lib.resolve(config, dataset.vocab_size)
    for name, split in dataset.splits.items():
        if split.tokens < 2:
            raise ConfigError(f"dataset.path={path!r}: split {name} has {split.tokens} tokens; 2 are needed")
    return config, dataset


def _make_workdir() -> Path:
    """The run's folder, created and writable."""
    name = _config_file()[0].stem + "-debug" * _DEBUG.value
    workdir = Path(_WORKDIR.value or Path("runs") / name)
    try:
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        probe = workdir / "logs" / f".probe_{_PROCESS_ID.value}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return workdir


def _main(argv: list[str]):
    del argv
    try:
        trackers.log_to_terminal(lead=_PROCESS_ID.value == 0)
        config, dataset = _read_config()
        workdir = _make_workdir()
        trackers.log_to_file(workdir / "logs" / f"process_{_PROCESS_ID.value}.log")
        distributed.initialize(
            config.platform,
            config.cpu_devices,
            _cache(),
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
        )
        code = train.Run(config, dataset, workdir, _DEBUG.value).loop()
    except (ConfigError, tokens.DatasetError) as error:
        _say(error)
        code = USAGE_ERROR
    except Exception as error:
        logging.exception("trainit: error: %s", error)
        code = 1
    distributed.leave(code)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
