"""Messages between the processes of a job: one JSON object a line, over TCP connections to process 0."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field


def describe_process(process: int, host: str = "", pid: int = 0) -> str:
    """A process's name for people: "process 3 (gpu08, pid 12)"; without a host, this process's."""
    return f"process {process} ({host or socket.gethostname()}, pid {pid or os.getpid()})"


def encode(message: dict) -> bytes:
    """A message as `receive` and `Peer.read` expect it."""
    return json.dumps(message).encode() + b"\n"


def receive(connection: socket.socket) -> dict:
    """Waits for one message; ValueError if the connection was closed, or what came is not JSON."""
    # Without a buffer, not a byte more is read: what follows belongs to whoever reads next.
    with connection.makefile("rb", buffering=0) as stream:
        return json.loads(stream.readline())


@dataclass
class Peer:
    """Another process, with the connection to it, as process 0 knows all others and they know process 0."""

    process: int
    host: str
    pid: int
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)  # when something last came from it
    status: dict = field(default_factory=dict)  # polls, doing, seconds: its newest sign of life
    unread: bytes = b""  # the beginning of a message whose end has not arrived
    left: bool = False  # it has announced that it leaves, or its connection is closed

    def __str__(self) -> str:
        return describe_process(self.process, self.host, self.pid)

    def read(self) -> list[dict] | None:
        """The messages that have arrived, without waiting; None once the connection is closed."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Peers(list[Peer]):
    """The processes that this one is connected to. Any thread may send."""

    def __init__(self) -> None:
        super().__init__()
        self._sending = threading.Lock()

    def connect(self, peers: Iterable[Peer]):
        """Takes over connections, which do not block from now on."""
        self.extend(peers)
        for peer in self:
            peer.connection.setblocking(False)

    def send(self, message: dict):
        """Sends to all of them. If one is lost, its reader notices."""
        with self._sending:
            for peer in self:
                with contextlib.suppress(OSError):
                    peer.connection.send(encode(message))

    def drain(self, close_first: bool, seconds: float):
        """Lets messages arrive before this process ends: waits until the others have closed their ends."""
        until = time.monotonic() + seconds
        for peer in self:
            with contextlib.suppress(OSError, ValueError):
                if close_first:
                    peer.connection.shutdown(socket.SHUT_WR)
                while time.monotonic() < until:
                    peer.connection.settimeout(until - time.monotonic())
                    if not peer.connection.recv(1 << 16):
                        break
