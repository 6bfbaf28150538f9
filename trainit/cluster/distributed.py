"""Who am I among the processes, which devices are mine, and who leads?"""

import ctypes
import multiprocessing
import os
import platform as host_platform
import re
import signal
import socket
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax._src import distributed as jax_distributed  # its barrier has no public name
from jax.experimental import multihost_utils

from trainit.cluster import settings

HEARTBEAT_SECONDS = 90  # of JAX: what trainit/cluster/peers.py has not noticed much earlier


class PlaceError(ValueError):
    """This process has no right place among others. The message is one line and says what to do."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    source: str  # what said so
    coordinator: str = ""  # host:port of process 0
    num_processes: int = 1
    process_id: int = 0
    local_device_ids: tuple[int, ...] | None = None  # of the visible GPUs, those of this process; None: all
    hosts: int = 1  # that the job's processes run on
    gpus: int = 0  # that the scheduler has promised to this process; 0: it has not said


def find_place(environment: Mapping[str, str]) -> Place:
    """Finds this process's place: from a launch script, Slurm's srun, Grid Engine, Open MPI, or alone.

    Raises:
        PlaceError: the allocation promises other processes, but this one was started without them.
    """
    e = environment
    if "TRAINIT_NUM_PROCESSES" in e:  # launch/local.sh, launch/sge.sh
        count, here = int(e["TRAINIT_NUM_PROCESSES"]), int(e["TRAINIT_LOCAL_PROCESSES"])
        return Place(
            e.get("TRAINIT_JOB", "launch script"),
            e["TRAINIT_COORDINATOR"],
            count,
            int(e["TRAINIT_PROCESS_ID"]),
            _local_devices(e, here, int(e["TRAINIT_LOCAL_ID"])),
            -(-count // here),
        )
    if "SLURM_STEP_NODELIST" in e and "SLURM_PROCID" in e:  # inside srun
        job = f"Slurm job {e['SLURM_JOB_ID']}"
        count = int(e["SLURM_STEP_NUM_TASKS"])
        here = _tasks_per_node(e["SLURM_STEP_TASKS_PER_NODE"])[int(e["SLURM_NODEID"])]
        gpus = int(e.get("SLURM_GPUS_ON_NODE", 0)) // here
        if count == 1:
            return Place(job, gpus=gpus)
        address = f"{_first_host(e['SLURM_STEP_NODELIST'])}:{_port(e['SLURM_JOB_ID'])}"
        devices = _local_devices(e, here, int(e["SLURM_LOCALID"]))
        hosts = int(e["SLURM_STEP_NUM_NODES"])
        return Place(job, address, count, int(e["SLURM_PROCID"]), devices, hosts, gpus)
    if "SLURM_PROCID" in e and int(e.get("SLURM_NTASKS", 1)) > 1:
        raise PlaceError(
            f"Slurm job {e['SLURM_JOB_ID']} has SLURM_NTASKS={e['SLURM_NTASKS']}, but this process was "
            f"started without srun and would train alone; use launch/slurm.sh, or put srun in front"
        )
    if "OMPI_COMM_WORLD_SIZE" in e and int(e["OMPI_COMM_WORLD_SIZE"]) > 1:
        count, here = int(e["OMPI_COMM_WORLD_SIZE"]), int(e["OMPI_COMM_WORLD_LOCAL_SIZE"])
        head = re.search(r"tcp://([^,:;]+)", e.get("OMPI_MCA_orte_hnp_uri", ""))
        address = f"{head[1]}:{_port(e['OMPI_MCA_orte_hnp_uri'])}" if head else ""
        devices = _local_devices(e, here, int(e["OMPI_COMM_WORLD_LOCAL_RANK"]))
        return Place("Open MPI", address, count, int(e["OMPI_COMM_WORLD_RANK"]), devices, -(-count // here))
    if "SGE_TASK_ID" in e:
        if e.get("ENVIRONMENT") == "BATCH" and int(e.get("NHOSTS", 1)) > 1:
            raise PlaceError(
                f"Grid Engine job {e['JOB_ID']} has NHOSTS={e['NHOSTS']}, but this process was started "
                f"without launch/sge.sh and would train alone; submit launch/sge.sh, or ask for one host"
            )
        shell = "" if e.get("ENVIRONMENT") == "BATCH" else "alone, in a shell of "
        return Place(f"{shell}Grid Engine job {e['JOB_ID']}")
    return Place("alone, in a shell of a Slurm job" if "SLURM_JOB_ID" in e else "alone")


def _port(job: str) -> int:
    """A port in the upper, rarely used, end of the range: the same for all processes of a job."""
    return 61440 + int((re.match(r"\d+", job) or ["0"])[0]) % 4096


def _first_host(nodelist: str) -> str:
    """'n[03-05,9],m1' -> 'n03'"""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodelist)
    return match[1] + (match[2] or "")


def _tasks_per_node(text: str) -> list[int]:
    """'2(x3),1' -> [2, 2, 2, 1]"""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _local_devices(environment: Mapping[str, str], processes: int, number: int) -> tuple[int, ...] | None:
    """Which of the GPUs that CUDA_VISIBLE_DEVICES names are for the number-th of this host's processes."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else 0
    if processes == 1 or count <= 1:  # one process on this host, or each was given a GPU of its own
        return None
    if count % processes:
        raise PlaceError(
            f"CUDA_VISIBLE_DEVICES={visible} cannot be shared evenly by {processes} processes on this host; "
            f"ask for as many processes as GPUs, or for one"
        )
    each = count // processes
    return tuple(range(number * each, (number + 1) * each))


