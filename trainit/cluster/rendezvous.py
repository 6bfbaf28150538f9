"""How the processes of a job come together, before JAX starts: all of them, each once, of one mind."""

import json
import os
import socket
import time
from collections.abc import Callable

from absl import logging

NEWS_SECONDS = 10.0  # between messages about who is still missing
STOP_SECONDS = 20.0  # in which those that are still to come hear that the run is to stop


class MeetingError(RuntimeError):
    """The processes have not come together. The message is one line and says who or what is at fault."""


class Stopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop before all were there. Nothing is lost."""


Connections = list[tuple[int, str, int, socket.socket]]  # process, host, pid, connection to it


def meet(
    process: int,
    count: int,
    address: str,
    about: dict[str, str],
    gpus: list[str],
    seconds: float,
    asked: Callable[[], str],
) -> tuple[Connections, str]:
    """Waits until all processes of the job are there, and checks that they belong together.

    Args:
        process: number of this one.
        count: of all.
        address: host:port on which process 0 listens.
        about: what must be the same everywhere, such as {"config": ...}.
        gpus: names of the GPUs that this process will use, unique in the world.
        seconds: how long to wait.
        asked: why the run should stop, or "".

    Returns:
        process 0's connections to all others, or the others' to process 0; and an address for JAX's
        coordinator, on process 0's host.

    Raises:
        MeetingError: some are missing, or differ, or two want the same GPU. Raised by all that have come.
        Stopped: `asked` says so, on this process or on another that has come: on all, when all have come,
            or soon.
    """
    host, _, port = address.rpartition(":")
    mine = {"process": process, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    mine |= {"about": about, "gpus": gpus, "stop": ""}
    until = time.monotonic() + seconds
    if process == 0:
        return _Lead(host, int(port), mine, asked).gather(until, seconds)
    return _call(host, int(port), mine, until, seconds, asked)


class _Lead:
    """Process 0's part: it listens, and answers when it knows."""

    def __init__(self, host: str, port: int, mine: dict, asked: Callable[[], str]):
        self._host, self._asked = host, asked
        self._members, self._connections = {0: mine}, {}
        try:
            self._listener = _listen(port)
        except OSError as error:
            raise MeetingError(
                f"process 0 cannot listen on {host}:{port}: {error.strerror}; give --coordinator=HOST:PORT "
                f"another port"
            ) from None
        self._listener.settimeout(0.2)

    def gather(self, until: float, seconds: float) -> tuple[Connections, str]:
        """Until all are there."""
        count, news, stop = self._members[0]["count"], time.monotonic(), ""
        try:
            while len(self._members) < count:
                if not stop and (stop := self._stop()):
                    until = min(until, time.monotonic() + STOP_SECONDS)
                missing = ", ".join(str(i) for i in range(count) if i not in self._members)
                if time.monotonic() > until:
                    if stop:
                        break
                    raise MeetingError(
                        f"after {seconds:.0f} s {count - len(self._members)} of {count} processes are "
                        f"missing: {missing}; see what the launcher and their hosts say of them"
                    )
                if time.monotonic() - news > NEWS_SECONDS:
                    news = time.monotonic()
                    logging.info("waiting    for processes %s of %d", missing, count)
                self._take()
            if stop := stop or self._stop():
                self._answer({"stopped": stop})
                raise Stopped
            _check_gpus(self._members.values())
        except MeetingError as error:
            self._answer({"refused": str(error)})
            raise
        finally:
            self._listener.close()
        coordinator = f"{self._host}:{free_port()}"
        self._answer({"welcome": coordinator, "host": socket.gethostname(), "pid": os.getpid()})
        members = [self._members[i] for i in sorted(self._connections)]
        return [
            (m["process"], m["host"], m["pid"], self._connections[m["process"]]) for m in members
        ], coordinator

    def _stop(self) -> str:
        """Why somebody who has come wants the run to stop, or ""."""
        return self._asked() or next((m["stop"] for m in self._members.values() if m["stop"]), "")

    def _take(self):
        """Lets one process in."""
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return
        connection.settimeout(5)
        try:
            message = _receive(connection)
            if not isinstance(message, dict) or message.keys() != self._members[0].keys():
                raise ValueError("it does not speak as processes of a job do")
        except (OSError, ValueError):
            connection.close()
            return
        number = message["process"]
        if number in self._members or message["count"] != self._members[0]["count"]:
            other = self._members.get(number, self._members[0])
            self._connections[f"refused {number}"] = connection
            raise MeetingError(
                f"{_name(message)} of {message['count']} came to a job of {self._members[0]['count']} "
                f"processes, where {_name(other)} is already: start each process once, with its own number"
            )
        self._connections[number], self._members[number] = connection, message
        for what, value in self._members[0]["about"].items():
            if message["about"].get(what) != value:
                raise MeetingError(
                    f"{_name(message)} has {what} {message['about'].get(what)}, {_name(self._members[0])} "
                    f"has {value}; start all processes with the same code, command and files"
                )

    def _answer(self, message: dict):
        for connection in self._connections.values():
            try:
                connection.sendall(_line(message))
            except OSError:  # it is lost; that is noticed soon enough
                continue


def _call(
    host: str, port: int, mine: dict, until: float, seconds: float, asked: Callable[[], str]
) -> tuple[Connections, str]:
    """The part of all others: calls process 0 and waits for its answer."""
    trouble = "no answer"
    while time.monotonic() < until:
        if not mine["stop"] and asked():  # the others wait for this process: it comes and says so
            mine["stop"], until = asked(), min(until, time.monotonic() + STOP_SECONDS)
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError as error:  # it may not be there yet
            trouble = error.strerror or str(error)
            time.sleep(0.2)
    else:
        if mine["stop"]:
            raise Stopped
        raise MeetingError(
            f"process {mine['process']} has waited {seconds:.0f} s for process 0 at {host}:{port}: "
            f"{trouble}; see what the launcher and that host say of it"
        )
    connection.settimeout(max(until - time.monotonic(), 0) + 30)  # the lead says when it is enough
    try:
        connection.sendall(_line(mine))
        answer = _receive(connection)
    except (OSError, ValueError):
        if asked():
            raise Stopped from None
        raise MeetingError(f"process 0 at {host}:{port} left before all processes were there") from None
    match answer:
        case {"welcome": coordinator, "host": name, "pid": pid}:
            return [(0, name, pid, connection)], coordinator
        case {"stopped": _}:
            raise Stopped
    raise MeetingError(answer["refused"])


def _check_gpus(members):
    """No GPU may be used by two processes."""
    users = {}
    for member in members:
        for gpu in member["gpus"]:
            if gpu in users:
                raise MeetingError(
                    f"{gpu} is visible to {_name(users[gpu])} and to {_name(member)}: start as many "
                    f"processes on a host as it has GPUs, or one, or set CUDA_VISIBLE_DEVICES for each"
                )
            users[gpu] = member


def _name(member: dict) -> str:
    return f"process {member['process']} ({member['host']}, pid {member['pid']})"


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket) -> dict:
    """One message, byte by byte up to its end: what follows belongs to whoever reads next."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ValueError("the connection was closed")
        line += byte
    return json.loads(line)


def _listen(port: int) -> socket.socket:
    """On all addresses of this host, of both kinds where it has both."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except OSError as error:
            if error.errno == 98:  # in use
                raise
    return socket.create_server(("", port), backlog=4096)


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
