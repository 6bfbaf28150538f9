"""Who gets into a job: strangers at process 0's port, processes with other tokens, who comes too late."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import ROOT, free_port

from trainit.cluster import authentication, reception, rendezvous
from trainit.cluster.authentication import Handshake, take_token
from trainit.cluster.messages import Channel
from trainit.cluster.place import Place, SetupError
from trainit.cluster.reception import MeetingError
from trainit.cluster.rendezvous import Stopped, meet

pytestmark = pytest.mark.evidence(
    "strangers at the port: silent, slow, hundreds at once, without the token, with another, between hosts"
)
TOKEN = b"0123456789abcdef"
ABOUT = {"a config of hash": "1234"}


def connect(port, seconds=10.0) -> socket.socket:
    """A connection to a port, as soon as somebody listens there."""
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=seconds)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def job():
    """Starts process 0 of two in a thread, and calls it as process 1 does: (port, its result, call)."""
    port = free_port()

    def come(number, count=2, token=TOKEN, seconds=30, about=ABOUT, stop=lambda: ""):
        return meet(number, count, f"127.0.0.1:{port}", about, [], seconds, stop, token)

    with ThreadPoolExecutor(8) as threads:
        yield port, threads.submit, come


def strangers(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("stranger")]


def test_silent_and_slow_strangers_keep_nobody_out(job, monkeypatch):
    """Nothing times out here: one after the other, they would be served for hours."""
    port, submit, come = job
    monkeypatch.setattr(reception, "HELLO_SECONDS", 3600.0)
    lead = submit(come, 0)
    silent = [connect(port) for _ in range(20)]
    slow = connect(port)
    for _ in range(3):
        slow.send(b"x")
        time.sleep(0.05)
    (zero,), _ = come(1)
    assert zero.process == 0
    assert [peer.process for peer in lead.result()[0]] == [1]
    for stranger in (*silent, slow):  # which are closed when all have come
        while stranger.recv(100):
            pass


def test_who_does_not_say_who_it_is_is_closed_and_reported_once(job, monkeypatch, caplog):
    port, submit, come = job
    monkeypatch.setattr(reception, "HELLO_SECONDS", 0.3)
    lead = submit(come, 0)
    callers = [connect(port) for _ in range(5)]
    callers[0].send(b"GET / HTTP/1.1\r\n\r\n")
    callers[1].send(b"x" * 500)
    callers[2].send(json.dumps({"process": 1, "count": 2}).encode() + b"\n")
    callers[3].close()
    for caller in (*callers[:3], callers[4]):
        with contextlib.suppress(ConnectionResetError):
            received = b""
            while data := caller.recv(100):
                received += data
            # Not a word but a number at random, and, for who has sent 64 bytes, that they are wrong.
            assert len(received.rstrip(b"\0")) <= authentication.NONCE_BYTES
    monkeypatch.setattr(reception, "HELLO_SECONDS", 10.0)
    come(1)
    lead.result()
    (line,) = strangers(caplog)
    assert line.startswith("stranger   127.0.0.1 has called process 0, and ")
    assert line.endswith(": closed. More of its calls are not reported")


def test_of_hundreds_of_connections_few_are_held(job, monkeypatch):
    port, submit, come = job
    monkeypatch.setattr(reception, "HELLO_SECONDS", 3600.0)
    lead = submit(come, 0)
    callers = [connect(port) for _ in range(3 * reception.SPARE_CALLERS)]
    come(1)
    lead.result()
    assert callers


def test_the_number_of_connections_is_bounded(monkeypatch):
    port = free_port()
    monkeypatch.setattr(reception, "HELLO_SECONDS", 3600.0)
    door = reception.Reception("127.0.0.1", port, TOKEN)
    callers = []
    for _ in range(reception.SPARE_CALLERS + 30):
        callers.append(connect(port))
        assert door.hear(2) == []
    assert len(door._strangers) == reception.SPARE_CALLERS + 2
    door.close()
    for caller in callers:
        caller.close()


def test_who_calls_and_leaves_at_once_costs_nobody_a_place():
    """A port scanner resets its connections, perhaps while a process of the job proves itself."""
    port = free_port()
    door = reception.Reception("127.0.0.1", port, TOKEN)
    with connect(port) as slow:
        door.hear(2)
        for _ in range(3):
            scanner = connect(port)
            scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            scanner.close()
            door.hear(2)
        assert next(iter(door._strangers)).getpeername() == slow.getsockname()  # the oldest
    door.close()


def test_another_token_and_none(job, caplog):
    """A process that has another one learns it at once, and so does one that has none; the job continues."""
    _, submit, come = job
    lead = submit(come, 0)
    for token in (b"another token of sixteen", b""):
        with pytest.raises(
            MeetingError, match=r"127.0.0.1:\d+ does not have this process's token.*TRAINIT_TOKEN"
        ):
            come(1, token=token)
    come(1)
    lead.result()
    assert "does not have this job's token" in strangers(caplog)[0]


@pytest.mark.parametrize("answer", ["zeros", "its own proof", "the challenge"])
def test_a_false_process_0_learns_nothing_but_a_proof(answer):
    """It has no token: what it was sent does not help it to prove anything."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_one():
            connection, _ = server.accept()
            with connection:
                connection.sendall(bytes(32))
                heard.append(connection.recv(64, socket.MSG_WAITALL))
                connection.sendall(
                    {"zeros": bytes(32), "its own proof": heard[0][32:]}.get(answer, bytes(32))
                )
                heard.append(connection.recv(100))

        thread = threading.Thread(target=answer_one)
        thread.start()
        with pytest.raises(MeetingError, match="does not have this process's token"):
            meet(1, 2, f"127.0.0.1:{server.getsockname()[1]}", ABOUT, [], 30, lambda: "", TOKEN)
        thread.join()
    assert [len(data) for data in heard] == [64, 0]
    assert TOKEN not in heard[0]


