"""The command: flags, process start-up, exit code.

    python -m trainit.main --config=configs/pile_gpt.py:model=gpt2_medium --config.steps=2000

Exit codes: 0 all steps are done, 75 stopped on request with everything saved, 2 bad config or
usage, 1 anything else.
"""

import hashlib
import json
import os
from pathlib import Path

from trainit.cluster.process import block_stop_signals, tune_process

if __name__ == "__main__":
    tune_process()
    block_stop_signals()  # the imports that follow take seconds; signals wait until JobMonitor listens

import jax
from absl import logging

from trainit import __version__, cli, logs, optimizers
from trainit.cluster import devices, rendezvous, run_lock
from trainit.cluster.monitor import JobMonitor
from trainit.cluster.place import Place, SetupError, check_coordinator
from trainit.cluster.process import exit_process
from trainit.config import Config, ConfigError
from trainit.data.dataset import DatasetError
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import run_shape
from trainit.train import loop as train
from trainit.train.startup_timer import StartupTimer

USAGE = (ConfigError, DatasetError, SetupError)  # errors that are the user's to mend


class _Exit:
    """How this process leaves: the launch script, whose scheduler merges exit codes, is told by files.

    MARKER says that the run stopped on request and is saved; MARKER.failed that a process failed.
    """

    def __init__(self, place: Place):
        self._lead, self._marker = place.process_id == 0, os.environ.get("TRAINIT_MARKER", "")
        self.lock: run_lock.RunLock | None = None

    def __call__(self, code: int, together: bool = False):
        if self._marker and code == train.STOPPED and self._lead:
            Path(self._marker).touch()
        elif self._marker and code not in (train.DONE, train.STOPPED):
            Path(f"{self._marker}.failed").touch()
        if self.lock and code in (train.DONE, train.STOPPED):
            self.lock.release()
        exit_process(code, together)


def _about(config: Config, dataset: TrainingData, folder: Path) -> dict[str, str]:
    """What must be the same on all processes of a job."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return {
        "Trainit": __version__,
        "JAX": jax.__version__,
        "a config of hash": hashlib.sha256(text.encode()).hexdigest()[:8],
        "optimizer files of hash": config.optimizer_files,
        "dataset": dataset.fingerprint,
        "workdir": str(folder.absolute()),
    }


def _come_together(
    config: Config, dataset: TrainingData, folder: Path, place: Place, monitor: JobMonitor, leave: _Exit
):
    """Joins the job's processes, locks the run's folder and takes this process's devices."""
    coordinator = ""
    told = devices.configure(config.platform, config.cpu_devices, cli.cache(), place)
    where = f": process {place.process_id} of {place.num_processes}, coordinator {place.coordinator}"
    logging.info("%-10s %s", "place", place.source + where * (place.num_processes > 1))
    logging.info("%-10s %s", "settings", told)
    if place.num_processes > 1:
        check_coordinator(place)
        connections, coordinator = rendezvous.meet(
            place.process_id,
            place.num_processes,
            place.coordinator,
            _about(config, dataset, folder),
            devices.visible_gpus(os.environ, place) if config.platform != "cpu" else [],
            cli.wait_seconds(),
            monitor.stop_requested,
        )
        monitor.connect(connections)
    if place.process_id == 0:
        leave.lock = run_lock.RunLock(place.source, monitor.end_job)
        leave.lock.take(folder)
    devices.initialize(config.platform, place, coordinator)


def _run(place: Place, monitor: JobMonitor, leave: _Exit, start: StartupTimer) -> int:
    """The run, from reading its config to its exit code."""
    with start.part("data"):
        config, dataset = cli.read()
    own_files = optimizers.own_files_hash(config.optimizer, config.parameter_groups)
    config = Config({**config.to_dict(), "optimizer_files": own_files})
    folder = run_lock.make_folder(cli.workdir(), place.process_id)
    log = folder / "logs" / f"process_{place.process_id}.log"
    logs.log_to_file(log)
    with start.part("processes"):
        _come_together(config, dataset, folder, place, monitor, leave)
    monitor.watch(config.stall_seconds, log)
    monitor.stop_after(config.max_minutes, start.launched)
    shape = run_shape(config, jax.devices(), shrink_to_fit=cli.is_debug())
    code = train.run(config, dataset, shape, folder, monitor, start)
    monitor.close()
    return code


def _main():
    start = StartupTimer()
    logs.log_to_terminal(lead=True)
    try:
        place = cli.place()
    except USAGE as error:
        cli.say(error)
        _Exit(Place("unknown"))(cli.USAGE_ERROR)
    logs.log_to_terminal(lead=place.process_id == 0)
    leave = _Exit(place)
    monitor = JobMonitor(place.process_id, place.num_processes, leave, cli.silence_seconds())
    try:
        code = _run(place, monitor, leave, start)
    except rendezvous.Stopped:
        logging.info("stopped    before all processes were there; run the same command to go on")
        leave(train.STOPPED)
    except rendezvous.MeetingError as error:
        cli.say(error)
        leave(1)
    except USAGE as error:
        cli.say(error)
        monitor.report_failure(error, cli.USAGE_ERROR)
        leave(cli.USAGE_ERROR)
    except Exception as error:
        monitor.report_failure(error, 1, patience=3)
        logging.exception("trainit: error: %s", error)
        leave(1)
    leave(code, together=True)


if __name__ == "__main__":
    cli.run(_main)
