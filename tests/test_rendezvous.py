"""How processes come together: here as threads, each with its own end of real connections."""

import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from trainit.cluster import rendezvous
from trainit.cluster.rendezvous import MeetingError, Stopped, meet

pytestmark = pytest.mark.evidence(
    "processes that are missing, come twice or differ are named to all that came"
)

ABOUT = {"a config of hash": "1234", "workdir": "/runs/x"}


def gather(members, count=None, seconds=5.0, stop=None):
    """Lets processes meet: [(number, about, gpus)]; what each gets: a result or an exception."""
    address = f"localhost:{free_port()}"
    count = count or len(members)
    asked = stop or (lambda: "")

    def come(member):
        number, about, gpus = member
        try:
            return meet(number, count, address, about, gpus, seconds, asked)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(come, members))


def test_all_come_and_are_connected_with_the_lead():
    lead, *others = gather([(0, ABOUT, ["GPU-a"]), (1, ABOUT, ["GPU-b"]), (2, ABOUT, [])])
    assert [peer.process for peer in lead[0]] == [1, 2]
    for (connections, coordinator), other in zip(others, lead[0], strict=True):
        assert coordinator == lead[1]
        assert coordinator.startswith("localhost:")
        (zero,) = connections
        assert (zero.process, zero.host) == (0, socket.gethostname())
        other.channel.send({"hello": other.process})
        select.select([zero.channel.connection], [], [], 10)
        assert zero.channel.receive() == {"hello": other.process}


def test_those_who_are_missing_are_named_by_all_who_came():
    results = gather([(0, ABOUT, []), (2, ABOUT, [])], count=5, seconds=1.0)
    for error in results:
        assert isinstance(error, MeetingError)
        assert "after 1 s 3 of 5 processes are missing: 1, 3, 4" in str(error)


def test_a_missing_lead_is_named():
    (error,) = gather([(1, ABOUT, [])], count=2, seconds=1.0)
    assert isinstance(error, MeetingError)
    assert "process 1 has waited 1 s for process 0 at localhost" in str(error)


def test_what_must_be_the_same_everywhere():
    for error in gather([(0, ABOUT, []), (1, ABOUT | {"workdir": "/runs/y"}, [])]):
        assert isinstance(error, MeetingError)
        assert "process 1 (" in str(error)
        assert "has workdir /runs/y, process 0 (" in str(error)


def test_a_gpu_that_two_processes_would_use():
    for error in gather([(0, ABOUT, ["GPU-a"]), (1, ABOUT, ["GPU-b", "GPU-a"])]):
        assert isinstance(error, MeetingError)
        assert "GPU-a is visible to process 0 (" in str(error)
        assert "and to process 1 (" in str(error)


def test_a_number_that_is_given_twice():
    results = gather([(0, ABOUT, []), (1, ABOUT, []), (1, ABOUT, [])], count=3)
    assert all(isinstance(error, MeetingError) for error in results)
    assert any("start each process once, with its own number" in str(error) for error in results)


def test_another_count_of_processes():
    address = f"localhost:{free_port()}"
    with ThreadPoolExecutor(2) as threads:
        lead = threads.submit(meet, 0, 2, address, ABOUT, [], 5, lambda: "")
        other = threads.submit(meet, 1, 4, address, ABOUT, [], 5, lambda: "")
        for result in (lead, other):
            with pytest.raises(MeetingError, match=r"of 4 came to a job of 2 processes"):
                result.result()


def test_strangers_are_passed_over():
    """A port scanner's greeting, or a connection that says nothing, is no process of the job."""
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        lead = threads.submit(meet, 0, 2, f"localhost:{port}", ABOUT, [], 10, lambda: "")
        time.sleep(0.3)
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1, 2]\n", json.dumps({"x": 1}).encode() + b"\n"):
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(greeting)
        meet(1, 2, f"localhost:{port}", ABOUT, [], 5, lambda: "")
        assert len(lead.result()[0]) == 1


@pytest.mark.parametrize("asked", [0, 1])
def test_one_that_is_asked_to_stop_tells_those_who_come(asked):
    """Nobody waits for it in vain, though it was asked before it had reached the lead, or they had."""
    address = f"localhost:{free_port()}"

    def come(number):
        time.sleep(0.5 if number != asked else 0)
        return meet(number, 3, address, ABOUT, [], 60, lambda: "SIGTERM" if number == asked else "")

    start = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        for result in [threads.submit(come, number) for number in range(3)]:
            with pytest.raises(Stopped):
                result.result()
    assert time.monotonic() - start < 10


def test_asked_to_stop_while_some_are_missing(monkeypatch):
    """All who have come leave soon."""
    monkeypatch.setattr(rendezvous, "LATE_SECONDS", 1.0)
    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    start = time.monotonic()
    results = gather([(0, ABOUT, []), (1, ABOUT, [])], 3, 60, lambda: "SIGTERM" if asked.is_set() else "")
    assert [type(result) for result in results] == [Stopped, Stopped]
    assert time.monotonic() - start < 10


def test_a_port_that_is_taken():
    with socket.create_server(("", free_port())) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(MeetingError, match=r"cannot listen on localhost.*give --coordinator=HOST:PORT"):
            meet(0, 2, address, ABOUT, [], 1, lambda: "")