def test_proofs_are_of_one_connection_and_direction():
    """A caller that only repeats what process 0 has sent it, or what another caller has sent before."""
    first, second = Handshake(TOKEN, bytes(64)), Handshake(TOKEN, bytes(63) + b"x")
    values = [value for h in (first, second) for value in (h.caller_proof(), h.lead_proof(), *h.keys(True))]
    assert len(set(values)) == 8
    assert first.keys(True) == first.keys(False)[::-1]
    assert len({len(value) for value in values}) == 1


def test_a_recorded_conversation_opens_no_door(job):
    """What a process has sent is sent again, over a new connection."""
    port, submit, come = job
    lead = submit(come, 0, 3)
    recorded = b""
    with socket.create_server(("127.0.0.1", 0)) as between:

        def relay():
            nonlocal recorded
            inside, outside = connect(port), between.accept()[0]
            outside.sendall(inside.recv(32, socket.MSG_WAITALL))
            recorded += outside.recv(64, socket.MSG_WAITALL)
            inside.sendall(recorded)
            outside.sendall(inside.recv(32, socket.MSG_WAITALL))
            hello = outside.recv(4096)
            recorded += hello
            inside.sendall(hello)
            outside.sendall(inside.recv(4096))

        thread = threading.Thread(target=relay)
        thread.start()
        address = f"127.0.0.1:{between.getsockname()[1]}"
        other = submit(meet, 1, 3, address, ABOUT, [], 30, lambda: "", TOKEN)
        while b"{" not in recorded:
            time.sleep(0.01)
        with connect(port) as again:
            again.sendall(recorded.replace(b'"process": 1', b'"process": 2'))
            assert again.recv(64, socket.MSG_WAITALL)[32:] in (b"", bytes(32))
        come(2, 3)
        assert [peer.process for peer in lead.result()[0]] == [1, 2]
        other.result()
        thread.join()


