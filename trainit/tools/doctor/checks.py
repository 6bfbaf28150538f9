"""All checks of the doctor, in the order of a run's start."""

import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import Mesh

from trainit import __version__, cli
from trainit.cluster import distributed, rendezvous, run_lock
from trainit.config import Config, ConfigError
from trainit.data import training_data
from trainit.data.dataset import Dataset, DatasetError
from trainit.data.jsonl.dataset import Streamed
from trainit.parallel import sharding
from trainit.tools.doctor.environment import (
    clock_row,
    devices_row,
    shared_row,
    versions_row,
    wandb_row,
    write_row,
)
from trainit.tools.doctor.network import reduce_rows
from trainit.tools.doctor.report import FAIL, OK, Row, by_value
from trainit.train import trackers

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SHARED_SECONDS = 10.0  # that a network file system may take to show a new file elsewhere


def _data_rate(config: Config, dataset: Dataset | Streamed, mesh: Mesh, shape: tuple[int, int, int]) -> float:
    """Tokens per second that this process reads, as a run would."""
    batches = training_data.reader(config, dataset, shape, sharding.batch_sharding(mesh)).batches()
    first = next(batches)
    mine = sum(part.data.size for part in first["tokens"].addressable_shards if part.replica_id == 0)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 1.0:
        next(batches)
        count += 1
    return count * mine / (time.perf_counter() - start)


def _attempt(work: Callable):
    """Its result, or the error that it raises, as text: what one process meets must not stop the others."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _local_findings(folder: Path, process: int) -> dict:
    """What each process finds by itself."""
    return {
        "versions": {"Trainit": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "kinds": [device.device_kind for device in jax.local_devices()],
        "write": _attempt(lambda: run_lock.make(folder, process) and ""),
    }


def _sees(path: Path, token: str) -> bool:
    """Whether a file has this content, now or soon."""
    until = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < until:
        if path.exists() and path.read_text() == token:
            return True
        time.sleep(0.2)
    return False


def examine(config, dataset: Dataset | Streamed | None, resolved: Config | None, folder: Path) -> list[Row]:
    """All checks that need the processes together. A collective.

    Args:
        config: what the flags describe.
        dataset: if it can be opened.
        resolved: the config, if it can work.
        folder: the run's.
    """
    lead = distributed.is_lead()
    hosts = distributed.gather_text(socket.gethostname())
    processes = [f"process {number} ({host})" for number, host in enumerate(hosts)]
    found = [
        json.loads(text)
        for text in distributed.gather_text(json.dumps(_local_findings(folder, jax.process_index())))
    ]
    rows = [
        Row("processes", OK, by_value(["all there"] * len(hosts), processes)),
        versions_row([f["versions"] for f in found], processes),
        devices_row([f["kinds"] for f in found], processes),
    ]
    before = time.time()
    distributed.gather(0)
    clocks = [float(text) for text in distributed.gather_text(repr(time.time()))]
    rows.append(clock_row(before, clocks, time.time(), processes))
    rows += reduce_rows(hosts)
    rows.append(write_row([f["write"] for f in found], processes, folder))
    token = distributed.gather_text(secrets.token_hex(8))[0]
    if not any(f["write"] for f in found):
        path = folder / "logs" / f".doctor_{token}"
        if lead:
            path.write_text(token)
        sees = distributed.gather(_sees(path, token))
        if lead:
            path.unlink()
        rows.append(shared_row(sees, processes, folder))
    rows += _config_rows(resolved, dataset, processes)
    if lead:
        rows.append(wandb_row(config.wandb.project, dict(os.environ)))
    return rows


def _config_rows(
    config: Config | None, dataset: Dataset | Streamed | None, processes: list[str]
) -> list[Row]:
    """Whether the config fits the devices, and how fast its data comes. A collective."""
    prints = distributed.gather_text(dataset.fingerprint if dataset else "none")
    rows = []
    if len(set(prints)) > 1:
        remedy = "all hosts must see the same dataset.path"
        rows.append(Row("dataset", FAIL, by_value(prints, processes), remedy))
    if config is None or dataset is None or len(set(prints)) > 1:
        return rows
    try:
        sizes = sharding.mesh_sizes(config, jax.device_count(), shrink_to_fit=cli.is_debug())
    except ConfigError as error:
        return [*rows, Row("mesh", FAIL, str(error))]
    shape = sharding.batch_shape(config, sizes)
    rate = _attempt(lambda: _data_rate(config, dataset, sharding.make_mesh(sizes), shape))
    rates = distributed.gather_text(str(rate))
    bad = [f"{who}: {text}" for who, text in zip(processes, rates, strict=True) if not _is_number(text)]
    micro_steps, size, _ = shape
    mesh = " × ".join(f"{axis} {length}" for axis, length in sizes.items())
    seen = f"{mesh}; {config.batch_size} sequences are {micro_steps} micro-steps of {size}"
    rows.append(Row("mesh", OK, seen))
    if bad:
        rows.append(Row("dataset", FAIL, "; ".join(bad), "see that all hosts can read dataset.path"))
    else:
        slowest = trackers.quantity(min(map(float, rates)))
        rows.append(Row("dataset", OK, f"{dataset.folder}: {slowest} tokens/s in the slowest process"))
    return rows


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def run(place: distributed.Place) -> list[Row]:
    """All checks, in the order in which a run would meet what they find. A collective."""
    rows, config, dataset, resolved = [], cli.unresolved(), None, None
    try:
        resolved, dataset = cli.read()
    except (ConfigError, DatasetError) as error:
        name = "dataset" if isinstance(error, DatasetError) else "config"
        rows.append(Row(name, FAIL, str(error)))
    else:
        rows.append(Row("config", OK, "it can work"))
    rows.append(Row("place", OK, f"{place.source}, processes: {place.num_processes}"))
    try:
        told = distributed.configure(config.platform, config.cpu_devices, cli.cache(), place)
        rows.append(Row("settings", OK, told))
        coordinator = ""
        if place.num_processes > 1:
            distributed.check_coordinator(place)
            gpus = distributed.visible_gpus(os.environ, place) if config.platform != "cpu" else []
            _, coordinator = rendezvous.meet(
                *(place.process_id, place.num_processes, place.coordinator, {}, gpus),
                *(cli.wait_seconds(), lambda: ""),
            )
        distributed.initialize(config.platform, place, coordinator)
    except rendezvous.MeetingError as error:
        return [*rows, Row("processes", FAIL, str(error))]
    except distributed.PlaceError as error:
        return [*rows, Row("devices", FAIL, str(error))]
    return rows + examine(config, dataset, resolved, cli.workdir())