def give_back_memory():
    """Gives memory that is free in this process back to the system, where the C library can."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def configure(platform: str, cpu_devices: int, cache: Path, place: Place | None = None) -> str:
    """Chooses the devices and their settings. To be called before any other use of JAX.

    Args:
        platform: "cpu", "cuda", ...; empty: the best there is.
        cpu_devices: virtual devices of this process where it runs on the CPU.
        cache: folder for compiled programs, which later starts read back; JAX_COMPILATION_CACHE_DIR
            overrides it.
        place: of this process; without it, it is alone.

    Returns:
        The settings, for the log.

    Raises:
        PlaceError: TRAINIT_SETTINGS says what is not known.
    """
    place = place or Place("alone")
    here = settings.find(platform, os.environ, place.num_processes, place.hosts)
    try:
        told = settings.apply(here, os.environ)
    except settings.SettingsError as error:
        raise PlaceError(str(error)) from None
    if platform:
        jax.config.update("jax_platforms", platform)
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache / f"compiled-{_processor()}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return told


def initialize(platform: str, place: Place, coordinator: str = ""):
    """Makes this process's devices part of the job's.

    Args:
        platform: as for `configure`.
        place: of this process.
        coordinator: host:port for JAX's coordination service, where there are several processes.

    Raises:
        PlaceError: there is no such platform here, or the scheduler has promised other devices.
    """
    if place.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would take SIGTERM from trainit/cluster/peers.py.
        jax.config.update("jax_enable_preemption_service", False)
        # JAX aborts a process that misses process 0, often before cluster/peers.py has said who is gone.
        # The handler of SIGABRT is therefore sleep(SIGABRT): six seconds for the thread that says it.
        libc = ctypes.CDLL(None)
        libc.signal(int(signal.SIGABRT), libc.sleep)
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=place.num_processes,
            process_id=place.process_id,
            local_device_ids=place.local_device_ids,
            # JAX's own detection would set local_device_ids under Slurm, whatever else is given.
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=20,
        )
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        raise PlaceError(
            f"platform={platform!r} cannot be used here: {error or 'JAX has no such backend'}"
        ) from None
    if place.gpus and platform != "cpu" and len(devices) != place.gpus:
        raise PlaceError(
            f"{place.source} promises {place.gpus} GPUs to process {place.process_id} on "
            f"{socket.gethostname()}, but JAX has {len(devices)} × {devices[0].device_kind} there; see "
            f"nvidia-smi, and that the extra cuda12 or cuda13 is installed, or set --config.platform=cpu"
        )


def visible_gpus(environment: Mapping[str, str], place: Place) -> list[str]:
    """Names, unique in the world, of the NVIDIA GPUs that this process will use, in no order.

    Inside a container or a control group, numbers say nothing: each process may have a GPU 0 of its own.
    """
    there = list(settings.ask_nvidia_smi(environment))
    visible = there
    if "CUDA_VISIBLE_DEVICES" in environment:
        visible = []
        for word in environment["CUDA_VISIBLE_DEVICES"].split(","):
            if word.isdigit():
                visible += there[int(word) : int(word) + 1]
            else:
                visible += [uuid for uuid in there if word and uuid.startswith(word)]
    if place.local_device_ids is not None:
        visible = [visible[i] for i in place.local_device_ids if i < len(visible)]
    return visible


def check_coordinator(place: Place):
    """Raises PlaceError unless the coordinator's address is one that all hosts can reach."""
    host, _, _ = place.coordinator.rpartition(":")
    if not host:
        raise PlaceError(
            f"{place.source}: there are {place.num_processes} processes; add --coordinator=HOST:PORT"
        )
    try:
        address = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0]
    except OSError as error:
        raise PlaceError(
            f"the coordinator {place.coordinator} has no address ({error.strerror}); give --coordinator= a "
            f"name that this host knows, or an address"
        ) from None
    if place.hosts > 1 and (address.startswith("127.") or address == "::1"):
        raise PlaceError(
            f"the coordinator {place.coordinator} has the loopback address {address}, which "
            f"{place.hosts} hosts cannot share; give --coordinator= a name or address that all reach"
        )


def barrier(name: str, seconds: float):
    """All processes wait here for each other. No collective on devices, whose patience is their own.

    Args:
        name: of this barrier, which can be passed once.
        seconds: how long to wait; then an error is raised.
    """
    if jax.process_count() > 1:
        jax_distributed.global_state.client.wait_at_barrier(name, timeout_in_ms=int(1000 * seconds))


def agree(number: int) -> int:
    """The lead process's number, on every process; a collective where there are several."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather(number: int) -> list[int]:
    """The number of every process, in order; a collective where there are several."""
    if jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.int32(number)).tolist()


def gather_text(text: str) -> list[str]:
    """The text of every process, in order; a collective where there are several."""
    if jax.process_count() == 1:
        return [text]
    own = text.encode()
    padded = np.zeros(max(gather(len(own))), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(padded)]


def _processor() -> str:
    """A short name for this host's kind of CPU: programs compiled for another one must not run here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [host_platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return f"{host_platform.machine()}-{zlib.crc32(features[0].encode()):08x}"


def is_lead() -> bool:
    """Whether this is the process that writes for all: metrics, logs on the terminal, W&B."""
    return jax.process_index() == 0


def leave(code: int, together: bool = False):
    """Ends the process with this exit code, without waiting minutes for peers that are lost.

    Args:
        code: exit code.
        together: all processes leave now and none is lost: they wait for each other.
    """
    if together and jax.process_count() > 1:
        jax.distributed.shutdown()
    for worker in multiprocessing.active_children():
        worker.kill()
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