def say_hello(port, hello: dict, token=TOKEN) -> dict | None:
    """What somebody who has the token is answered; None if the connection is closed."""
    connection = connect(port)
    nonce = authentication.nonce()
    handshake = Handshake(token, connection.recv(32, socket.MSG_WAITALL) + nonce)
    connection.sendall(nonce + handshake.caller_proof())
    assert connection.recv(32, socket.MSG_WAITALL) == handshake.lead_proof()
    channel = Channel(connection, handshake.keys(is_lead=False))
    channel.send(hello)
    until = time.monotonic() + 20
    with contextlib.suppress(OSError):
        while time.monotonic() < until:
            if message := channel.receive():
                return message
            time.sleep(0.01)
    return None


OWN = {"process": 1, "count": 2, "host": "h", "pid": 7, "about": ABOUT, "gpus": [], "stop": ""}


@pytest.mark.parametrize("token", [TOKEN, b""])
@pytest.mark.parametrize(
    "wrong",
    [
        {"process": "1"},
        {"process": 1.0},
        {"process": True},
        {"process": None},
        {"pid": []},
        {"about": {"a config of hash": 3}},
        {"about": []},
        {"gpus": [["x"]]},
        {"more": 1},
    ],
)
def test_hellos_of_other_shapes_are_closed_and_the_job_continues(wrong, token, job):
    port, submit, come = job
    lead = submit(come, 0, token=token)
    assert say_hello(port, OWN | wrong, token) is None
    come(1, token=token)
    lead.result()


@pytest.mark.parametrize("number", [-1, 0, 2, 10**30])
def test_numbers_that_no_process_of_the_job_has_end_it_with_one_line(number, job):
    """Somebody who has the token has started the processes wrongly."""
    port, submit, come = job
    lead = submit(come, 0)
    answer = say_hello(port, OWN | {"process": number})
    assert answer["refused"].startswith(f"process {number} (h, pid 7) of 2 came to a job of 2 processes")
    with pytest.raises(MeetingError, match=f"process {number} "):
        lead.result()


def test_who_comes_late_learns_at_once_that_the_job_was_refused(job):
    _, submit, come = job
    lead, other = submit(come, 0, 4), submit(come, 1, 4, about={"a config of hash": "5"})
    with pytest.raises(MeetingError) as first:
        other.result()
    assert "has a config of hash 5, process 0" in str(first.value)
    for number in (2, 3):
        with pytest.raises(MeetingError) as late:
            come(number, 4)
        assert str(late.value) == str(first.value)
    with pytest.raises(MeetingError):
        lead.result()  # which waits for none any more, though it could wait for 20 s


def test_a_member_that_is_asked_to_stop_while_it_waits_stops_all(job, monkeypatch):
    """Process 0 was not asked: it learns it from the member, which would else wait for the missing one."""
    _, submit, come = job
    monkeypatch.setattr(rendezvous, "LATE_SECONDS", 1.0)
    asked = threading.Event()
    lead = submit(come, 0, 3)
    member = submit(come, 1, 3, stop=lambda: "SIGTERM" if asked.is_set() else "")
    time.sleep(0.5)
    asked.set()
    for process in (member, lead):
        with pytest.raises(Stopped):
            process.result()


MEMBER = """
import sys
from trainit.cluster import rendezvous
from trainit.cluster.monitor import JobMonitor
from trainit.cluster.place import Place
import os
rendezvous.LATE_SECONDS, rendezvous.CALL_SECONDS = 1.0, 2.0
number, port = int(sys.argv[1]), sys.argv[2]
monitor = JobMonitor(number, 2, os._exit, 40.0)
print("ready", flush=True)
try:
    peers, _ = rendezvous.meet_others(
        Place("flags", f"127.0.0.1:{port}", 2, number), "cpu", {}, 60.0, monitor.agreement.stop_requested
    )
    print("met", [peer.process for peer in peers], flush=True)
    os._exit("TRAINIT_TOKEN" in os.environ)
except rendezvous.Stopped:
    os._exit(75)
"""


@pytest.fixture
def process():
    """Starts a process that only meets the others, with the token of its environment."""
    started = []

    def begin(number, port):
        process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(number), str(port)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TRAINIT_TOKEN": TOKEN.decode()},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for one in started:
        one.kill()
        one.wait()


