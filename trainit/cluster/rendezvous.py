"""How the processes of a job meet before JAX starts: all of them, each once, with the same config.

Nobody else gets in: process 0 and whoever calls it first prove to each other that they have the job's token.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterable

from absl import logging

from trainit.cluster import authentication
from trainit.cluster.authentication import StrangerError
from trainit.cluster.hardware import visible_gpus
from trainit.cluster.messages import Channel, Peer, describe_process
from trainit.cluster.place import Place, check_coordinator
from trainit.cluster.reception import MeetingError, Reception

NEWS_SECONDS = 10.0  # between messages about which processes are missing
CALL_SECONDS = 5.0  # in which process 0 has to prove itself; else it is called again
LATE_SECONDS = 20.0  # in which processes that have not come yet can still learn that the job is over
NO_TOKEN = (
    "%-10s none: whoever reaches %s can take part in this job, or end it. Set TRAINIT_TOKEN to one secret "
    "in the environment of all processes, or TRAINIT_TOKEN_FILE to a file of mode 600 that holds it"
)


class Stopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop before all processes had come. Nothing is lost."""


def meet_others(
    place: Place,
    platform: str,
    about: dict[str, str],
    seconds: float,
    stop_requested: Callable[[], str],
    token: bytes | None = None,
) -> tuple[list[Peer], str]:
    """`meet` for the process at `place`, with this token, or that of its environment.

    Returns nobody and "" if it is alone. SetupError for a bad coordinator or token.
    """
    token = authentication.take_token(os.environ) if token is None else token
    if place.num_processes == 1:
        return [], ""
    check_coordinator(place)
    if not token and place.process_id == 0:
        logging.warning(NO_TOKEN, "token", place.coordinator)
    gpus = visible_gpus(os.environ, place) if platform != "cpu" else []
    own = place.process_id, place.num_processes, place.coordinator
    return meet(*own, about, gpus, seconds, stop_requested, token)


def meet(
    process: int,
    count: int,
    address: str,
    about: dict[str, str],
    gpus: list[str],
    seconds: float,
    stop_requested: Callable[[], str],
    token: bytes = b"",
) -> tuple[list[Peer], str]:
    """Waits until all `count` processes have come to host:port of process 0, and belong together.

    What is `about` them, such as {"config": ...}, must be the same everywhere, and no GPU, by its worldwide
    unique name, may be used by two. `stop_requested` returns why the run should stop, or "".

    Returns all others on process 0, and process 0 on these, as connected peers; and an address for JAX's
    coordination service, on process 0's host. If some are missing or differ, all that have come raise
    MeetingError, at once, and so do those that come up to LATE_SECONDS later. If one was asked to stop, they
    raise Stopped, once all have come or after LATE_SECONDS.
    """
    host, _, port = address.rpartition(":")
    own = {"process": process, "count": count, "host": socket.gethostname(), "pid": os.getpid()}
    own |= {"about": about, "gpus": gpus, "stop": ""}
    if process == 0:
        return _Lead(host, int(port), own, stop_requested, token).gather(seconds)
    return _call(host, int(port), own, seconds, stop_requested, token)


