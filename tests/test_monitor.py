"""The monitor's thread, with real connections and signals but without JAX: here, all in one process."""

import os
import signal
import socket
import threading
import time

import pytest

from trainit.cluster import heartbeats
from trainit.cluster.authentication import Handshake, signature
from trainit.cluster.messages import LONGEST_BYTES, Channel, Peer, Peers
from trainit.cluster.monitor import JobMonitor
from trainit.cluster.process import STOP_SIGNALS


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def channels() -> tuple[Channel, Channel]:
    """Both ends of a connection: process 0's, and the other's."""
    handshake = Handshake(b"a token of the tests", b"nonces")
    ends = socket.socketpair()
    return Channel(ends[0], handshake.keys(True)), Channel(ends[1], handshake.keys(False))


@pytest.fixture
def job(monkeypatch):
    """Two monitors that are connected, and the exit codes with which they leave."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setattr("trainit.cluster.monitor.DRAIN_SECONDS", 0.2)
    codes = {0: [], 1: []}
    monitors = [JobMonitor(number, 2, codes[number].append, 60.0) for number in (0, 1)]
    ends = channels()
    for number, monitor in enumerate(monitors):
        monitor.connect([Peer(1 - number, "host", 100 + number, ends[number])])
    yield monitors, codes
    for monitor in monitors:
        monitor.close()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_stops_both_while_the_main_thread_is_busy(job):
    """The monitor's thread asks for the stop; this one, which runs Python's handlers, polls only later."""
    (lead, other), codes = job
    for monitor in (lead, other):
        monitor.step_done()
        assert monitor.stop_reason() == ""
    assert other.stop_reason() == ""
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(other.stop_is_due)
    assert [monitor.agreement.stop_requested() for monitor in (lead, other)] == ["SIGTERM"] * 2
    assert lead.stop_reason() == ""  # it has polled once less
    assert [monitor.stop_reason() for monitor in (lead, other)] == ["SIGTERM"] * 2
    assert codes == {0: [], 1: []}


def test_before_the_first_step_both_leave_at_once(job):
    _, codes = job
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for(lambda: codes == {0: [75], 1: [75]})


def test_a_collective_that_fails_since_others_leave_is_no_failure(job, monkeypatch):
    """The first to leave closes its sockets, on which the others' main threads may be waiting for data."""
    (_, other), codes = job
    monkeypatch.setattr(Peers, "drain", lambda *args, **kwargs: time.sleep(0.3))
    os.kill(os.getpid(), signal.SIGUSR1)
    wait_for(lambda: other._over)
    other.report_failure(RuntimeError("connection closed by peer"), 1, patience=0.01)
    codes[1].append(1)  # what a main thread that does not wait would leave with
    assert codes[1] == [75, 1]


def test_a_failure_ends_both_with_its_code(job, caplog):
    (_, other), codes = job
    other.report_failure(ValueError("no\nmore"), 2)
    wait_for(lambda: codes[0] == [2])
    wait_for(lambda: any("failed: no more" in record.getMessage() for record in caplog.records))


def test_messages_end_where_the_next_begins():
    lead, other = channels()
    peer = Peer(0, "host", 1, other)
    lead.send({"a": 1})
    lead.send({"b": [2]})
    lead.connection.send(b"0123")
    assert other.receive() == {"a": 1}
    assert peer.read() == [{"b": [2]}]
    assert peer.read() == []
    lead.connection.close()
    assert peer.read() is None


def test_a_message_that_the_system_takes_only_in_part_arrives_whole():
    lead, other = channels()
    lead.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    texts = [str(number) * 200_000 for number in range(4)]
    for text in texts:
        lead.send({"text": text})
    assert lead._unsent  # not all of it has gone
    arrived = []
    while len(arrived) < 4:
        while (message := other.receive()) is not None:
            arrived.append(message["text"])
        lead.send({"text": "more"})
    assert arrived[:4] == texts


def repeat(line: bytes) -> bytes:
    return line + line


def change(line: bytes) -> bytes:
    return line.replace(b"SIGTERM", b"SIGKILL")


