"""The command: flags, process start-up, exit code.

    python -m trainit.main --config=configs/pile_gpt.py:model=gpt2_medium --config.steps=2000

Exit codes: 0 all steps are done, 75 stopped on request with everything saved, 2 bad config or
usage, 1 anything else.
"""

import dataclasses
import os
import time
from pathlib import Path

from absl import flags, logging

from trainit import command_line, distributed, trackers, train
from trainit.config import ConfigError
from trainit.data.tokens import DatasetError

_WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default: runs/ and the config file's name")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, where a launcher does not say")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "processes of the job; 0: found out", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "this process's number, from 0", lower_bound=0)


def _find_place() -> distributed.Place:
    """This process's place, from the flags or from the environment."""
    place = distributed.find_place(os.environ)
    if _NUM_PROCESSES.value:
        place = distributed.Place("flags", "", _NUM_PROCESSES.value, _PROCESS_ID.value)
        if place.process_id >= place.num_processes:
            raise ConfigError(
                f"--process_id={place.process_id} must be below --num_processes={place.num_processes}"
            )
    return dataclasses.replace(place, coordinator=_COORDINATOR.value or place.coordinator)


def _make_workdir(process: int) -> Path:
    """The run's folder, created and writable."""
    workdir = Path(_WORKDIR.value or Path("runs") / command_line.name())
    try:
        (workdir / "logs").mkdir(parents=True, exist_ok=True)
        probe = workdir / "logs" / f".probe_{process}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return workdir


def _mark(marker: str, code: int):
    """Tells the launch script, whose scheduler merges exit codes, how this process ends.

    MARKER says that the run stopped on request and is saved; MARKER.failed that a process failed.
    """
    if code == train.STOPPED and distributed.is_lead():
        Path(marker).touch()
    elif code not in (train.DONE, train.STOPPED):
        Path(f"{marker}.failed").touch()


def _main():
    started, marker = time.monotonic(), os.environ.get("TRAINIT_MARKER", "")
    try:
        trackers.log_to_terminal(lead=True)
        stop = distributed.StopRequest()
        place = _find_place()
        trackers.log_to_terminal(lead=place.process_id == 0)
        config, dataset = command_line.read()
        workdir = _make_workdir(place.process_id)
        trackers.log_to_file(workdir / "logs" / f"process_{place.process_id}.log")
        if place.num_processes > 1:
            logging.info(
                "%-10s %s: process %d of %d, coordinator %s",
                *("place", place.source, place.process_id, place.num_processes, place.coordinator),
            )
        distributed.initialize(config.platform, config.cpu_devices, command_line.cache(), place)
        stop.after(config.max_minutes, started)
        code = train.Run(config, dataset, workdir, command_line.is_debug()).loop(stop)
    except (ConfigError, DatasetError, distributed.PlaceError) as error:
        command_line.say(error)
        code = command_line.USAGE_ERROR
    except Exception as error:
        logging.exception("trainit: error: %s", error)
        code = 1
    if marker:
        _mark(marker, code)
    distributed.leave(code)


if __name__ == "__main__":
    command_line.run(_main)
