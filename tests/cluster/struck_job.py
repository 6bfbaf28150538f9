"""A job as launch/local.sh starts it, of whose processes tests see more, and to which they can do more."""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faulty import Page
from processes import Fork, free_port

GRACE_SECONDS = 30  # after a failure, in which the other processes have to end by themselves
LIMIT_SECONDS = 60  # in which a job has to end after a fault, or to continue, or to do its first step
GETFD = 438  # the number of Linux's pidfd_getfd
CONNECTED, LISTENS = "01", "0A"  # states of TCP sockets in /proc/net/tcp


def check(is_right: object, what: str):
    if not is_right:
        raise AssertionError(what)


class Job:
    """The processes of one start of a run, and what has been done to it."""

    def __init__(self, arguments: list[str], count: int, server: tuple, pages: Path, begun_at: int):
        """`begun_at` is the last step that was done before."""
        self.begun_at, self.launched, self.has_stepped = begun_at, time.monotonic(), False
        self.asked_at: int | None = None  # the last step that was done when it was first asked to stop
        self.may_fail_until, self.killed = 0.0, -1  # because of a fault; which process was killed
        self.is_cut = False  # has lost a connection
        self.was_ended = False  # because some of its processes did not end by themselves
        self._failed = float("inf")
        self.address = f"localhost:{free_port()}"
        variables = {"TRAINIT_COORDINATOR": self.address, "TRAINIT_TOKEN": secrets.token_hex(32)}
        self.pages, self.processes = [], []
        for rank in range(count):
            (path := pages / str(rank)).unlink(missing_ok=True)
            self.pages.append(Page(path))
            numbers = {"NUM_PROCESSES": count, "LOCAL_PROCESSES": count, "PROCESS_ID": rank, "LOCAL_ID": rank}
            variables |= {f"TRAINIT_{name}": str(value) for name, value in numbers.items()}
            self.processes.append(Fork(*arguments, server=server, FAULTS_PAGE=str(path), **variables))

    def poll(self) -> list[int] | None:
        """The exit codes, when all have ended. After a failure, ends those that do not by themselves."""
        codes = [process.poll() for process in self.processes]
        if any(code not in (None, 0, 75) for code in codes):
            self._failed = min(self._failed, time.monotonic())
        if None not in codes:
            return codes
        if time.monotonic() > self._failed + GRACE_SECONDS:
            self.was_ended = True
            self.kill()
        return None

    def wait(self, seconds: float = LIMIT_SECONDS) -> list[int]:
        """The exit codes, which have to come in this time."""
        self.wait_until(lambda: False, "the job has not ended", seconds)
        return [process.poll() for process in self.processes]

    def wait_until(
        self, condition: Callable[[], bool], otherwise: str, seconds: float = LIMIT_SECONDS
    ) -> bool:
        """Waits for a condition; False: the job has ended before. It is an error if neither comes in time."""
        until = time.monotonic() + seconds
        while not condition():
            if self.poll():
                return False
            check(time.monotonic() < until, f"{otherwise} in {seconds:.0f} s")
            time.sleep(0.002)
        return True

    def ask_to_stop(self, rank: int, number: int, step: int):
        """Sends a stop signal to a process, after this step."""
        self.asked_at = step if self.asked_at is None else self.asked_at
        self.processes[rank].send_signal(number)

    def may_fail(self):
        """Notes that a fault strikes which may end the job, at once or after a while."""
        self.may_fail_until = time.monotonic() + 2 * LIMIT_SECONDS

    def kill(self):
        for process in self.processes:
            process.kill()

    def output(self) -> str:
        """What all processes have printed, once they have ended."""
        return "".join(process.communicate()[0] for process in self.processes)

    def suspend(self, rank: int, seconds: float):
        """SIGSTOP, and after some seconds, or when all others have ended, SIGCONT."""
        self.processes[rank].send_signal(signal.SIGSTOP)
        others = [process for process in self.processes if process is not self.processes[rank]]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (others and all(p.poll() is not None for p in others)):
            time.sleep(0.02)
        self.processes[rank].send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class TcpSocket:
    """A TCP socket of another process."""

    pid: int
    number: int  # of its file descriptor
    state: str
    address: tuple[str, int]  # its own end

    def shut_down(self) -> bool:
        """Shuts the connection down in both directions; False if it has just been closed."""
        with contextlib.suppress(OSError), socket.socket(fileno=copy_of(self.pid, self.number)) as copy:
            copy.shutdown(socket.SHUT_RDWR)
            return True
        return False


def tcp_sockets(pid: int, state: str) -> list[TcpSocket]:
    """The TCP sockets of a process that are in a state; empty if it has ended."""
    return [found for found in _tcp_sockets(pid) if found.state == state]


def _tcp_sockets(pid: int) -> Iterator[TcpSocket]:
    known: dict[str, tuple[str, tuple[str, int]]] = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, own, _, state, *rest = line.split()
            number, port = own.split(":")
            # Words of four bytes, each in the order of this machine.
            words = [bytes.fromhex(number[at : at + 8])[::-1] for at in range(0, len(number), 8)]
            known[f"socket:[{rest[5]}]"] = state, (socket.inet_ntop(family, b"".join(words)), int(port, 16))
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if about := known.get(str(path.readlink())):
                    yield TcpSocket(pid, int(path.name), *about)


def copy_of(pid: int, number: int) -> int:
    """A copy of a file descriptor of another process. Raises OSError if there is none, or it is forbidden."""
    libc, process = ctypes.CDLL(None, use_errno=True), os.pidfd_open(pid)
    try:
        if (copy := libc.syscall(GETFD, process, number, 0)) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    return copy


def can_copy() -> bool:
    """Whether file descriptors of other processes can be copied here: containers may forbid it."""
    other = subprocess.Popen(["sleep", "60"])
    try:
        os.close(copy_of(other.pid, 0))
    except OSError:
        return False
    finally:
        other.kill()
        other.wait()
    return True