def replace_by_the_unsigned(line: bytes) -> bytes:
    return line[64:]


def add(line: bytes) -> bytes:
    return line + b"0" * 64 + b'{"want": "stop", "reason": "mine"}\n'


def drop_the_first(line: bytes) -> bytes:
    return line.partition(b"\n")[2]


def flood(line: bytes) -> bytes:
    return b"0" * (LONGEST_BYTES + 100_000)


@pytest.mark.parametrize("meddle", [repeat, change, replace_by_the_unsigned, add, drop_the_first, flood])
def test_who_sits_between_two_hosts_cannot_meddle_with_their_messages(meddle):
    """What is changed, repeated, added or left out on the way is noticed; so is one's own coming back."""
    lead, other = channels()
    way_in, way_out = socket.socketpair()
    receiver = Channel(way_out, Handshake(b"a token of the tests", b"nonces").keys(False))
    lead.send({"want": "stop", "reason": "SIGTERM"})
    lead.send({"last": 1})
    threading.Thread(target=way_in.sendall, args=(meddle(other.connection.recv(4096)),), daemon=True).start()
    with pytest.raises(ValueError, match="a message"):
        until = time.monotonic() + 10
        while time.monotonic() < until:
            receiver.receive()


@pytest.mark.parametrize("text", [b"[1]", b"3", b"[" * 100_000, b"{", b"\xff"])
def test_messages_that_are_no_objects_are_refused(text):
    """From who can sign them: in a job without a token everybody can."""
    lead, other = channels()
    lead.connection.send(signature(lead._send_key, 0, text) + text + b"\n")
    with pytest.raises(ValueError):
        other.receive()


def test_a_message_does_not_pass_for_one_of_the_other_side():
    lead, other = channels()
    lead.send({"want": "stop", "reason": "SIGTERM"})
    other.connection.send(other.connection.recv(4096))
    with pytest.raises(ValueError, match="a message with a wrong signature"):
        lead.receive()


def test_a_forged_message_ends_the_job_with_the_name_of_its_connection(job, caplog):
    (lead, other), codes = job
    other._peers[0].channel.connection.send(b"0" * 64 + b'{"want": "stop", "reason": "mine"}\n')
    wait_for(lambda: codes == {0: [1], 1: [1]})
    text = "process 1 (host, pid 100) is cut off: its connection has brought what it has not sent"
    assert any(text in record.getMessage() for record in caplog.records)
    assert not lead.agreement.stop_requested()


def test_silent_and_late_processes_are_named():
    peers, sent = Peers(), []
    ends = [channels() for _ in range(2)]
    peers.connect(Peer(number + 1, f"h{number}", 7, ends[number][0], heard=0.0) for number in range(2))
    peers.send = sent.append
    lead = heartbeats.Heartbeats(0, peers, 10.0)
    assert lead.silent(9.0) == ""
    first, second = peers
    second.heard, second.left = 5.0, False
    assert lead.silent(12.0).startswith("process 1 (h0, pid 7) is lost: no sign of life for 12 s")
    first.left = True
    assert lead.silent(12.0) == ""
    first.status = {"polls": 4, "doing": "training", "seconds": 0}
    second.status = {"polls": 3, "doing": "waiting for data", "seconds": 8}
    lead.send(4, "training", 0.4)
    assert lead.late == "process 2 (h1, pid 7): waiting for data for 8 s"
    assert sent == [{"late": lead.late}]
    lead.send(3, "training", 0.4)
    second.status["polls"] = first.status["polls"] = 3
    lead.send(3, "training", 0.4)
    assert lead.late == "none: all are equally far"


def test_after_a_suspension_nobody_is_silent():
    peers = Peers()
    peers.connect([Peer(1, "h", 7, channels()[0], heard=0.0)])
    beats = heartbeats.Heartbeats(0, peers, 40.0)
    now = time.monotonic()
    assert not beats.was_suspended(now + 5)
    assert beats.was_suspended(now + 60)
    assert beats.silent(now + 61) == ""
