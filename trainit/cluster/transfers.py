"""Files that processes of a job send each other, over connections of their own, signed but not encrypted."""

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from trainit.cluster import authentication
from trainit.cluster.authentication import PROOF_BYTES, StrangerError
from trainit.cluster.files import errors_name, new_file

HELLO_SECONDS = 10.0  # in which both ends of a connection prove who they are
SILENT_SECONDS = 60.0  # without any byte, after which a transfer has failed
CALLERS = 8  # that a process serves at once
MESSAGE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Wire:
    """How this process may be reached by the others of its job."""

    coordinator: str = ""  # host:port; other processes reach this one by the same network
    token: bytes = b""  # the job's

    def listen(self) -> socket.socket:
        """Listens at a free port of the address that this process has in the coordinator's network."""
        host, _, port = self.coordinator.rpartition(":")
        family, kind, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
        return socket.create_server((own, 0), family=family, backlog=CALLERS)


class Connection:
    """One connection to another process of the job, for one message with a file in each direction."""

    def __init__(self, connection: socket.socket, keys: tuple[bytes, bytes]):
        """The first of the `keys` signs what is sent, the second what is received."""
        connection.settimeout(SILENT_SECONDS)
        self._connection, (self._send_key, self._receive_key) = connection, keys

    def send(self, message: dict[str, Any], path: Path | None = None):
        """Sends a message of less than 64 KiB as JSON, and a file. OSError if it is lost."""
        with path.open("rb") if path else contextlib.nullcontext() as file:
            size = path.stat().st_size if path else 0
            text = json.dumps({"message": message, "bytes": size}).encode()
            signed = hmac.new(self._send_key, text, hashlib.sha256)
            self._connection.sendall(len(text).to_bytes(4, "big") + text + signed.digest())
            while file and (chunk := file.read(CHUNK_BYTES)):
                signed.update(chunk)
                self._connection.sendall(chunk)
        self._connection.sendall(signed.digest())

    def receive(self, path_for: Callable[[dict], Path | None]) -> dict[str, Any]:
        """The other's message. A file that comes with it is written to the path for it, and then whole.

        OSError if the connection is lost, or the file cannot be written; ValueError for what the other has
        not sent, or has no path.
        """
        size = int.from_bytes(self._exactly(4), "big")
        if size > MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        text = self._exactly(size)
        signed = hmac.new(self._receive_key, text, hashlib.sha256)
        self._check(signed)
        about = json.loads(text)
        if about["bytes"]:
            if (path := path_for(about["message"])) is None:
                raise ValueError("a file that nobody wants")
            self._write(path, about["bytes"], signed)
        else:
            self._check(signed)
        return about["message"]

    def _write(self, path: Path, size: int, signed: hmac.HMAC):
        """Writes this many bytes to a file, and checks their signature."""
        with new_file(path) as file:
            while size:
                chunk = self._some(min(size, CHUNK_BYTES))
                signed.update(chunk)
                with errors_name(path):
                    file.write(chunk)
                size -= len(chunk)
            self._check(signed)

    def _check(self, signed: hmac.HMAC):
        if not authentication.is_equal(self._exactly(PROOF_BYTES), signed.digest()):
            raise ValueError("a wrong signature")

    def _some(self, most: int) -> bytes:
        if not (data := self._connection.recv(most)):
            raise ConnectionResetError("it closed the connection")
        return data

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self._some(count - len(data))
        return data

    def close(self):
        self._connection.close()


def call(host: str, port: int, token: bytes) -> Connection:
    """Connects to a process that `Server` listens in. OSError if that cannot be reached or is a stranger."""
    try:
        connection, handshake = authentication.call(host, port, token, HELLO_SECONDS)
    except StrangerError:
        raise ConnectionError(f"{host}:{port} does not have this job's token") from None
    return Connection(connection, handshake.keys(is_lead=False))


class Server:
    """Listens for other processes of the job, in threads, and has `handle` called for each of them."""

    def __init__(self, wire: Wire, handle: Callable[[Connection], None]):
        self._wire, self._handle = wire, handle
        self._listener = wire.listen()
        self.address: list = list(self._listener.getsockname()[:2])
        self._free = threading.BoundedSemaphore(CALLERS)
        threading.Thread(target=self._listen, name="transfers", daemon=True).start()

    def _listen(self):
        while True:
            self._free.acquire()
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, or this process can open no more files
                self._free.release()
                if self._listener.fileno() < 0:
                    return
                time.sleep(1)
                continue
            threading.Thread(
                target=self._serve, args=(connection, address[0]), name="transfer", daemon=True
            ).start()

    def _serve(self, connection: socket.socket, address: str):
        try:
            handshake = authentication.answer(connection, self._wire.token, HELLO_SECONDS)
            self._handle(Connection(connection, handshake.keys(is_lead=True)))
        except StrangerError:
            logging.warning("stranger   %s does not have this job's token: closed", address)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logging.info("transfers  from %s: %s", address, error)
        finally:
            connection.close()
            self._free.release()

    def close(self):
        """Listens no more."""
        with contextlib.suppress(OSError):  # which wakes the thread up
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
