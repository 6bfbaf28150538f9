"""Finds out which of the job's processes this one is: from flags, or the launcher's environment variables."""

import argparse
import dataclasses
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from trainit.config import ConfigError


class SetupError(ConfigError):
    """This process cannot take part in the job as it was started. The message is one line, with a remedy."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    source: str  # the launcher or scheduler that the rest was read from
    coordinator: str = ""  # host:port at which process 0 listens while the processes meet
    num_processes: int = 1
    process_id: int = 0
    local_device_ids: tuple[int, ...] | None = None  # this process's share of the visible GPUs; None: all
    hosts: int = 1  # on which the job's processes run
    gpus: int = 0  # that the scheduler promises to this process; 0: it does not say


def find_own_place(arguments: argparse.Namespace) -> Place:
    """This process's place, from its flags or else from its environment; SetupError if it has none."""
    count, process = arguments.num_processes, arguments.process_id
    if process and process >= count:
        raise SetupError(f"--process_id={process} must be below --num_processes={count}")
    place = Place("flags", "", count, process) if count else find_place(os.environ)
    return dataclasses.replace(place, coordinator=arguments.coordinator or place.coordinator)


def find_place(environment: Mapping[str, str]) -> Place:
    """This process's place; SetupError if it is alone but should not be, or variables are wrong."""
    try:
        return _find(environment)
    except SetupError:
        raise
    except (KeyError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        remedy = "use launch/slurm.sh or sge.sh, or set --num_processes, --process_id and --coordinator"
        raise SetupError(f"the launcher's variables cannot be read: {what}; {remedy}") from None


def _find(e: Mapping[str, str]) -> Place:
    # Launch scripts come first: they run inside of Slurm, Grid Engine or Open MPI and know more.
    if "TRAINIT_NUM_PROCESSES" in e:
        return _from_launch_script(e)
    if "SLURM_STEP_NODELIST" in e and "SLURM_PROCID" in e:  # started by srun
        return _from_slurm(e)
    if "SLURM_PROCID" in e and _number(e, "SLURM_NTASKS", 1) > 1:
        raise SetupError(
            f"Slurm job {e['SLURM_JOB_ID']} has SLURM_NTASKS={e['SLURM_NTASKS']}, but this process was "
            f"started without srun and would train alone; use launch/slurm.sh, or put srun in front"
        )
    if _number(e, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _from_open_mpi(e)
    if "SGE_TASK_ID" in e:
        return _from_grid_engine(e)
    return Place("alone, in a shell of a Slurm job" if "SLURM_JOB_ID" in e else "alone")


def check_coordinator(place: Place):
    """Raises SetupError unless all hosts of the job can reach the coordinator's address."""
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        found = f"{place.source}: {place.num_processes} processes, with the coordinator {place.coordinator!r}"
        raise SetupError(f"{found}; add --coordinator=HOST:PORT")
    try:
        address = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0]
    except OSError as error:
        raise SetupError(
            f"the coordinator {place.coordinator} has no address ({error.strerror}); give --coordinator= a "
            f"name that this host knows, or an address"
        ) from None
    if place.hosts > 1 and (str(address).startswith("127.") or address == "::1"):
        raise SetupError(
            f"the coordinator {place.coordinator} has the loopback address {address}, which "
            f"{place.hosts} hosts cannot share; give --coordinator= a name or address that all reach"
        )


def _number(e: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = e[name] if default is None else e.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is no whole number")
    return int(text)


def _from_launch_script(e: Mapping[str, str]) -> Place:
    """launch/local.sh and launch/sge.sh export all of it."""
    count, on_host = _number(e, "TRAINIT_NUM_PROCESSES"), _number(e, "TRAINIT_LOCAL_PROCESSES")
    job, address = e.get("TRAINIT_JOB", "launch script"), e["TRAINIT_COORDINATOR"]
    devices = _local_devices(e, on_host, _number(e, "TRAINIT_LOCAL_ID"))
    return Place(job, address, count, _number(e, "TRAINIT_PROCESS_ID"), devices, hosts=-(-count // on_host))


def _from_slurm(e: Mapping[str, str]) -> Place:
    """srun sets SLURM_STEP_* for the job step that it starts; a step may be smaller than the job."""
    job = f"Slurm job {e['SLURM_JOB_ID']}"
    tasks, node = _tasks_per_node(e["SLURM_STEP_TASKS_PER_NODE"]), _number(e, "SLURM_NODEID")
    if node >= len(tasks):
        raise ValueError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE has {len(tasks)} nodes")
    count, on_host = _number(e, "SLURM_STEP_NUM_TASKS", sum(tasks)), tasks[node]
    gpus = _number(e, "SLURM_GPUS_ON_NODE", 0) // on_host
    if count == 1:
        return Place(job, gpus=gpus)
    # Each step has a port of its own: what is left of the one before may still listen.
    port = _port(f"{_number(e, 'SLURM_JOB_ID') + _number(e, 'SLURM_STEP_ID', 0)}")
    address = f"{_first_host(e['SLURM_STEP_NODELIST'])}:{port}"
    devices = _local_devices(e, on_host, _number(e, "SLURM_LOCALID"))
    process, hosts = _number(e, "SLURM_PROCID"), _number(e, "SLURM_STEP_NUM_NODES")
    return Place(job, address, count, process, devices, hosts, gpus)


def _from_open_mpi(e: Mapping[str, str]) -> Place:
    """The first address of mpirun's own URI, where it sets one, is on the host of process 0."""
    count, on_host = _number(e, "OMPI_COMM_WORLD_SIZE"), _number(e, "OMPI_COMM_WORLD_LOCAL_SIZE")
    head = re.search(r"tcp://([^,:;]+)", e.get("OMPI_MCA_orte_hnp_uri", ""))
    address = f"{head[1]}:{_port(e['OMPI_MCA_orte_hnp_uri'])}" if head else ""
    devices = _local_devices(e, on_host, _number(e, "OMPI_COMM_WORLD_LOCAL_RANK"))
    process = _number(e, "OMPI_COMM_WORLD_RANK")
    return Place("Open MPI", address, count, process, devices, hosts=-(-count // on_host))


def _from_grid_engine(e: Mapping[str, str]) -> Place:
    """Grid Engine itself starts one process only; launch/sge.sh starts the others."""
    is_batch = e.get("ENVIRONMENT") == "BATCH"
    if is_batch and _number(e, "NHOSTS", 1) > 1:
        raise SetupError(
            f"Grid Engine job {e['JOB_ID']} has NHOSTS={e['NHOSTS']}, but this process was started "
            f"without launch/sge.sh and would train alone; submit launch/sge.sh, or ask for one host"
        )
    return Place(f"{'' if is_batch else 'alone, in a shell of '}Grid Engine job {e['JOB_ID']}")


def _port(job: str) -> int:
    """A port in the upper, rarely used, end of the range: the same for all processes of a job."""
    return 61440 + int("".join(re.findall(r"^\d+", job)) or 0) % 4096


def _first_host(nodelist: str) -> str:
    """'n[03-05,9],m1' -> 'n03'"""
    return "".join(re.findall(r"^([^,\[]*)(?:\[(\d+))?", nodelist)[0])


def _tasks_per_node(text: str) -> list[int]:
    """'2(x3),1' -> [2, 2, 2, 1]"""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _local_devices(environment: Mapping[str, str], processes: int, local_id: int) -> tuple[int, ...] | None:
    """This process's even share of the GPUs in CUDA_VISIBLE_DEVICES, as indices; None: all of them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else 0
    if processes == 1 or count <= 1:  # one process on this host, or each was given a GPU of its own
        return None
    if count % processes:
        raise SetupError(
            f"CUDA_VISIBLE_DEVICES={visible} cannot be shared evenly by {processes} processes on this host; "
            f"ask for as many processes as GPUs, or for one"
        )
    each = count // processes
    return tuple(range(local_id * each, (local_id + 1) * each))
