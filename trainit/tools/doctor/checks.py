"""All checks of the doctor, in the order of a run's start: config, processes, devices, folder, data."""

import argparse
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from trainit.cluster import devices, rendezvous, run_lock, sync
from trainit.cluster.logs import quantity
from trainit.cluster.place import Place, SetupError
from trainit.config import Config, ConfigDict, ConfigError, command_line
from trainit.data.dataset import DatasetError
from trainit.data.documents.inputs import fingerprint
from trainit.data.training_data import TrainingData
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.tools import timing
from trainit.tools.doctor import environment
from trainit.tools.doctor.network import check_all_reduces
from trainit.tools.doctor.report import FAIL, OK, Result, group_processes, name_failures
from trainit.train import setup
from trainit.train.automatic import choice

DATA_SECONDS = 1.0  # for which the loader is timed


def run(config: ConfigDict, place: Place, arguments: argparse.Namespace) -> tuple[list[Result], bool]:
    """Runs all checks of a config that is not checked yet. A collective, once all processes are connected.

    Returns the results, and whether the processes were connected: if not, what follows is left out.
    """
    # The config and the dataset: what is wrong with them does not keep the machine from being checked.
    dataset, resolved = None, None
    try:
        resolved, dataset = setup.read(config, arguments)
        results = [Result("config", OK, "valid")]
    except (ConfigError, DatasetError) as error:
        name = "dataset" if isinstance(error, DatasetError) else "config"
        results = [Result(name, FAIL, str(error))]

    # The processes find each other as those of a run do.
    results.append(Result("place", OK, f"{place.source}, processes: {place.num_processes}"))
    try:
        count = min(max(config.cpu_devices, 1), 4096)  # others are reported above, and cannot be made
        told = devices.configure(config.platform, count, command_line.cache(), place)
        results.append(Result("settings", OK, told))
        seconds = arguments.wait_seconds
        _, coordinator = rendezvous.meet_others(place, config.platform, {}, seconds, lambda: "")
        devices.initialize(config.platform, place, coordinator)
    except (rendezvous.MeetingError, SetupError) as error:
        name = "devices" if isinstance(error, SetupError) else "processes"
        return [*results, Result(name, FAIL, str(error))], False

    hosts = sync.gather_text(socket.gethostname())
    processes = [f"process {index} ({host})" for index, host in enumerate(hosts)]
    results += _check_machines(hosts, processes, command_line.workdir(arguments))
    results += _check_data(resolved, dataset, processes, arguments.debug)
    if sync.is_lead():
        names = resolved.trackers if resolved else ()
        results += [*environment.check_tensorboard(names), environment.check_wandb(names)]
    return results, True


def _check_machines(hosts: list[str], processes: list[str], folder: Path) -> list[Result]:
    """Checks everything that does not depend on the config. A collective."""
    # What each process knows about itself, for all to see.
    _, write_error = _attempt(lambda: run_lock.make_folder(folder, jax.process_index()))
    kinds = [device.device_kind for device in jax.local_devices()]
    versions, devices_of, write_errors = _gather((environment.versions(), kinds, write_error))
    results = [
        Result("processes", OK, group_processes(["connected"] * len(hosts), processes)),
        environment.check_versions(versions, processes),
        environment.check_devices(devices_of, processes),
    ]

    # All clocks are read between two collectives, whose time bounds the error.
    before = time.time()
    sync.gather(0)
    clocks = [float(text) for text in sync.gather_text(repr(time.time()))]
    results.append(environment.check_clocks(before, clocks, time.time(), processes))

    results += check_all_reduces(hosts)

    # Process 0 writes a file of random content, which every process must see.
    results.append(environment.check_workdir(write_errors, processes, folder))
    token = sync.gather_text(secrets.token_hex(8))[0]
    if not any(write_errors):
        file = folder / "logs" / f".doctor_{token}"
        if sync.is_lead():
            file.write_text(token)
        visible = sync.gather(environment.appears(file, token))
        if sync.is_lead():
            file.unlink()
        results.append(environment.check_shared(visible, processes, folder))
    return results


def _check_data(
    config: Config | None, dataset: TrainingData | None, processes: list[str], debug: bool
) -> list[Result]:
    """Checks that the config fits the devices, and how fast its data is read. A collective.

    Config and dataset are None if they are not valid. With `debug`, the mesh may shrink to the devices.
    """
    fingerprints = sync.gather_text(fingerprint(dataset.identity) if dataset else "none")
    if len(set(fingerprints)) > 1:
        finding = group_processes(fingerprints, processes)
        return [Result("dataset", FAIL, finding, "all hosts must see the same dataset.path")]
    if config is None or dataset is None:
        return []
    try:
        config, shape, computing = choice.on_devices(config, shrink_to_fit=debug)
    except ConfigError as error:
        return [Result("mesh", FAIL, str(error))]
    batch = shape.batch_at(0)
    mesh = " × ".join(f"{axis} {size}" for axis, size in shape.sizes.items())
    finding = f"{mesh}; {config.batch_size} sequences are {batch.micro_steps} micro-steps of {batch.rows}"
    results = [Result("mesh", OK, finding), Result("computing", OK, computing)]

    rates, errors = _gather(_attempt(lambda: _data_rate(dataset, shape)))
    if failures := name_failures(errors, processes):
        remedy = "check that all hosts can read dataset.path"
        return [*results, Result("dataset", FAIL, failures, remedy)]
    finding = f"{dataset.source}: {quantity(min(rates))} tokens/s in the slowest process"
    return [*results, Result("dataset", OK, finding)]


def _data_rate(dataset: TrainingData, shape: RunShape) -> float:
    """Returns the tokens per second that this process reads in the way of a run."""
    batches = dataset.reader(shape.batch_at(0), batch_sharding(shape.mesh)).batches()
    tokens = next(batches)["tokens"]
    own_tokens = sum(shard.data.size for shard in tokens.addressable_shards if shard.replica_id == 0)
    return own_tokens * timing.rate(batches, DATA_SECONDS)


def _attempt(work: Callable[[], object]) -> tuple[Any, str]:
    """Returns the result and "", or None and the error, so that no process misses the next collective."""
    try:
        return work(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def _gather(own: tuple) -> Iterator[tuple]:
    """Returns of each of these values, for JSON, those of all processes. A collective."""
    return zip(*map(json.loads, sync.gather_text(json.dumps(own))), strict=True)