class _Lead:
    """Process 0's part: it listens until all have come, and then answers all at once."""

    def __init__(self, host: str, port: int, own: dict, stop_requested: Callable[[], str], token: bytes):
        self._host, self._stop_requested = host, stop_requested
        self._reception = Reception(host, port, token)
        self._members = {0: own}
        self._come: dict[Channel, dict] = {}  # what each process that has come has said, members or not
        self._answered = 0  # how many of them
        self._over = False  # who comes now becomes no member

    def gather(self, seconds: float) -> tuple[list[Peer], str]:
        """The others' connections and an address for JAX; see `meet`."""
        try:
            if stop := self._wait_for_all(seconds):
                # Not at once: a launcher may kill those that have not come when the first one leaves.
                self._wait_for_late(LATE_SECONDS, lambda: None)
                self._answer({"stopped": stop})
                raise Stopped
            _check_gpus(self._members.values())
        except MeetingError as error:
            refusal = {"refused": str(error)}
            self._answer(refusal)
            self._wait_for_late(min(seconds, LATE_SECONDS), lambda: self._answer(refusal))
            raise
        finally:
            self._reception.close()
        coordinator = f"{self._host}:{free_port()}"
        self._answer({"welcome": coordinator, "host": socket.gethostname(), "pid": os.getpid()})
        peers = [
            Peer(own["process"], own["host"], own["pid"], channel) for channel, own in self._come.items()
        ]
        return sorted(peers, key=lambda peer: peer.process), coordinator

    def _wait_for_all(self, seconds: float) -> str:
        """Lets processes in until all have come; returns why to stop instead, or ""."""
        news = time.monotonic()
        until = news + seconds
        while self._missing() and not self._stop_reason():
            missing, count = self._missing(), self._members[0]["count"]
            names = ", ".join(map(str, missing))
            if time.monotonic() > until:
                where = f"process 0 listens at {self._reception.addresses()}"
                raise MeetingError(
                    f"after {seconds:.0f} s {len(missing)} of {count} processes are missing: {names}; "
                    f"{where}; see what the launcher and their hosts say of them"
                )
            if time.monotonic() - news > NEWS_SECONDS:
                news = time.monotonic()
                logging.info("waiting    for processes %s of %d", names, count)
            self._hear()
        return self._stop_reason()

    def _missing(self) -> list[int]:
        return [number for number in range(self._members[0]["count"]) if number not in self._members]

    def _stop_reason(self) -> str:
        """Why a process that has come wants the run to stop, or ""."""
        return self._stop_requested() or next(filter(None, (m["stop"] for m in self._come.values())), "")

    def _wait_for_late(self, seconds: float, serve: Callable[[], None]):
        """Waits, though the job is over, until as many processes have come as it has, and `serve`s them."""
        self._over = True
        until, asked = time.monotonic() + seconds, self._stop_requested()
        while 1 + len(self._come) < self._members[0]["count"] and time.monotonic() < until:
            if self._stop_requested() != asked:
                break
            self._hear()
            serve()

    def _answer(self, message: dict):
        """Answers all that have come and have no answer yet."""
        for channel in list(self._come)[self._answered :]:
            with contextlib.suppress(OSError):  # it is lost, which the monitor will notice
                channel.send(message)
        self._answered = len(self._come)

    def _hear(self):
        """Lets in whoever has called, and hears what members say while they wait: that one is to stop."""
        for channel, message in self._reception.hear(len(self._missing())):
            if channel in self._come:
                self._come[channel]["stop"] = str(message.get("stop", ""))
                continue
            self._come[channel] = message
            if not self._over:
                self._let_in(message)

    def _let_in(self, message: dict):
        """Makes a process a member; MeetingError if it does not belong to the others."""
        own, number = self._members[0], message["process"]
        if number in self._members or message["count"] != own["count"] or not 0 <= number < own["count"]:
            raise MeetingError(
                f"{_name(message)} of {message['count']} came to a job of {own['count']} processes, where "
                f"{_name(self._members.get(number, own))} is already: start each process once, with "
                f"its own number"
            )
        self._members[number] = message
        for what, value in own["about"].items():
            if message["about"].get(what) != value:
                raise MeetingError(
                    f"{_name(message)} has {what} {message['about'].get(what)}, {_name(own)} has {value}; "
                    f"start all processes with the same code, command and files"
                )


def _call(
    host: str, port: int, own: dict, seconds: float, stop_requested: Callable[[], str], token: bytes
) -> tuple[list[Peer], str]:
    """The part of all others: calls process 0 and waits for its answer."""
    # Process 0 may not listen yet. If this process is asked to stop meanwhile, it still calls, since the
    # others wait for it; but not for long.
    until, trouble = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        if not own["stop"] and (reason := stop_requested()):
            own["stop"], until = reason, min(until, time.monotonic() + LATE_SECONDS)
        try:
            channel = _connect(host, port, token)
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
    match _wait_for_answer(channel, own, max(until, time.monotonic()) + 30, stop_requested):
        case {"welcome": str(coordinator), "host": str(name), "pid": int(pid)}:
            return [Peer(0, name, pid, channel)], coordinator
        case {"refused": str(reason)}:
            raise MeetingError(reason)
        case {"stopped": _}:
            raise Stopped
    if stop_requested():
        raise Stopped
    raise MeetingError(f"process 0 at {host}:{port} left before all processes were there")


def _connect(host: str, port: int, token: bytes) -> Channel:
    """Calls process 0; both prove who they are.

    OSError if it cannot be reached; MeetingError if the other end, or this one, is not of the job.
    """
    try:
        connection, handshake = authentication.call(host, port, token, CALL_SECONDS)
    except StrangerError:
        raise MeetingError(
            f"what listens at {host}:{port} does not have this process's token: it is of another job, or the "
            f"processes were not given the same TRAINIT_TOKEN or TRAINIT_TOKEN_FILE"
        ) from None
    return Channel(connection, handshake.keys(is_lead=False))


def _wait_for_answer(channel: Channel, own: dict, until: float, stop_requested: Callable[[], str]) -> dict:
    """Says hello, and returns process 0's answer; {} if it leaves without one, or the time is over."""
    asked = own["stop"]
    with contextlib.suppress(OSError, ValueError):
        channel.send(own)
        while time.monotonic() < until:
            if not asked and (asked := stop_requested()):
                until = min(until, time.monotonic() + LATE_SECONDS)
                channel.send({"stop": asked})  # process 0 answers all who have come
            select.select([channel.connection], [], [], 0.2)
            if (answer := channel.receive()) is not None:
                return answer
    return {}


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


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
