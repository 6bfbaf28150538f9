"""This process's devices: chooses and configures them, and makes them part of the job's."""

import os
import platform as host_platform
import resource
import socket
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
from jax._src import cache_key

from trainit import __version__
from trainit.cluster import hardware, xla_flags
from trainit.cluster.place import Place, SetupError
from trainit.cluster.process import delay_abort

# JAX gives a silent process up after this long. Trainit's own monitor reacts earlier and says more.
JAX_HEARTBEAT_SECONDS = 90

# Where Linux says how much memory a container or a job may use, in versions 2 and 1; "max": without a limit.
CONTROL_GROUPS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def configure(
    platform: str, cpu_devices: int, cache: Path, place: Place | None = None, trains: bool = True
) -> str:
    """Chooses the devices and their settings, which it returns for the log. Call it before any use of JAX.

    The platform is "cpu", "cuda", ..., or "" for the best one. In the cache, later starts find compiled
    programs; JAX_COMPILATION_CACHE_DIR overrides it. Without a place, the process is alone. If it does not
    train, settings for the step are left out.
    """
    place = place or Place("alone")
    found = hardware.detect(platform, os.environ, place.num_processes, place.hosts)
    settings = xla_flags.apply(found, os.environ, trains)
    if platform:
        jax.config.update("jax_platforms", platform)
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache / f"compiled-{_processor()}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return settings


def initialize(platform: str, place: Place, coordinator: str = ""):
    """Makes this process's devices part of the job's. SetupError: no such platform, or not as many GPUs."""
    if place.num_processes > 1:
        _connect(place, coordinator)
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error) or "JAX has no such backend"
        raise SetupError(f"platform={platform!r} cannot be used here: {reason}") from None
    if place.num_processes > 1 and devices[0].platform == "cpu":
        # Process 0 alone writes the cache of programs. JAX's names for them describe CPUs differently in each
        # process: the others would find none. May go when the names are the same, as they are for GPUs.
        # A JAX without this function compiles in each process, as it did before.
        cache_key._hash_accelerator_config = lambda hash_obj, accelerators, *_, **__: hash_obj.update(
            repr([(device.device_kind, device.process_index) for device in accelerators.flat]).encode()
        )
    if place.gpus and platform != "cpu" and len(devices) != place.gpus:
        raise SetupError(
            f"{place.source} promises {place.gpus} GPUs to process {place.process_id} on "
            f"{socket.gethostname()}, but JAX has {len(devices)} × {devices[0].device_kind} there; see "
            f"nvidia-smi, and that the extra cuda12 or cuda13 is installed, or set --config.platform=cpu"
        )


def _connect(place: Place, coordinator: str):
    """Connects to JAX's coordination service, which process 0 starts; returns when all processes have."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would take SIGTERM away from cluster/monitor.py.
    jax.config.update("jax_enable_preemption_service", False)
    delay_abort()
    jax.distributed.initialize(
        coordinator_address=coordinator,
        # By default process 0 listens at all addresses of its host; nothing there asks who calls.
        coordinator_bind_address=coordinator if place.process_id == 0 else None,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        # JAX's own detection would override local_device_ids under Slurm.
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=20,
    )


def memory(processes: int = 1) -> int:
    """The bytes that each device of this process has; on CPUs, with this many of the job's processes there.

    Devices that do not know it have 0. Without a limit of the system, a CPU has what the machine has.
    """
    own = jax.local_devices()
    if own[0].platform != "cpu":
        return min((device.memory_stats() or {}).get("bytes_limit", 0) for device in own)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [
        int(file.read_text()) for file in CONTROL_GROUPS if file.exists() and file.read_text()[0] != "m"
    ]
    return min(limits) // (len(own) * processes)


def computed_on(mesh: Mapping[str, int], attention: str) -> str:
    """The job's devices, and how a run lies on them. Jobs with one text compute the same, bit for bit."""
    first, flags = jax.local_devices()[0], zlib.crc32(os.environ.get("XLA_FLAGS", "").encode())
    kind = first.device_kind
    if first.platform == "cpu" and hasattr(os, "sched_getaffinity"):  # sums depend on the number of cores
        kind = f"cpu {_processor()}, {len(os.sched_getaffinity(0))} cores"
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    return (
        f"{jax.device_count()} × {kind}, {jax.process_count()} processes, mesh {sizes}, attention "
        f"{attention}, Trainit {__version__}, JAX {jax.__version__}, XLA_FLAGS {flags:08x}"
    )


def peak_memory() -> int:
    """The most bytes that were in use on any device of this process; on CPUs, in the process itself."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    """A short name for this host's kind of CPU: programs compiled for another one must not run here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [host_platform.processor()]
    features = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return f"{host_platform.machine()}-{zlib.crc32(features[0].encode()):08x}"
