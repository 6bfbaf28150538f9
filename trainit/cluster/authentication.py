"""How the processes of a job know each other: each proves that it has the job's token, and signs messages.

The launch scripts make a token for each job. It is never sent: both ends of a connection draw a nonce and
derive from token and nonces, by HMAC-SHA-256, what proves that they know it, and keys for that connection.
"""

import hmac
import os
import secrets
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from trainit.cluster.files import describe_os_error
from trainit.cluster.place import SetupError

NONCE_BYTES = PROOF_BYTES = 32
SHORTEST = 16  # letters of a token
NO_TOKEN = b"this job has no token"  # the key of a job without one: everybody has it
ADVICE = "take the output of: python3 -c 'import secrets; print(secrets.token_hex())'"


def take_token(environment: MutableMapping[str, str]) -> bytes:
    """The job's token from TRAINIT_TOKEN, or from the file TRAINIT_TOKEN_FILE; b"" if there is none.

    It is removed from the environment: what this process starts does not need it. SetupError if it is short,
    or others can read the file.
    """
    token, file = (environment.pop(name, "") for name in ("TRAINIT_TOKEN", "TRAINIT_TOKEN_FILE"))
    if token and file:
        raise SetupError("both TRAINIT_TOKEN and TRAINIT_TOKEN_FILE are set; set one of them")
    if file:
        try:
            with Path(file).open() as stream:
                mode = os.fstat(stream.fileno()).st_mode & 0o777
                token = stream.read(4096).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else f"{file} is no text"
            raise SetupError(f"TRAINIT_TOKEN_FILE cannot be read: {reason}") from None
        if mode & 0o077:
            raise SetupError(
                f"others may read TRAINIT_TOKEN_FILE={file}, of mode {mode:03o}: chmod 600 {file}"
            )
    if (token or file) and len(token) < SHORTEST:
        source = f"the file {file}" if file else "TRAINIT_TOKEN"
        raise SetupError(
            f"the job's token in {source} has {len(token)} letters, fewer than {SHORTEST}; {ADVICE}"
        )
    return token.encode(errors="surrogateescape")


@dataclass(frozen=True)
class Handshake:
    """What two processes that have the same token derive for one connection.

    Process 0, or whichever process is called, sends a nonce; the caller sends its own and `caller_proof`;
    the other one sends `lead_proof`. Each proof and each key is made for its sender: what one end has sent is
    of no use when it comes back.
    """

    token: bytes
    nonces: bytes  # process 0's, then the caller's

    def _derive(self, purpose: bytes) -> bytes:
        return hmac.digest(self.token or NO_TOKEN, b"Trainit, 1: " + purpose + b"\0" + self.nonces, "sha256")

    def caller_proof(self) -> bytes:
        """What the caller proves itself with."""
        return self._derive(b"the caller has the token")

    def lead_proof(self) -> bytes:
        """What process 0 proves itself with."""
        return self._derive(b"process 0 has the token")

    def keys(self, is_lead: bool) -> tuple[bytes, bytes]:
        """The keys of what this process sends, and of what it receives."""
        own, other = self._derive(b"sent by process 0"), self._derive(b"sent by the caller")
        return (own, other) if is_lead else (other, own)


class StrangerError(Exception):
    """The other end of a connection has another token."""


def call(host: str, port: int, token: bytes, seconds: float) -> tuple[socket.socket, Handshake]:
    """Calls a process of the job; both prove who they are, in this time. OSError if it cannot be reached."""
    until = time.monotonic() + seconds
    connection = socket.create_connection((host, port), timeout=seconds)
    try:
        own = nonce()
        handshake = Handshake(token, receive(connection, NONCE_BYTES, until) + own)
        connection.sendall(own + handshake.caller_proof())
        if is_equal(receive(connection, PROOF_BYTES, until), handshake.lead_proof()):
            return connection, handshake
    except OSError:
        connection.close()
        raise
    connection.close()
    raise StrangerError


def answer(connection: socket.socket, token: bytes, seconds: float) -> Handshake:
    """The part of the process that is called; errors as of `call`."""
    until, own = time.monotonic() + seconds, nonce()
    connection.sendall(own)
    handshake = Handshake(token, own + receive(connection, NONCE_BYTES, until))
    if not is_equal(receive(connection, PROOF_BYTES, until), handshake.caller_proof()):
        connection.sendall(bytes(PROOF_BYTES))  # so that the caller learns it at once
        raise StrangerError
    connection.sendall(handshake.lead_proof())
    return handshake


def receive(connection: socket.socket, count: int, until: float) -> bytes:
    """This number of bytes; OSError if the connection is closed before, or they have not come in time."""
    data = b""
    while len(data) < count:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        if not (part := connection.recv(count - len(data))):
            raise ConnectionResetError("it closed the connection")
        data += part
    return data


def nonce() -> bytes:
    """A number that was never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def is_equal(a: bytes, b: bytes) -> bool:
    """Whether two proofs or signatures are the same, in a time that does not depend on where they differ."""
    return hmac.compare_digest(a, b)


def signature(key: bytes, number: int, message: bytes) -> bytes:
    """The signature of a connection's message with this number, from 0: 64 hexadecimal digits."""
    return hmac.digest(key, number.to_bytes(8, "big") + message, "sha256").hex().encode()
