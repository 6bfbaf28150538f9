"""Checks what a run needs, before it is run: the same command under the same launcher.

    python -m trainit.tools.doctor --config=configs/pile_gpt.py
    launch/local.sh, launch/slurm.sh and launch/sge.sh run it with TRAINIT_MODULE=trainit.tools.doctor

Prints a table, with what to do about each check that fails. Exit code 0 if none does, else 1.
"""

import json
import netrc
import os
import platform
import secrets
import shutil
import socket
import statistics
import textwrap
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit import __version__, cli
from trainit.cluster import distributed, rendezvous, run_lock
from trainit.config import Config, ConfigError
from trainit.data import training_data
from trainit.data.dataset import Dataset, DatasetError
from trainit.data.jsonl.dataset import Streamed
from trainit.parallel import sharding
from trainit.train import trackers

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SKEW_SECONDS = 5.0  # by which clocks may differ: logs and file times are compared across hosts
SHARED_SECONDS = 10.0  # that a network file system may take to show a new file elsewhere
REDUCE_BYTES = {"cpu": 1 << 22}  # of each device in an all-reduce that is timed
REDUCE_BYTES_DEFAULT = 1 << 26
OK, NOTE, FAIL = "ok", "note", "FAIL"
COLUMNS = 84  # of what was found, beside the names of checks


@dataclass(frozen=True)
class Row:
    """The outcome of one check."""

    name: str
    verdict: str  # OK, NOTE or FAIL
    seen: str
    remedy: str = ""


def table(rows: list[Row]) -> str:
    """Aligned, a remedy under each check that failed, and a count."""
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        remedy = f"\n-> {row.remedy}" * (row.verdict == FAIL and row.remedy != "")
        parts = [part for text in (row.seen + remedy).splitlines() for part in textwrap.wrap(text, COLUMNS)]
        heads = [f"{row.name:{width}}  {row.verdict:4}  "] + [" " * (width + 8)] * (len(parts) - 1)
        lines += [head + part for head, part in zip(heads, parts, strict=True)]
    failed = sum(row.verdict == FAIL for row in rows)
    lines.append(f"{failed} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed")
    return "\n".join(lines)


def by_value(values: list, processes: list[str]) -> str:
    """'0.10.2: process 0 (n1); 0.11.0: process 1 (n2)', for values that should be the same everywhere."""
    groups: dict[str, list[str]] = {}
    for value, process in zip(values, processes, strict=True):
        groups.setdefault(str(value), []).append(process)
    return "; ".join(f"{value}: {', '.join(who[:8])}" for value, who in groups.items())


def versions_row(found: list[dict], processes: list[str]) -> Row:
    """Whether all processes have the same versions."""
    different = [name for name in found[0] if len({f[name] for f in found}) > 1]
    if different:
        seen = "; ".join(f"{name} {by_value([f[name] for f in found], processes)}" for name in different)
        return Row("versions", FAIL, seen, "install the same environment on all hosts: see TRAINIT_ACTIVATE")
    return Row("versions", OK, ", ".join(f"{name} {number}" for name, number in found[0].items()))


def devices_row(kinds: list[list[str]], processes: list[str]) -> Row:
    """Whether all processes have the same devices."""
    texts = [f"{len(k)} × {k[0]}" for k in kinds]
    if len(set(texts)) > 1:
        return Row(
            "devices",
            FAIL,
            by_value(texts, processes),
            "ask for the same number and kind of GPUs on each host",
        )
    return Row("devices", OK, f"{texts[0]} in each of {len(processes)} processes")


def clock_row(before: float, clocks: list[float], after: float, processes: list[str]) -> Row:
    """How far clocks are apart that were read at the same time, but for the time between two barriers."""
    skew, bound = max(clocks) - min(clocks), after - before
    slowest, fastest = (processes[clocks.index(choose(clocks))] for choose in (min, max))
    seen = f"{skew:.2f} s apart at most (read within {bound:.2f} s)"
    if skew - bound > SKEW_SECONDS:
        seen = f"{fastest} is {skew:.1f} s ahead of {slowest}"
        return Row("clocks", FAIL, seen, "have the hosts' clocks set by NTP")
    return Row("clocks", OK, seen)


def write_row(errors: list[str], processes: list[str], folder: Path) -> Row:
    """Whether every process can write to the run's folder."""
    bad = {process: error for process, error in zip(processes, errors, strict=True) if error}
    if bad:
        remedy = "give a --workdir= that all hosts can write to, and see its quota"
        return Row("workdir", FAIL, "; ".join(f"{who}: {why}" for who, why in bad.items()), remedy)
    free = shutil.disk_usage(folder).free / 2**30
    return Row("workdir", OK, f"{folder} can be written, {free:.0f} GiB free")


