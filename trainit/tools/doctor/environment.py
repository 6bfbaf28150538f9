"""Whether all processes have the same environment: versions, devices, clocks, the run's folder, W&B."""

import netrc
import shutil
import socket
import urllib.parse
from pathlib import Path

from trainit.tools.doctor.report import FAIL, NOTE, OK, Row, by_value

SKEW_SECONDS = 5.0  # by which clocks may differ: logs and file times are compared across hosts


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
