"""Checks that all processes have the same environment: versions, devices, clocks, the run's folder, trackers.

Each check judges values that were gathered from all processes; `processes` are their names, such as
"process 0 (host1)", in the same order.
"""

import os
import platform
import shutil
import socket
import time
import urllib.parse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from trainit import __version__
from trainit.tools.doctor.report import FAIL, NOTE, OK, Result, group_processes, judge, name_failures
from trainit.train.reports import tensorboard, wandb

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SKEW_SECONDS = 5.0  # that clocks may differ by: logs and file times are compared across hosts
SHARED_SECONDS = 10.0  # that a network file system may take to show a new file on another host


def versions() -> dict[str, str]:
    """Returns the versions that this process has."""
    own = {"Trainit": __version__, "Python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def check_versions(by_process: Sequence[dict[str, str]], processes: list[str]) -> Result:
    """Checks that all processes have the same versions."""
    own = {name: [each[name] for each in by_process] for name in by_process[0]}
    finding = ", ".join(f"{name} {values[0]}" for name, values in own.items())
    different = [
        f"{name} {group_processes(values, processes)}" for name, values in own.items() if len(set(values)) > 1
    ]
    remedy = "install the same environment on all hosts: see TRAINIT_ACTIVATE"
    return judge("versions", finding, "; ".join(different), remedy)


def check_devices(by_process: Sequence[list[str]], processes: list[str]) -> Result:
    """Checks that all processes have the same devices, from the kinds of each process's devices."""
    texts = [f"{len(kinds)} × {kinds[0]}" for kinds in by_process]
    failure = group_processes(texts, processes) if len(set(texts)) > 1 else ""
    remedy = "ask for the same number and kind of GPUs on each host"
    return judge("devices", f"{texts[0]} in each of {len(processes)} processes", failure, remedy)


def check_clocks(before: float, clocks: list[float], after: float, processes: list[str]) -> Result:
    """Checks that the hosts' clocks agree. Each was read at some moment between `before` and `after`.

    These two are this process's, in seconds.
    """
    skew, uncertainty = max(clocks) - min(clocks), after - before
    slowest, fastest = (processes[clocks.index(extreme(clocks))] for extreme in (min, max))
    failure = f"{fastest} is {skew:.1f} s ahead of {slowest}" * (skew - uncertainty > SKEW_SECONDS)
    finding = f"at most {skew:.2f} s apart (all read within {uncertainty:.2f} s)"
    return judge("clocks", finding, failure, "have the hosts' clocks set by NTP")


def check_workdir(errors: Sequence[str], processes: list[str], folder: Path) -> Result:
    """Checks that every process can write to the run's folder; `errors` are empty where it can."""
    if failures := name_failures(errors, processes):
        remedy = "give a --workdir= that all hosts can write to, and check its quota"
        return Result("workdir", FAIL, failures, remedy)
    free = shutil.disk_usage(folder).free / 2**30
    return Result("workdir", OK, f"{folder} can be written, {free:.0f} GiB free")


def appears(file: Path, content: str) -> bool:
    """Whether a file with this content appears within SHARED_SECONDS."""
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        if file.exists() and file.read_text() == content:
            return True
        time.sleep(0.2)
    return False


def check_shared(visible: Sequence[int], processes: list[str], folder: Path) -> Result:
    """Checks that each process sees (1 or 0) the file that process 0 has written to the run's folder."""
    blind = [process for process, sees in zip(processes, visible, strict=True) if not sees]
    failure = f"{', '.join(blind[:8])} cannot see what {processes[0]} writes to {folder}" * bool(blind)
    finding = f"all {len(processes)} processes see what process 0 writes to the workdir"
    return judge("shared", finding, failure, "give a --workdir= on a file system that all hosts share")


def check_tensorboard(names: Sequence[str]) -> list[Result]:
    """Checks that event files for TensorBoard can be written, if it is one of these trackers."""
    found = judge("tensorboard", "its files can be written", tensorboard.lacks(), "install it on all hosts")
    return [found] if "tensorboard" in names else []


def check_wandb(names: Sequence[str]) -> Result:
    """Checks that W&B can be reached, if it is one of these trackers. Reports whether there is a login."""
    if "wandb" not in names:
        return Result("wandb", NOTE, "not used: wandb.project is empty, or trackers does not name it")
    if (mode := os.environ.get("WANDB_MODE")) in wandb.OFFLINE:
        return Result("wandb", OK, f"{mode}: nothing leaves this machine")
    url = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        finding = f"{host}:{port} cannot be reached: {error.strerror or error}"
        remedy = "set WANDB_MODE=offline and run `wandb sync` later, or check the proxy"
        return Result("wandb", FAIL, finding, remedy)
    failure = f"{host} can be reached, but there is no login" * bool(wandb.lacks())
    return judge("wandb", f"{host} can be reached, with a login", failure, "run: wandb login")
