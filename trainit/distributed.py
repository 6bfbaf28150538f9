"""Who am I among the processes, who leads, and has somebody asked the run to stop?"""

import multiprocessing
import os
import platform as host_platform
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


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


def find_place(environment: Mapping[str, str]) -> Place:
    """Finds this process's place: from a launch script, Slurm's srun, Open MPI, or alone.

    Raises:
        PlaceError: the allocation promises other processes, but this one was started without them.
    """
    e = environment
    if "TRAINIT_NUM_PROCESSES" in e:  # launch/local.sh
        count, here = int(e["TRAINIT_NUM_PROCESSES"]), int(e["TRAINIT_LOCAL_PROCESSES"])
        return Place(
            "launch script",
            e["TRAINIT_COORDINATOR"],
            count,
            int(e["TRAINIT_PROCESS_ID"]),
            _local_devices(e, here, int(e["TRAINIT_LOCAL_ID"])),
            -(-count // here),
        )
    if "SLURM_STEP_NODELIST" in e and "SLURM_PROCID" in e:  # inside srun
        job = f"Slurm job {e['SLURM_JOB_ID']}"
        count = int(e["SLURM_STEP_NUM_TASKS"])
        if count == 1:
            return Place(job)
        here = _tasks_per_node(e["SLURM_STEP_TASKS_PER_NODE"])[int(e["SLURM_NODEID"])]
        address = f"{_first_host(e['SLURM_STEP_NODELIST'])}:{_port(e['SLURM_JOB_ID'])}"
        devices = _local_devices(e, here, int(e["SLURM_LOCALID"]))
        hosts = int(e["SLURM_STEP_NUM_NODES"])
        return Place(job, address, count, int(e["SLURM_PROCID"]), devices, hosts)
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


def initialize(platform: str, cpu_devices: int, cache: Path, place: Place):
    """Makes this process one of the job's. To be called before any other use of JAX.

    Args:
        platform: "cpu", "cuda", ...; empty: the best there is.
        cpu_devices: virtual devices of this process where it runs on the CPU.
        cache: folder for compiled programs, which later starts read back; JAX_COMPILATION_CACHE_DIR
            overrides it.
        place: of this process.

    Raises:
        PlaceError: the other processes could not reach the coordinator's address.
    """
    if place.num_processes > 1:
        _check_coordinator(place)
    if platform:
        jax.config.update("jax_platforms", platform)
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache / f"compiled-{_processor()}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if place.num_processes == 1:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            raise PlaceError(
                f"platform={platform!r} cannot be used here: {error or 'JAX has no such backend'}"
            ) from None
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        # JAX's own detection would set local_device_ids under Slurm, whatever else is given.
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )


def _check_coordinator(place: Place):
    host, _, _ = place.coordinator.rpartition(":")
    if not host:
        raise PlaceError(
            f"{place.source}: there are {place.num_processes} processes; add --coordinator=HOST:PORT"
        )
    if place.hosts > 1 and socket.gethostbyname(host).startswith("127."):
        raise PlaceError(
            f"the coordinator {place.coordinator} has the loopback address "
            f"{socket.gethostbyname(host)}, which {place.hosts} hosts cannot share; give --coordinator= a "
            f"name or address that all reach"
        )


def agree(number: int) -> int:
    """The lead process's number, on every process; a collective where there are several."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather_hosts() -> list[str]:
    """The host name of every process, in order; a collective."""
    name = np.zeros(64, np.uint8)
    own = socket.gethostname().encode()[:64]
    name[: len(own)] = np.frombuffer(own, np.uint8)
    names = np.atleast_2d(multihost_utils.process_allgather(name))
    return [bytes(row).rstrip(b"\0").decode() for row in names]


def _processor() -> str:
    """A short name for this host's kind of CPU: programs compiled for another one must not run here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [host_platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return f"{host_platform.machine()}-{zlib.crc32(features[0].encode()):08x}"


def is_lead() -> bool:
    """Whether this is the process that writes for all: metrics, logs on the terminal, W&B."""
    return jax.process_index() == 0


class StopRequest:
    """Notices that the run should stop: a signal, or its time is over. All processes agree on the step.

    To be made before `initialize`, so that no signal ends a process that is still starting. Several
    processes agree through JAX's preemption service, which listens to SIGTERM: other signals are turned
    into it. A second SIGINT ends the process at once.
    """

    def __init__(self):
        self._deadline, self._reason, self._told = float("inf"), "", False
        for number in STOP_SIGNALS:  # JAX takes SIGTERM over where there are several processes
            signal.signal(number, self._on_signal)

    def after(self, max_minutes: float, started: float):
        """Asks to stop so many minutes after `started` (`time.monotonic()`); 0: never."""
        self._deadline = started + 60 * max_minutes if max_minutes else float("inf")

    def _on_signal(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        self._reason = self._reason or signal.Signals(number).name

    def __call__(self, step: int) -> str:
        """Why the run should stop before `step`, or "". The same on every process; call it every step."""
        if time.monotonic() > self._deadline and is_lead():
            self._reason = self._reason or "max_minutes"
        if jax.process_count() == 1:
            return self._reason
        if self._reason and not self._told:
            self._told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return (self._reason or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else ""


def leave(code: int):
    """Ends the process with this exit code, without waiting minutes for peers that are lost."""
    if code in (0, 75) and jax.process_count() > 1:
        jax.distributed.shutdown()  # all have done their part: none is ended while another still saves
    for worker in multiprocessing.active_children():
        worker.kill()
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
