"""The run's folder: made, writable, and held by one job at a time."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from absl import logging

from trainit.config import ConfigError

BEAT_SECONDS = 5.0  # between two signs of life of the holder
DEAD_SECONDS = 17.0  # without any, a holder on another host is dead


def make_folder(folder: Path, process: int) -> Path:
    """The folder, created and writable.

    Raises:
        ConfigError: it cannot be written by this process.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / "logs" / f".probe_{process}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={folder} cannot be written: {error.strerror}") from None
    return folder


def write_json(path: Path, value: dict):
    """Writes a file that is whole or not there."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.rename(path)


class RunLock:
    """WORKDIR/lock.json says which job writes here. Its holder touches it as long as it lives."""

    def __init__(self, job: str, lost: Callable[[str], None]):
        """
        Args:
            job: what the scheduler calls this one.
            lost: called with a message when another job has taken the folder over.
        """
        self._lost, self._path, self._released = lost, None, threading.Event()
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "namespace": _namespace(),
            "job": job,
            "since": time.strftime("%F %T %z"),
            "id": secrets.token_hex(8),
        }

    def take(self, folder: Path):
        """Takes the folder, at once where nobody holds it.

        Raises:
            ConfigError: another job, which lives, holds it.
        """
        path = folder / "lock.json"
        text = json.dumps(self._mine)
        while True:
            try:
                with path.open("x") as file:
                    file.write(text)
                break
            except FileExistsError:
                holder = _read(path)
            if _lives(path, holder):
                raise ConfigError(_held(folder, holder))
            if not path.exists():
                continue  # it was released meanwhile
            logging.info("workdir    taken over from %s: it is dead", _describe(holder))
            mine = path.with_suffix(f".{self._mine['id']}")
            mine.write_text(text)
            mine.replace(path)
            time.sleep(1)  # of two that take over at once, the last one has it
            if (holder := _read(path)).get("id") != self._mine["id"]:
                raise ConfigError(_held(folder, holder))
            break
        self._path = path
        threading.Thread(target=self._hold, name="workdir", daemon=True).start()

    def _hold(self):
        while not self._released.wait(BEAT_SECONDS):
            try:
                holder = _read(self._path)
                if holder.get("id") == self._mine["id"]:
                    os.utime(self._path)
            except OSError:  # the file system has a bad moment; a job that lives holds on
                continue
            if holder.get("id") != self._mine["id"] and not self._released.is_set():
                self._lost(f"--workdir={self._path.parent} was taken over by {_describe(holder)}")

    def release(self):
        """Nothing is written here any more."""
        if self._path and not self._released.is_set():
            self._released.set()
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict:
    """Who holds it; {} if nobody does, or while it is being written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _lives(path: Path, holder: dict) -> bool:
    """Whether the holder of a lock lives: its process on this host, on another its signs of life."""
    if holder.get("host") == socket.gethostname() and holder["namespace"] == _namespace() != "":
        return holder["started"] == _start_of(holder["pid"])
    before, until = _touched(path), time.monotonic() + DEAD_SECONDS
    logging.info("waiting    up to %.0f s, to see if %s is alive", DEAD_SECONDS, _describe(holder))
    while time.monotonic() < until:
        time.sleep(0.5)
        if (now := _touched(path)) != before:
            return now is not None
    return False


def _touched(path: Path) -> tuple | None:
    """When the lock was touched last. Opening it asks a network file system, past its caches."""
    try:
        with path.open() as file:
            stat = os.fstat(file.fileno())
            return stat.st_ino, stat.st_mtime_ns
    except FileNotFoundError:
        return None


def _start_of(pid: int) -> str:
    """When a process of this host was started; "" if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else ""
    except OSError:
        return ""


def _namespace() -> str:
    """In which process numbers mean the same; a host's containers have different ones."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _describe(holder: dict) -> str:
    if not holder:
        return "another job"
    return f"{holder['job']}, pid {holder['pid']} on {holder['host']}, since {holder['since']}"


def _held(folder: Path, holder: dict) -> str:
    return f"--workdir={folder} is held by {_describe(holder)}; wait until it ends, or use another --workdir"
