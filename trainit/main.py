"""The command: flags, process start-up, exit code.

    python -m trainit.main --config=configs/pile_gpt.py:model=gpt2_medium --config.steps=2000

Exit codes: 0 all steps are done, 75 stopped on request with everything saved, 2 bad config or
usage, 1 anything else.
"""

from pathlib import Path

from absl import flags, logging

from trainit import command_line, distributed, trackers, train
from trainit.config import ConfigError
from trainit.data.tokens import DatasetError

_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default: runs/ and the config file's name")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where there are several")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "processes of the job", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "this process's number", lower_bound=0)


def _make_workdir() -> Path:
    """The run's folder, created and writable."""
    workdir = Path(_WORKDIR.value or Path("runs") / command_line.name())
    try:
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        probe = workdir / "logs" / f".probe_{_PROCESS_ID.value}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return workdir


def _check_process_flags():
    if _PROCESS_ID.value >= _NUM_PROCESSES.value:
        raise ConfigError(
            f"--process_id={_PROCESS_ID.value} must be below --num_processes={_NUM_PROCESSES.value}"
        )
    if _NUM_PROCESSES.value > 1 and not _COORDINATOR.value:
        raise ConfigError(
            f"--num_processes={_NUM_PROCESSES.value} needs --coordinator=HOST:PORT of process 0"
        )


def _main():
    try:
        trackers.log_to_terminal(lead=_PROCESS_ID.value == 0)
        _check_process_flags()
        config, dataset = command_line.read()
        workdir = _make_workdir()
        trackers.log_to_file(workdir / "logs" / f"process_{_PROCESS_ID.value}.log")
        distributed.initialize(
            config.platform,
            config.cpu_devices,
            command_line.cache(),
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
        )
        code = train.Run(config, dataset, workdir, command_line.is_debug()).loop()
    except (ConfigError, DatasetError) as error:
        command_line.say(error)
        code = command_line.USAGE_ERROR
    except Exception as error:
        logging.exception("trainit: error: %s", error)
        code = 1
    distributed.leave(code)


if __name__ == "__main__":
    command_line.run(_main)
