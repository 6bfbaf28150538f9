"""Process 0's door while the processes of a job meet: who calls there, and proves that it belongs to the job.

A caller has HELLO_SECONDS and, until it has proved that it has the token, 64 bytes. All callers are served at
the same time, and one that fails is closed without harm to the others.
"""

import contextlib
import errno
import selectors
import socket
import time

from absl import logging

from trainit.cluster import authentication
from trainit.cluster.authentication import NONCE_BYTES, PROOF_BYTES, Handshake
from trainit.cluster.messages import Channel

HELLO_SECONDS = 10.0  # in which a caller has to say who it is
SPARE_CALLERS = 64  # that may call at once, in addition to the processes that are missing
LOGGED = 100  # addresses of strangers
# What a process says first, with its type.
HELLO = {"process": int, "count": int, "host": str, "pid": int, "about": dict, "gpus": list, "stop": str}


class MeetingError(RuntimeError):
    """The processes have not met. The message is one line and names what or who is at fault."""


class _Caller:
    """A connection to process 0."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address = connection, address
        self.until = time.monotonic() + HELLO_SECONDS
        self.channel: Channel | None = None  # once it has proved that it has the token
        self._nonce, self._received = authentication.nonce(), b""
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # it has left already, as `hear` will find
            connection.send(self._nonce)

    def hear(self, token: bytes) -> list[dict]:
        """What it has said since the last call.

        ValueError if it is no process of the job; OSError if it has left.
        """
        if self.channel is None:
            self._prove(token)
        messages: list[dict] = []
        while self.channel and (message := self.channel.receive()) is not None:
            messages.append(message)
        return messages

    def _prove(self, token: bytes):
        """Reads its nonce and its proof, as far as they have come, and answers."""
        try:
            data = self.connection.recv(NONCE_BYTES + PROOF_BYTES - len(self._received))
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("closed")
        self._received += data
        if len(self._received) < NONCE_BYTES + PROOF_BYTES:
            return
        handshake = Handshake(token, self._nonce + self._received[:NONCE_BYTES])
        if not authentication.is_equal(handshake.caller_proof(), self._received[NONCE_BYTES:]):
            self.connection.send(bytes(PROOF_BYTES))  # so that a process with another token learns it at once
            raise ValueError("does not have this job's token")
        self.connection.send(handshake.lead_proof())
        self.channel = Channel(self.connection, handshake.keys(is_lead=True))


class Reception:
    """Listens, and hears what the processes of the job say; others are closed, with a message an address."""

    def __init__(self, host: str, port: int, token: bytes):
        """MeetingError if this process cannot listen there."""
        self._token = token
        self._listeners = _listen(host, port)
        self._strangers: dict[socket.socket, _Caller] = {}  # those that have not said who they are, in order
        self._logged: set[str] = set()  # addresses of those that were closed
        self._selector = selectors.DefaultSelector()
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)

    def addresses(self) -> str:
        """Where it listens."""
        return ", ".join(str(listener.getsockname()[0]) for listener in self._listeners)

    def hear(self, missing: int) -> list[tuple[Channel, dict]]:
        """Waits up to 0.2 s; returns what processes have said meanwhile, each first its HELLO.

        `missing` is the number of processes that may still come.
        """
        heard = []
        for key, _ in self._selector.select(0.2):
            if isinstance(key.data, _Caller):
                if key.data.connection.fileno() >= 0:  # it was not closed in this round
                    heard += self._hear(key.data)
            else:
                self._accept(key.data, missing + SPARE_CALLERS)
        for caller in [c for c in self._strangers.values() if time.monotonic() > c.until]:
            self._close(caller, f"has not said in {HELLO_SECONDS:.0f} s who it is")
        return heard

    def close(self):
        """Closes all but the channels to processes that have said who they are."""
        self._selector.close()
        for connection in (*self._listeners, *self._strangers):
            connection.close()

    def _accept(self, listener: socket.socket, most: int):
        """Takes calls. If there are too many, the oldest of those that have proved nothing has to leave."""
        for _ in range(most):
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # this process can open no more files
                most = len(self._strangers) - 1
            else:
                self._strangers[connection] = caller = _Caller(connection, address[0])
                self._selector.register(connection, selectors.EVENT_READ, caller)
            if len(self._strangers) > most:
                for caller in [c for c in self._strangers.values() if c.channel is None][:1]:
                    self._close(caller, "was one of too many at once")

    def _hear(self, caller: _Caller) -> list[tuple[Channel, dict]]:
        is_stranger = caller.connection in self._strangers
        try:
            messages = caller.hear(self._token)
            if is_stranger and messages and not _is_hello(messages[0]):
                raise ValueError("has not said which process it is")
        except (OSError, ValueError) as error:
            if is_stranger:
                is_process = isinstance(error, ValueError)
                self._close(caller, str(error) if is_process else "left before it had said who it is")
            else:  # a process is lost, which the monitor will notice
                self._selector.unregister(caller.connection)
            return []
        if messages:
            self._strangers.pop(caller.connection, None)
        assert caller.channel is not None or not messages
        return [(caller.channel, message) for message in messages if caller.channel]

    def _close(self, caller: _Caller, reason: str):
        """Closes a stranger's connection; the first time, with a message."""
        self._selector.unregister(caller.connection)
        del self._strangers[caller.connection]
        caller.connection.close()
        if caller.address not in self._logged and len(self._logged) < LOGGED:
            self._logged.add(caller.address)
            text = "%-10s %s has called process 0, and %s: closed. More of its calls are not reported"
            logging.warning(text, "stranger", caller.address, reason)


def _is_hello(message: dict) -> bool:
    if {name: type(value) for name, value in message.items()} != HELLO:
        return False
    return all(isinstance(text, str) for text in (*message["about"].values(), *message["gpus"]))


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listens at the addresses of this name, not at others of this host. MeetingError if it cannot."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        last = None
        for family, _, _, _, address in found:
            try:
                listeners.append(socket.create_server(address[:2], family=family, backlog=4096))
            except OSError as error:  # a name may also have addresses that this host does not have
                if error.errno == errno.EADDRINUSE:
                    raise
                last = error
        if last and not listeners:
            raise last
    except OSError as error:
        for listener in listeners:
            listener.close()
        remedy = "another port"
        if error.errno == errno.EADDRNOTAVAIL:
            remedy = f"a name or address of this host, {socket.gethostname()}"
        trouble = f"process 0 cannot listen on {host}:{port}: {error.strerror}"
        raise MeetingError(f"{trouble}; give --coordinator=HOST:PORT {remedy}") from None
    return listeners