def shared_row(sees: list[bool], processes: list[str], folder: Path) -> Row:
    """Whether what the lead writes into the run's folder is seen by all."""
    blind = [process for process, good in zip(processes, sees, strict=True) if not good]
    if blind:
        seen = f"what {processes[0]} writes to {folder} is not seen by {', '.join(blind[:8])}"
        return Row("shared", FAIL, seen, "give a --workdir= on a file system that all hosts share")
    return Row("shared", OK, f"what process 0 writes there is seen by all of {len(processes)}")


def wandb_row(project: str, environment: dict[str, str]) -> Row:
    """Whether W&B can be reached, if it is used. Tells where a key is found, never the key."""
    if not project:
        return Row("wandb", NOTE, "not used: wandb.project is empty")
    if environment.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return Row("wandb", OK, f"{environment['WANDB_MODE']}: nothing leaves this machine")
    url = urllib.parse.urlparse(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), timeout=5).close()
    except OSError as error:
        seen = f"{url.hostname}:{port} cannot be reached: {error.strerror or error}"
        return Row("wandb", FAIL, seen, "set WANDB_MODE=offline, and wandb sync later, or see the proxy")
    try:
        login = netrc.netrc().authenticators(url.hostname)
    except (OSError, netrc.NetrcParseError):
        login = None
    if not (environment.get("WANDB_API_KEY") or login):
        return Row("wandb", FAIL, f"{url.hostname} is there, but no login", "run: wandb login")
    return Row("wandb", OK, f"{url.hostname} is there, with a login")


def _reduce_over(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[bool, float]:
    """Whether an all-reduce over these axes is right, and its bus bandwidth in bytes per second.

    Each device holds its number + 1 times 0, 1, 2, ...; sums have a closed form that float32 has exactly.
    """
    shape = mesh.devices.shape
    numbers = np.arange(1, mesh.size + 1, dtype=np.float32).reshape(shape)
    over = tuple(mesh.axis_names.index(axis) for axis in axes)
    sums = np.broadcast_to(numbers.sum(axis=over, keepdims=True), shape).ravel()
    ramp = np.arange(size // 4, dtype=np.float32) % 61
    layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    given = jax.make_array_from_callback(
        (mesh.size, len(ramp)), layout, lambda index: numbers.ravel()[index[0]][:, None] * ramp
    )
    reduce = jax.jit(
        jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=layout.spec, out_specs=layout.spec)
    )
    summed = reduce(given)
    right = all(
        np.array_equal(part.data, sums[part.index[0]][:, None] * ramp) for part in summed.addressable_shards
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(reduce(given))
        seconds.append(time.perf_counter() - start)
    count = int(np.prod([shape[i] for i in over]))
    return right, 2 * (count - 1) / count * size / statistics.median(seconds)


def reduce_rows(hosts: list[str]) -> list[Row]:
    """All-reduces within hosts and between them. A collective.

    Args:
        hosts: of each process.
    """
    devices = jax.devices()
    names = list(dict.fromkeys(hosts))
    by_host = [[d for d in devices if hosts[d.process_index] == name] for name in names]
    if len({len(group) for group in by_host}) > 1:
        return [Row("all-reduce", NOTE, "not timed: the hosts have different numbers of devices")]
    mesh = Mesh(np.array(by_host), ("hosts", "devices"))
    size = REDUCE_BYTES.get(devices[0].platform, REDUCE_BYTES_DEFAULT)
    rows = []
    for name, axes, several in (
        ("all-reduce", ("hosts", "devices"), True),
        ("within hosts", ("devices",), len(by_host[0]) > 1),
        ("between hosts", ("hosts",), len(names) > 1),
    ):
        if not several:
            rows.append(Row(name, NOTE, f"there is one {axes[0].removesuffix('s')} only"))
            continue
        right, rate = _reduce_over(mesh, axes, size)
        wrong = [host for host, good in zip(hosts, distributed.gather(right), strict=True) if not good]
        seen = f"{rate / 1e9:.2f} GB/s bus bandwidth over {size >> 20} MiB of float32 a device"
        if wrong:
            remedy = "see the network and drivers of these hosts; try NCCL_DEBUG=INFO, or without them"
            rows.append(Row(name, FAIL, f"wrong sums on {', '.join(sorted(set(wrong)))}", remedy))
        else:
            rows.append(Row(name, OK, seen))
    return rows


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


def _run(place: distributed.Place) -> list[Row]:
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


def main() -> int:
    trackers.log_to_terminal(lead=False)
    try:
        place = cli.place()
    except (ConfigError, distributed.PlaceError) as error:
        cli.say(error)
        return cli.USAGE_ERROR
    rows = _run(place)
    if place.process_id == 0:
        print(table(rows), flush=True)
    code, together = int(any(row.verdict == FAIL for row in rows)), any(r.name == "clocks" for r in rows)
    distributed.leave(distributed.agree(code) if together else code, together)


if __name__ == "__main__":
    cli.run(main)
