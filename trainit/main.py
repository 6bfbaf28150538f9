"""`trainit train`, which `python -m trainit.main` is, too: process start-up, the run, exit code.

Exit codes: 0 all steps are done, 75 stopped on request (saved, or no step was done yet): run it again,
2 wrong config or flags, 1 anything else.
"""

import argparse
import hashlib
import json
import os
from typing import NoReturn

from trainit.cluster.process import Exit, block_stop_signals, outlive_readers
from trainit.cluster.tuning import collect_garbage_rarely, tune_process
from trainit.config import command_line
from trainit.config.exit_codes import FAILED, STOPPED, USAGE

if __name__ == "__main__":
    tune_process()
    outlive_readers()
    block_stop_signals()  # the imports that follow take seconds; signals wait until JobMonitor listens
    arguments = command_line.parse_or_exit(command_line.train_parser("python -m trainit.main"))

import jax
from absl import logging

from trainit import __version__, optimizers
from trainit.checkpoints.retry import SaveError
from trainit.cluster import authentication, devices, logs, rendezvous, restart, run_lock
from trainit.cluster.monitor import JobMonitor
from trainit.cluster.place import Place, find_own_place
from trainit.cluster.transfers import Wire
from trainit.config import Config, ConfigError
from trainit.data.documents.inputs import fingerprint
from trainit.data.documents.reader import BrokenInputError
from trainit.generate.at_validation import Samples
from trainit.tools import out_of_memory
from trainit.train import loop as train
from trainit.train import setup
from trainit.train.automatic import choice
from trainit.train.recorder import NonFiniteError
from trainit.train.reports.startup_timer import StartupTimer


def run(arguments: argparse.Namespace) -> NoReturn:
    """Trains as the flags say, and ends this process."""
    start = StartupTimer()
    collect_garbage_rarely()
    logs.log_to_terminal(lead=True)
    try:
        place = find_own_place(arguments)
    except ConfigError as error:
        command_line.print_error(error)
        Exit(lead=True)(USAGE)
    logs.log_to_terminal(lead=place.process_id == 0)
    leave = Exit(place.process_id == 0)
    # From here on the monitor's thread receives SIGTERM, even while the main thread compiles.
    monitor = JobMonitor(place.process_id, place.num_processes, leave, arguments.silence_seconds)
    try:
        code = _train(arguments, place, monitor, leave, start)
    except rendezvous.Stopped:
        logging.info("stopped    before all processes were connected; run the same command to continue")
        leave(STOPPED)
    except (rendezvous.MeetingError, ConfigError) as error:
        code = USAGE if isinstance(error, ConfigError) else FAILED
        command_line.print_error(error)
        monitor.report_failure(error, code)
        leave(code)
    except Exception as error:
        code = getattr(error, "exit_code", FAILED)
        monitor.report_failure(error, code, patience=3)
        known = code != FAILED or isinstance(error, BrokenInputError | SaveError | NonFiniteError)
        known = known or "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "filename", None) is not None
        logging.error("trainit: error: %s", error, exc_info=not known)
        leave(code)
    leave(code, together=True)


def _train(arguments, place: Place, monitor: JobMonitor, leave: Exit, start: StartupTimer) -> int:
    """The run, from reading its config to its exit code."""
    # What is wrong with config or data is known before anything is waited for.
    with start.part("data"):
        config, dataset = setup.read(command_line.load_config(arguments), arguments)
        write_texts = Samples(config, dataset.tokenizer)
    own_files = optimizers.own_files_hash(config.optimizer, config.parameter_groups)
    config = Config({**config.to_dict(), "optimizer_files": own_files})
    folder = run_lock.make_folder(command_line.workdir(arguments), place.process_id)
    logs.log_to_file(log := folder / "logs" / f"process_{place.process_id}.log")
    restart.report_run(place, folder, config.restart.limit)

    # The processes meet, process 0 locks the run's folder, and each takes its devices.
    with start.part("processes"):
        settings = devices.configure(config.platform, config.cpu_devices, command_line.cache(), place)
        where = f": process {place.process_id} of {place.num_processes}, coordinator {place.coordinator}"
        logging.info("%-10s %s", "place", place.source + where * (place.num_processes > 1))
        logging.info("%-10s %s", "settings", settings)
        text = json.dumps(config.to_dict(), sort_keys=True).encode()
        same = {
            "Trainit": __version__,
            "JAX": jax.__version__,
            "a config of hash": hashlib.sha256(text).hexdigest()[:8],
            "optimizer files of hash": config.optimizer_files,
            "dataset": fingerprint(dataset.identity),
            "workdir": str(folder.absolute()),
        }
        seconds, stop = arguments.wait_seconds, monitor.agreement.stop_requested
        token = authentication.take_token(os.environ)
        connections, coordinator = rendezvous.meet_others(place, config.platform, same, seconds, stop, token)
        if place.num_processes > 1:
            monitor.connect(connections)
        lock = run_lock.RunLock(place.source, monitor.end_job)
        if place.process_id == 0:
            leave.release_lock = lock.release
            lock.take(folder)
        devices.initialize(config.platform, place, coordinator)
        lock.confirm()

    monitor.set_limits(config.stall_seconds, log, config.max_minutes, start.launched)
    config, shape, chosen = choice.on_devices(config, shrink_to_fit=arguments.debug)
    restart.report_run(place, folder, config.restart.limit, choice.fewer_processes(config))
    logging.info("%-10s %s", "computing", chosen)
    wire = Wire(place.coordinator, token)
    try:
        code = train.run(train.Job(config, dataset, shape, folder, monitor, wire, start, write_texts))
    except jax.errors.JaxRuntimeError as error:
        out_of_memory.explain(error, config)
        raise
    monitor.close()
    return code


if __name__ == "__main__":
    run(arguments)
