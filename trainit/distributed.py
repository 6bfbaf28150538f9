"""Who am I among the processes, who leads, and has somebody asked the run to stop?"""

import os
import platform as host
import signal
import sys
import time
import zlib
from pathlib import Path

import jax
from absl import logging
from jax.experimental import multihost_utils

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def initialize(
    platform: str,
    cpu_devices: int,
    cache: Path,
    coordinator: str = "",
    num_processes: int = 1,
    process_id: int = 0,
):
    """Makes this process one of the job's. To be called before any other use of JAX.

    Args:
        platform: "cpu", "cuda", ...; empty: the best there is.
        cpu_devices: virtual devices of this process where it runs on the CPU.
        cache: folder for compiled programs, which later starts read back; JAX_COMPILATION_CACHE_DIR
            overrides it.
        coordinator: "host:port" of process 0; every process needs it where there are several.
        num_processes: of the job.
        process_id: this process's number, from 0.
    """
    if platform:
        jax.config.update("jax_platforms", platform)
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache / f"compiled-{_processor()}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            # JAX's own detection would set local_device_ids under Slurm, whatever else is given.
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )


def _processor() -> str:
    """A short name for this host's kind of CPU: programs compiled for another one must not run here."""
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    return f"{host.machine()}-{zlib.crc32(''.join(flags[:1]).encode()):08x}"


def is_lead() -> bool:
    """Whether this is the process that writes for all: metrics, logs on the terminal, W&B."""
    return jax.process_index() == 0


class StopRequest:
    """Notices that the run should stop: a signal, or its time is over. All processes agree on the step.

    Several processes agree through JAX's preemption service, which listens to SIGTERM: other signals
    are turned into it. A second SIGINT ends the process at once.
    """

    def __init__(self, max_minutes: float):
        """
        Args:
            max_minutes: from now until the run should stop by itself; 0: never.
        """
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self._reason = ""
        self._several = jax.process_count() > 1
        for number in STOP_SIGNALS:
            if not (self._several and number == signal.SIGTERM):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str):
        self._reason = self._reason or reason
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> str:
        """Why the run should stop before `step`, or "". The same on every process; call it every step."""
        if time.monotonic() > self._deadline and is_lead() and not self._reason:
            self._ask("max_minutes")
        if not self._several:
            return self._reason
        return (self._reason or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else ""


def leave(code: int):
    """Ends the process with this exit code; after a failure, without waiting minutes for lost peers."""
    if code in (0, 75):
        if jax.process_count() > 1:
            jax.distributed.shutdown()
        sys.exit(code)
    logging.flush()
    sys.stderr.flush()
    os._exit(code)
