"""The run's folder: made, writable, and held by one job at a time."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from absl import logging

from trainit.cluster.process import start_of
from trainit.config import ConfigError, require

BEAT_SECONDS = 5.0  # between two signs of life of the holder
SETTLE_SECONDS = 1.0  # in which all that take a dead holder's folder over have written to it
DEAD_SECONDS = 17.0  # without any, a holder on another host is dead


def make_folder(folder: Path, process: int) -> Path:
    """The folder, created; ConfigError if this process cannot write there."""
    where = folder
    require("**" not in str(folder.absolute()), f"--workdir={folder} has **, which checkpoints cannot have")
    try:
        try_to_write(folder / "logs", process)
        str(folder.absolute()).encode()
        where = folder / "checkpoints"
        if os.path.lexists(where):  # such as a link into another file system, which may not be there
            try_to_write(where, process)
    except OSError as error:
        raise ConfigError(f"--workdir={where} cannot be written: {error.strerror}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"--workdir={folder} is no UTF-8, which checkpoints need: rename it") from None
    return folder


def try_to_write(folder: Path, process: int):
    """Creates the folder and writes a block there; OSError if this process cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe_{process}"
    try:
        probe.write_bytes(bytes(4096))
    finally:
        probe.unlink(missing_ok=True)


class RunLock:
    """Keeps a second job out of a run's folder: WORKDIR/lock.json describes the job that writes there.

    The holder touches the file as long as it lives, so that a job on another host can see whether it does.
    File locks would not do: on network file systems they are missing, or outlive a host that went down.
    """

    def __init__(self, job: str, lost: Callable[[str], None]):
        """`job` is the scheduler's name of this one; `lost` is called when another has taken the folder."""
        self._lost, self._released = lost, threading.Event()
        self._path: Path | None = None
        self._settled = 0.0  # when nobody can take over any more from the holder before; a `time.monotonic()`
        self._own: dict = {"job": job, "since": time.strftime("%F %T %z"), "id": secrets.token_hex(8)}
        self._own |= {"host": socket.gethostname(), "namespace": _namespace()}
        self._own |= {"pid": os.getpid(), "started": start_of(os.getpid())}

    def take(self, folder: Path):
        """Takes the folder, at once if no job holds it; ConfigError if one does and is alive.

        Nothing may be written there before `confirm`.
        """
        path, text = folder / "lock.json", json.dumps(self._own)
        while True:
            if _create(path, text):
                break
            holder = _read(path)
            if holder and _is_alive(path, holder):
                raise ConfigError(_held(folder, holder))
            if not os.path.lexists(path):  # a link that leads nowhere is a lock, too
                continue  # it was released meanwhile
            # The holder is dead. If two take over at once, the last one to write has the folder.
            if holder:
                logging.info("workdir    taken over from %s: it is dead", _describe(holder))
            else:
                logging.warning("workdir    %s is damaged and names no job: replaced", path)
            _write_new(path, text).replace(path)
            self._settled = time.monotonic() + SETTLE_SECONDS
            break
        self._path = path
        threading.Thread(target=self._hold, args=(path,), name="workdir", daemon=True).start()

    def confirm(self):
        """Waits until nobody else can take a dead holder's folder over; ConfigError if somebody has.

        Does nothing in a process that has not taken it.
        """
        time.sleep(max(0.0, self._settled - time.monotonic()))
        if self._path and (other := _read(self._path)).get("id") != self._own["id"]:
            folder = self._path.parent
            raise ConfigError(
                _held(folder, other) if other else f"--workdir={folder} {_loss(self._path, other)}"
            )

    def _hold(self, path: Path):
        """Touches the lock now and then, and notices if another job has taken it over."""
        while not self._released.wait(BEAT_SECONDS):
            # If the file system fails for a moment, that is no reason to end the run.
            with contextlib.suppress(OSError):
                holder = _read(path)
                if holder.get("id") == self._own["id"]:
                    os.utime(path)
                elif not self._released.is_set():
                    self._lost(f"--workdir={path.parent} {_loss(path, holder)}")

    def release(self):
        """Lets other jobs in. Nothing may be written here any more."""
        if self._path and not self._released.is_set():
            self._released.set()
            with contextlib.suppress(OSError):  # it is the end: another job will find this one dead
                if _read(self._path).get("id") == self._own["id"]:  # who was suspended may have lost it
                    self._path.unlink()


def holder(folder: Path) -> str:
    """Which job holds a run's folder and is alive, or ""; waits as `take` does if it is on another host."""
    held = _read(folder / "lock.json")
    return _describe(held) if held and _is_alive(folder / "lock.json", held) else ""


def _create(path: Path, text: str) -> bool:
    """Creates the file with all of its text; False if there is one already. ConfigError if it cannot."""
    # Of two that come to a free folder at once, one makes the link. Nobody ever sees a part of the text.
    whole = _write_new(path, text)
    try:
        path.hardlink_to(whole)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def _write_new(path: Path, text: str) -> Path:
    """Writes the text for `path` to a file of its own next to it. ConfigError if it cannot."""
    whole = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        whole.write_text(text)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return whole


def _loss(path: Path, holder: dict) -> str:
    """What has become of a lock that is held no more."""
    if not path.parent.exists():
        return "was removed"
    if not holder:
        return f"has lost its {path.name}: {'damaged' if path.exists() else 'removed'}"
    return f"was taken over by {_describe(holder)}"


def _read(path: Path) -> dict:
    """Who holds it; {} if there is no file, or it is damaged."""
    try:
        holder = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(holder, dict) and isinstance(holder.get("pid"), int)
    texts = ("job", "since", "id", "host", "namespace", "started")
    return holder if is_whole and all(isinstance(holder.get(name), str) for name in texts) else {}


def _is_alive(path: Path, holder: dict) -> bool:
    """Whether a lock's holder is alive: its process if that is on this host, else its signs of life."""
    if holder.get("host") == socket.gethostname() and holder["namespace"] == _namespace() != "":
        return holder["started"] == start_of(holder["pid"])
    before, until = _touched(path), time.monotonic() + DEAD_SECONDS
    text = "waiting    up to %.0f s, to see if %s is alive"
    logging.log_every_n_seconds(logging.INFO, text, 60, DEAD_SECONDS, _describe(holder))
    while time.monotonic() < until:
        time.sleep(0.5)
        if (now := _touched(path)) != before:
            return now is not None
    return False


def _touched(path: Path) -> tuple | None:
    """When the lock was touched last. Opening it makes a network file system ask its server."""
    try:
        with path.open() as file:
            stat = os.fstat(file.fileno())
            return stat.st_ino, stat.st_mtime_ns
    except FileNotFoundError:
        return None


def _namespace() -> str:
    """In which namespace this host's process numbers are; each container may have its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _describe(holder: dict) -> str:
    return f"{holder['job']}, pid {holder['pid']} on {holder['host']}, since {holder['since']}"


def _held(folder: Path, holder: dict) -> str:
    return f"--workdir={folder} is held by {_describe(holder)}; wait until it ends, or use another --workdir"
