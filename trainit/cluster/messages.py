"""Messages between the processes of a job: signed JSON objects, a line each, over TCP to process 0."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from trainit.cluster.authentication import PROOF_BYTES, is_equal, signature

SIGNATURE_BYTES = 2 * PROOF_BYTES  # in hexadecimal digits
LONGEST_BYTES = 1 << 20  # of a message


def describe_process(process: int, host: str = "", pid: int = 0) -> str:
    """A process's name for people: "process 3 (gpu08, pid 12)"; without a host, this process's."""
    return f"process {process} ({host or socket.gethostname()}, pid {pid or os.getpid()})"


class Channel:
    """Signed messages over one connection, which never blocks.

    A message is a line: its signature, then a JSON object. Keys are of this connection and direction, and the
    signature covers the message's number: none can be forged, changed, repeated or left out by whoever is
    between the two hosts. Messages are not encrypted.
    """

    def __init__(self, connection: socket.socket, keys: tuple[bytes, bytes]):
        """The first of the `keys` signs what is sent, the second what is received."""
        connection.setblocking(False)
        self.connection = connection
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0  # messages
        self._unsent = self._unread = b""

    def send(self, message: dict):
        """Sends what the system takes now; the rest goes out with the next message. OSError if it is lost."""
        text = json.dumps(message).encode()
        self._unsent += signature(self._send_key, self._sent, text) + text + b"\n"
        self._sent += 1
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> dict | None:
        """The next message; None if it has not arrived. OSError once the connection is closed.

        ValueError if something has arrived that the other end has not sent.
        """
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST_BYTES:
                raise ValueError(f"a message of more than {LONGEST_BYTES} bytes")
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                return None
            if not data:
                raise ConnectionResetError("closed")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        signed, text = line[:SIGNATURE_BYTES], line[SIGNATURE_BYTES:]
        if not is_equal(signed, signature(self._receive_key, self._received, text)):
            raise ValueError("a message with a wrong signature")
        self._received += 1
        try:
            message = json.loads(text)
        except RecursionError:
            message = None
        if not isinstance(message, dict):
            raise ValueError("a message that is no JSON object")
        return message

    def finish(self, close: bool, seconds: float):
        """Sends what is left, and `close`s this end; then waits until the other end has closed its own."""
        until = time.monotonic() + seconds
        with contextlib.suppress(OSError, ValueError):  # ValueError: no time is left
            unsent, self._unsent = self._unsent, b""  # of two threads that come here, one sends it
            self.connection.settimeout(max(seconds, 0.01))
            self.connection.sendall(unsent)
            if close:
                self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(1 << 16):
                self.connection.settimeout(until - time.monotonic())


@dataclass
class Peer:
    """Another process, with the connection to it, as process 0 knows all others and they know process 0."""

    process: int
    host: str
    pid: int
    channel: Channel
    heard: float = field(default_factory=time.monotonic)  # when something last came from it
    status: dict = field(default_factory=dict)  # polls, doing, seconds: its newest sign of life
    left: bool = False  # it has announced that it leaves, or its connection is closed

    def __str__(self) -> str:
        return describe_process(self.process, self.host, self.pid)

    def read(self) -> list[dict] | None:
        """The messages that have arrived, without waiting; None once the connection is closed.

        ValueError if something has arrived that the other process has not sent.
        """
        messages = []
        try:
            while (message := self.channel.receive()) is not None:
                messages.append(message)
        except OSError:
            return messages or None  # what arrived before the end counts; the next call finds the end
        finally:
            if messages:
                self.heard = time.monotonic()
        return messages


class Peers(list[Peer]):
    """The processes that this one is connected to. Any thread may send."""

    def __init__(self) -> None:
        super().__init__()
        self._sending = threading.Lock()

    def connect(self, peers: Iterable[Peer]):
        """Takes over connections."""
        self.extend(peers)

    def send(self, message: dict):
        """Sends to all of them. If one is lost, its reader notices."""
        with self._sending:
            for peer in self:
                with contextlib.suppress(OSError):
                    peer.channel.send(message)

    def drain(self, close_first: bool, seconds: float):
        """Lets messages arrive before this process ends: waits until the others have closed their ends."""
        until = time.monotonic() + seconds
        for peer in self:
            peer.channel.finish(close_first, until - time.monotonic())
