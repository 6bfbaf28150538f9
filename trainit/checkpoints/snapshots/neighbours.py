"""How parts of snapshots reach another host, and come back from there."""

import contextlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path

import jax

from trainit.checkpoints.snapshots import parts
from trainit.checkpoints.snapshots.folder import PartFolder
from trainit.cluster import sync, transfers
from trainit.cluster.transfers import Connection, Server, Wire


class Neighbours:
    """The other processes of the job, each of which keeps the parts of one other. All make it together."""

    def __init__(self, folder: PartFolder, wire: Wire):
        self._folder, self._wire = folder, wire
        self._process, self._count = jax.process_index(), jax.process_count()
        self._server = Server(wire, self._serve)
        own = json.dumps([socket.gethostname(), *self._server.address])
        self._hosts, addresses, ports = zip(*map(json.loads, sync.gather_text(own)), strict=True)
        self._addresses = list(zip(addresses, ports, strict=True))
        self.keeper = keeper_of(self._process, self._hosts)  # the process that keeps this one's parts

    def give(self, step: int, path: Path):
        """Hands this process's part over to its keeper; returns when it is whole there, else OSError."""
        self._ask(self.keeper, {"give": step, "part": self._process}, path)

    def fetch(self, process: int, step: int) -> Path:
        """Fetches this process's part from a process that has it; returns its file. OSError if it cannot."""
        self._ask(process, {"fetch": step, "part": self._process})
        return self._folder.path(step, self._process)

    def _ask(self, process: int, message: dict, path: Path | None = None):
        name = f"process {process} ({self._hosts[process]})"
        try:
            with contextlib.closing(
                transfers.call(*self._addresses[process], self._wire.token)
            ) as connection:
                connection.send(message, path)
                answer = connection.receive(self._path)
        except (OSError, ValueError) as error:
            raise ConnectionError(f"{name}: {error}") from None
        if not answer["done"]:
            raise ConnectionError(f"{name} has no part {self._process} of that step")

    def _serve(self, connection: Connection):
        message = connection.receive(self._path)
        path = None
        if "fetch" in message:
            copies = self._folder.find().get((message["fetch"], message["part"]), [])
            path = next(filter(parts.is_whole, copies), None)
        about = {"give": message.get("fetch", -1), "part": message["part"]}
        connection.send({**about, "done": "give" in message or path is not None}, path)

    def _path(self, message: dict) -> Path | None:
        """Where a part that another process sends is kept."""
        step, part = int(message["give"]), int(message["part"])
        return self._folder.path(step, part) if 0 <= part < self._count else None

    def close(self):
        """Takes and gives nothing more."""
        self._server.close()


def keeper_of(process: int, hosts: Sequence[str]) -> int:
    """The process, on the next host, that keeps a process's parts; on one host, the next one.

    `hosts` has the host of each process. Where all have as many processes, each keeps the parts of one.
    """
    names = list(dict.fromkeys(hosts))
    if len(names) == 1:
        return (process + 1) % len(hosts)
    following = names[(names.index(hosts[process]) + 1) % len(names)]
    own, others = (
        [number for number, host in enumerate(hosts) if host == name] for name in (hosts[process], following)
    )
    return others[own.index(process) % len(others)]
