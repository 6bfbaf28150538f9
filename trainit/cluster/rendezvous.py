"""How the processes of a job meet before JAX starts: all of them, each once, with the same config."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Iterable

from absl import logging

from trainit.cluster.hardware import visible_gpus
from trainit.cluster.messages import Peer, describe_process, encode, receive
from trainit.cluster.place import Place, check_coordinator

NEWS_SECONDS = 10.0  # between messages about which processes are missing
STOP_SECONDS = 20.0  # in which processes that have not come yet can still learn that the run is to stop


class MeetingError(RuntimeError):
    """The processes have not met. The message is one line and names what or who is at fault."""


class Stopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop before all processes had come. Nothing is lost."""


def meet_others(
    place: Place, platform: str, about: dict[str, str], seconds: float, stop_requested: Callable[[], str]
) -> tuple[list[Peer], str]:
    """`meet` for the process at `place`: nobody and "" if it is alone. SetupError for a bad coordinator."""
    if place.num_processes == 1:
        return [], ""
    check_coordinator(place)
    gpus = visible_gpus(os.environ, place) if platform != "cpu" else []
    own = place.process_id, place.num_processes, place.coordinator
    return meet(*own, about, gpus, seconds, stop_requested)


def meet(
    process: int,
    count: int,
    address: str,
    about: dict[str, str],
    gpus: list[str],
    seconds: float,
    stop_requested: Callable[[], str],
) -> tuple[list[Peer], str]:
    """Waits until all `count` processes have come to host:port of process 0, and belong together.

    What is `about` them, such as {"config": ...}, must be the same everywhere, and no GPU, by its worldwide
    unique name, may be used by two. `stop_requested` returns why the run should stop, or "".

    Returns all others on process 0, and process 0 on these, as connected peers; and an address for JAX's
    coordination service, on process 0's host. If some are missing or differ, all that have come raise
    MeetingError. If one was asked to stop, they raise Stopped, once all have come or after STOP_SECONDS.
    """
    host, _, port = address.rpartition(":")
    own = {"process": process, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    own |= {"about": about, "gpus": gpus, "stop": ""}
    if process == 0:
        return _Lead(host, int(port), own, stop_requested).gather(seconds)
    return _call(host, int(port), own, seconds, stop_requested)


class _Lead:
    """Process 0's part: it listens until all have come, and then answers all at once."""

    def __init__(self, host: str, port: int, own: dict, stop_requested: Callable[[], str]):
        self._host, self._stop_requested = host, stop_requested
        self._members = {0: own}
        self._connections: dict[int, socket.socket] = {}
        self._refused: list[socket.socket] = []
        try:
            self._listener = _listen(port)
        except OSError as error:
            trouble = f"process 0 cannot listen on {host}:{port}: {error.strerror}"
            raise MeetingError(f"{trouble}; give --coordinator=HOST:PORT another port") from None
        self._listener.settimeout(0.2)

    def gather(self, seconds: float) -> tuple[list[Peer], str]:
        """The others' connections and an address for JAX; see `meet`."""
        try:
            if stop := self._wait_for_all(seconds) or self._stop_reason():
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
        others = sorted(self._members.items())[1:]
        return [Peer(i, m["host"], m["pid"], self._connections[i]) for i, m in others], coordinator

    def _wait_for_all(self, seconds: float) -> str:
        """Lets processes in until all have come; returns why to stop instead, or ""."""
        count, news, stop = self._members[0]["count"], time.monotonic(), ""
        until = news + seconds
        while len(self._members) < count:
            # Those that have not come yet get some time to come and learn that the run is to stop.
            if not stop and (stop := self._stop_reason()):
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
            self._let_in()
        return stop

    def _stop_reason(self) -> str:
        """Why a process that has come wants the run to stop, or ""."""
        return self._stop_requested() or next(filter(None, (m["stop"] for m in self._members.values())), "")

    def _let_in(self):
        """Lets one process in, if one calls. Connections that do not talk as processes do are closed."""
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return
        connection.settimeout(5)
        own = self._members[0]
        try:
            message = receive(connection)
            if not isinstance(message, dict) or message.keys() != own.keys():
                raise ValueError("this is no process of a job")
        except (OSError, ValueError):
            connection.close()
            return
        number = message["process"]
        if number in self._members or message["count"] != own["count"]:
            self._refused.append(connection)
            raise MeetingError(
                f"{_name(message)} of {message['count']} came to a job of {own['count']} processes, where "
                f"{_name(self._members.get(number, own))} is already: start each process once, with "
                f"its own number"
            )
        self._connections[number], self._members[number] = connection, message
        for what, value in own["about"].items():
            if message["about"].get(what) != value:
                raise MeetingError(
                    f"{_name(message)} has {what} {message['about'].get(what)}, {_name(own)} has {value}; "
                    f"start all processes with the same code, command and files"
                )

    def _answer(self, message: dict):
        for connection in (*self._connections.values(), *self._refused):
            with contextlib.suppress(OSError):  # it is lost, which the monitor will notice
                connection.sendall(encode(message))


def _call(
    host: str, port: int, own: dict, seconds: float, stop_requested: Callable[[], str]
) -> tuple[list[Peer], str]:
    """The part of all others: calls process 0 and waits for its answer."""
    # Process 0 may not listen yet. If this process is asked to stop meanwhile, it still calls, since the
    # others wait for it; but not for long.
    until, trouble = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        if not own["stop"] and (reason := stop_requested()):
            own["stop"], until = reason, min(until, time.monotonic() + STOP_SECONDS)
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError as error:
            trouble = error.strerror or str(error)
            time.sleep(0.2)
    else:
        if own["stop"]:
            raise Stopped
        raise MeetingError(
            f"process {own['process']} has waited {seconds:.0f} s for process 0 at {host}:{port}: "
            f"{trouble}; see what the launcher and that host say of it"
        )

    # Process 0 decides how long to wait for the others, and answers even then.
    connection.settimeout(max(until - time.monotonic(), 0) + 30)
    try:
        connection.sendall(encode(own))
        answer = receive(connection)
    except (OSError, ValueError):
        if stop_requested():
            raise Stopped from None
        raise MeetingError(f"process 0 at {host}:{port} left before all processes were there") from None
    match answer:
        case {"welcome": coordinator, "host": name, "pid": pid}:
            return [Peer(0, name, pid, connection)], coordinator
        case {"stopped": _}:
            raise Stopped
    raise MeetingError(answer["refused"])


def _check_gpus(members: Iterable[dict]):
    """Raises MeetingError if two processes want the same GPU."""
    users: dict[str, dict] = {}
    for member in members:
        for gpu in member["gpus"]:
            if gpu in users:
                raise MeetingError(
                    f"{gpu} is visible to {_name(users[gpu])} and to {_name(member)}: start as many "
                    f"processes on a host as it has GPUs, or one, or set CUDA_VISIBLE_DEVICES for each"
                )
            users[gpu] = member


def _name(member: dict) -> str:
    return describe_process(member["process"], member["host"], member["pid"])


def _listen(port: int) -> socket.socket:
    """Listens on all addresses of this host, of IPv4 and of IPv6 if it has both."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=4096)


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