def test_processes_meet_among_strangers_and_stop_at_any_moment(process):
    """Twenty silent connections and one that sends a byte now and then; SIGTERM ends a process among them."""
    port = free_port()
    lead = process(0, port)
    callers = [connect(port) for _ in range(20)]
    over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not over.wait(0.2):
                callers[0].send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        other = process(1, port)
        assert (lead.communicate(timeout=30)[0], lead.returncode) == ("met [1]\n", 0)
        assert (other.communicate(timeout=30)[0], other.returncode) == ("met [0]\n", 0)
        # Again, without the other one.
        port = free_port()
        lead = process(0, port)
        callers[0] = connect(port)
        callers[0].send(b"x")
        lead.send_signal(signal.SIGTERM)
        assert lead.wait(30) == 75
    finally:
        over.set()
        thread.join()


def test_sigterm_ends_a_process_whose_process_0_is_silent(process):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        other = process(1, silent.getsockname()[1])
        silent.accept()
        other.send_signal(signal.SIGTERM)
        assert other.wait(60) == 75


def test_process_0_listens_at_the_job_s_address_alone(job):
    """All of 127.0.0.0/8 leads to this host: another address of it stands for that of another network."""
    port, submit, come = job
    lead = submit(come, 0)
    connect(port).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    come(1)
    lead.result()


def test_an_address_of_another_host():
    with pytest.raises(
        MeetingError, match=r"cannot listen on 192.0.2.1:5000.*a name or address of this host"
    ):
        meet(0, 2, "192.0.2.1:5000", ABOUT, [], 1, lambda: "", TOKEN)


def test_a_token_is_taken_from_the_environment_or_a_file_of_the_user_s_own(tmp_path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    for variables in ({"TRAINIT_TOKEN": "0123456789abcdef"}, {"TRAINIT_TOKEN_FILE": str(file)}):
        environment = {"OTHER": "x", **variables}
        assert take_token(environment) == TOKEN
        assert environment == {"OTHER": "x"}  # nothing that this process starts has it
    assert take_token({}) == b""


@pytest.mark.parametrize(
    ("variables", "content", "mode", "message"),
    [
        ({"TRAINIT_TOKEN": "short"}, None, 0, "has 5 letters, fewer than 16; take the output of: python3"),
        ({"TRAINIT_TOKEN_FILE": "{}"}, "", 0o600, "has 0 letters"),
        ({"TRAINIT_TOKEN_FILE": "{}"}, "0" * 64, 0o640, r"others may read .* of mode 640: chmod 600"),
        ({"TRAINIT_TOKEN_FILE": "{}"}, "0" * 64, 0o604, "others may read"),
        ({"TRAINIT_TOKEN_FILE": "{}"}, None, 0, "cannot be read: .*token: No such file"),
        ({"TRAINIT_TOKEN": "0" * 64, "TRAINIT_TOKEN_FILE": "{}"}, "0" * 64, 0o600, "set one of them"),
    ],
)
def test_tokens_that_are_none(variables, content, mode, message, tmp_path):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(SetupError, match=message) as error:
        take_token({name: value.format(file) for name, value in variables.items()})
    assert "short" not in str(error.value).replace("fewer", "")
    assert "0000" not in str(error.value)


def test_a_job_without_a_token_says_what_that_means(monkeypatch, caplog):
    """It works, for who starts processes by hand; process 0 reports who else can get in, and a remedy."""
    monkeypatch.delenv("TRAINIT_TOKEN", raising=False)
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        places = [Place("flags", f"localhost:{port}", 2, number) for number in range(2)]
        results = threads.map(lambda place: rendezvous.meet_others(place, "cpu", {}, 20, lambda: ""), places)
        assert [[peer.process for peer in peers] for peers, _ in results] == [[1], [0]]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(
        f"token      none: whoever reaches localhost:{port} can take part in this job, or end"
    )
    assert "TRAINIT_TOKEN_FILE to a file of mode 600" in line
