"""Snapshots on the hosts: their files, who keeps them, which one a restart takes, who may fetch them."""

import contextlib
import itertools
import json
import random
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.checkpoints.snapshots import folder, keeper, neighbours, parts
from trainit.cluster import transfers
from trainit.cluster.transfers import Wire
from trainit.config import Config, ConfigError
from trainit.data.loader import START
from trainit.train.resume import Resume

MESH = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
TOKEN = b"x" * 32


def tree(seed=0):
    """Arrays of several types and layouts, and what NumPy has of them."""
    draw = np.random.default_rng(seed)
    arrays = {
        "split": (draw.normal(size=(8, 6)).astype(np.float32), PartitionSpec("a", "b")),
        "replicated": (draw.normal(size=(3, 5)).astype(np.float32), PartitionSpec()),
        "half": (draw.normal(size=(4, 3)).astype(jnp.bfloat16), PartitionSpec("a")),
        "one": (np.int32(draw.integers(1000)), PartitionSpec()),
        "flags": (draw.integers(2, size=16).astype(bool), PartitionSpec("b")),
        "empty": (np.zeros((0, 4), np.float32), PartitionSpec()),
    }
    on_devices = {name: jax.device_put(x, NamedSharding(MESH, spec)) for name, (x, spec) in arrays.items()}
    return on_devices, {name: x for name, (x, _) in arrays.items()}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_a_part_is_the_state_as_it_was_bit_for_bit(tmp_path):
    state, expected = tree()
    layout = parts.layout(state)
    copied = parts.copy(state)
    change = jax.jit(
        lambda t: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x + 1, t), donate_argnums=0
    )
    shapes = abstract(state)
    jax.block_until_ready(change(state))  # takes over the memory of what was copied
    size = parts.write(tmp_path / "p", {"arrays": layout}, copied)
    once = sum(x.nbytes for x in expected.values())  # what all devices have is there once
    assert once < size == (tmp_path / "p").stat().st_size < once + 2000
    part = parts.read(tmp_path / "p")
    assert part.header["arrays"] == parts.layout(shapes) == json.loads(json.dumps(layout))
    restored = parts.restore(part, shapes)
    for name, x in expected.items():
        assert restored[name].sharding == shapes[name].sharding
        assert np.asarray(restored[name]).tobytes() == x.tobytes()
        for shard in restored[name].addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(x[shard.index]).tobytes()


def test_each_changed_byte_and_each_cut_is_found(tmp_path, monkeypatch):
    path = tmp_path / "p"
    monkeypatch.setattr(parts, "READ_BYTES", 5)  # the content is several blocks, and a part of one
    parts.write(path, {"about": {}}, [np.arange(9, dtype=np.int16)])
    whole = path.read_bytes()
    assert parts.read(path).content.tobytes() == np.arange(9, dtype=np.int16).tobytes()
    assert parts.is_whole(path)
    for position, bit in itertools.product(range(len(whole)), (0, 7)):
        changed = bytearray(whole)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged"):
            parts.read(path)
        assert not parts.is_whole(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            parts.read(path)
        assert not parts.is_whole(path)


@pytest.mark.parametrize(
    ("known", "after", "steps"),
    [
        ([[]], -1, []),
        ([[(4, 0), (2, 0)]], -1, [4, 2]),
        ([[(4, 0), (2, 0)]], 2, [4]),
        ([[(4, 0), (2, 0)], [(2, 1)]], -1, [2]),  # one that was being written
        ([[(4, 1), (4, 0)], []], -1, [4]),  # a new host; the neighbour has its part
        ([[(4, 0)], [(4, 0)]], -1, []),
        ([[(4, 0)], [(4, 1)], []], -1, []),
        ([[(6, 2), (6, 1)], [(6, 1)], [(6, 0), (4, 0)]], 3, [6]),
    ],
)
def test_the_steps_with_all_parts(known, after, steps):
    assert folder.whole_steps(known, after) == steps


@pytest.mark.parametrize("per_host", [1, 2, 8])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_process_keeps_the_parts_of_one_on_another_host(per_host, count):
    hosts = [f"h{n}" for n in range(count) for _ in range(per_host)]
    kept_by = [neighbours.keeper_of(process, hosts) for process in range(len(hosts))]
    assert sorted(kept_by) == list(range(len(hosts)))
    assert all(hosts[process] != hosts[other] for process, other in enumerate(kept_by))


def test_on_one_host_another_process_keeps_the_parts():
    assert [neighbours.keeper_of(process, ["h"] * 3) for process in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("name", ["run", "config", "data", "processes", "mesh", "version"])
def test_parts_of_something_else_do_not_count(name, tmp_path, caplog):
    about = dict.fromkeys(("run", "config", "data", "processes", "mesh", "version"), "1")
    own = folder.PartFolder(str(tmp_path), "0", 0, about)
    parts.write(own.path(4, 0), {"about": about}, [])
    parts.write(own.path(6, 0), {"about": about | {name: "2"}}, [])
    own.path(8, 0).write_bytes(b"x")
    (tmp_path / "trainit-0/process_0/notes").touch()
    own.path(9, 0).with_suffix(".0.tmp").write_bytes(b"x")
    assert own.find() == {(4, 0): [own.path(4, 0)]}
    assert f"6.0 is of a run with another {name}: not used" in caplog.text
    assert "8.0 is damaged: not used" in caplog.text
    own.keep({4})
    assert sorted(path.name for path in own.path(4, 0).parent.iterdir()) == ["4.0", "notes"]
    assert own.root.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"checkpoint.local_folder=.*file.* cannot be written: Not a directory"
    ):
        folder.PartFolder(str(tmp_path / "file"), "0", 0, {})


def test_a_folder_that_others_can_use(tmp_path):
    """A link that somebody else has made, for example, to a folder of this user's."""
    (tmp_path / "own").mkdir()
    (tmp_path / "trainit-0").symlink_to(tmp_path / "own")
    (tmp_path / "trainit-1").mkdir()
    (tmp_path / "trainit-1").chmod(0o755)
    for run in "01":
        with pytest.raises(ConfigError, match=rf"trainit-{run} is no folder of this user's alone"):
            folder.PartFolder(str(tmp_path), run, 0, {})
    assert not list((tmp_path / "own").iterdir())


def test_several_processes_without_a_token(job):
    with pytest.raises(ConfigError, match="this job has no token to know them by"):
        job(2, takes(2), token=b"")


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Calls a function for each of several processes, which are threads with a host's folder each.

    It is given a process's Snapshots. `over` is what a new job does: all processes are other ones.
    """
    place = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: place.process)
    state, _ = tree()
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)

    def start(count, action, hosts=None, steps=2, token=TOKEN, **changes):
        barrier, told = threading.Barrier(count, timeout=60), [None] * count

        def gather(value):
            told[place.process] = value
            barrier.wait()
            values = list(told)
            barrier.wait()
            return values

        sync = SimpleNamespace(
            gather=gather,
            gather_text=gather,
            agree=lambda n: gather(n)[0],
            is_lead=lambda: place.process == 0,
        )
        for module in (folder, keeper, neighbours):
            monkeypatch.setattr(module, "sync", sync)
        monkeypatch.setattr(jax, "process_count", lambda: count)

        def process(number):
            place.process = number
            config = tiny.get_config().to_dict()
            config["checkpoint"] |= {
                "local_steps": steps,
                "local_folder": str(tmp_path / (hosts or "abcdef")[number]),
            }
            watchdog, wire = SimpleNamespace(usual_seconds=lambda: 1.0), Wire("localhost:1", token)
            about = {"data": "d", "mesh": {"a": 4}} | changes
            return action(keeper.Snapshots(run, Config(config), about, abstract(state), watchdog, wire))

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(process, range(count)))

    return start


def takes(*steps):
    """An action: snapshots of states that are drawn from the step, each after the one before is whole."""

    def take(snapshots):
        for step in steps:
            snapshots.take(step, tree(step)[0], {"rows": step})
            snapshots._writing.result()

    return take


def finds(snapshots):
    """An action: the step of the newest snapshot, after its state was compared."""
    found = snapshots.newest(after=1)
    snapshots.forget_others()
    if snapshots._writing:
        snapshots._writing.result()
    if found is None:
        return None
    assert found.meta == {"rows": found.step}
    restored, expected = found.state(snapshots._abstract), tree(found.step)[1]
    for name, x in expected.items():
        assert np.asarray(restored[name]).tobytes() == x.tobytes()
    return found.step


def files(tmp_path):
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("?/*/*/*"))


def test_two_snapshots_stay_each_on_two_hosts(job, tmp_path):
    job(3, takes(2, 4, 6))
    names = {path.split("/", 1)[0] + "/" + path.split("/", 2)[2] for path in files(tmp_path)}
    expected = {
        f"{'abc'[p]}/process_{p}/{step}.{part}"
        for step in (4, 6)
        for p in range(3)
        for part in (p, (p - 1) % 3)
    }
    assert names == expected
    assert job(3, finds) == [6, 6, 6]
    assert {path.rsplit("/", 1)[1].split(".")[0] for path in files(tmp_path)} == {"6"}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_host_s_part_comes_from_its_neighbour(lost, job, tmp_path, caplog):
    caplog.set_level("INFO")
    job(3, takes(2, 4))
    # Its spare comes last: the processes after it have other numbers than before.
    shutil.rmtree(tmp_path / "abc"[lost])
    hosts = "abc".replace("abc"[lost], "") + "d"
    assert job(3, finds, hosts) == [4, 4, 4]
    assert "from process" in caplog.text
    shutil.rmtree(tmp_path / "d")  # and that one's, at once
    assert job(3, finds, "abc".replace("abc"[lost], "") + "e") == [4, 4, 4]


def test_two_neighbours_lost_at_once_are_too_many(job, tmp_path, caplog):
    job(3, takes(2, 4))
    for host in "ab":
        shutil.rmtree(tmp_path / host)
    assert job(3, finds) == [None] * 3
    assert "that of step 4 is not whole: the run continues from checkpoint 1" in caplog.text
    assert files(tmp_path) == []


@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_part_is_replaced_or_its_snapshot_passed_over(both, job, tmp_path, caplog):
    job(2, takes(2, 4))
    hurt = [path for path in files(tmp_path) if path.endswith("/4.1") and (both or path.startswith("b"))]
    assert len(hurt) == 1 + both
    for path in hurt:
        content = bytearray((tmp_path / path).read_bytes())
        content[-40] ^= 4
        (tmp_path / path).write_bytes(content)
    assert job(2, finds) == ([2, 2] if both else [4, 4])
    assert "4.1 is damaged" in caplog.text


def test_a_copy_that_is_whole_is_sent(job, tmp_path):
    """Of two copies on one host, the first of which is damaged."""
    job(3, takes(2, 4), "abb")
    (host,) = {path.parent.parent for path in tmp_path.glob("b/*/process_*/4.*")}
    for number in (1, 2):
        (host / f"process_{number}").mkdir(exist_ok=True)
    (whole,) = host.glob("*/4.0")
    copies = [host / f"process_{number}/4.0" for number in (1, 2)]
    content = bytearray(whole.read_bytes())
    for copy in copies:
        copy.write_bytes(content)
    content[-40] ^= 4
    own = folder.PartFolder(str(tmp_path / "b"), host.name.removeprefix("trainit-"), 1, {})
    own.find()[4, 0][0].write_bytes(content)
    shutil.rmtree(tmp_path / "a")
    assert job(3, finds, "dbb") == [4, 4, 4]


@pytest.mark.parametrize("change", ["count", "mesh", "data"])
def test_another_job_takes_the_checkpoint(change, job, tmp_path, caplog):
    job(2, takes(2, 4))
    found = job(1, finds) if change == "count" else job(2, finds, **{change: "other"})
    assert set(found) == {None}
    assert f"with another {'processes' if change == 'count' else change}: not used" in caplog.text


def test_a_start_that_is_refused_removes_nothing(job, tmp_path):
    """As one with a wrong flag, after which the right one is given."""
    job(2, takes(2, 4))
    kept = files(tmp_path)
    for change in ({"data": "other"}, {}):
        found = job(2, lambda snapshots: snapshots.newest(after=1), **change)
        assert [snapshot and snapshot.step for snapshot in found] == ([None] * 2 if change else [4, 4])
        assert files(tmp_path) == kept
    assert job(2, finds) == [4, 4]


def with_fields(fields):
    config = tiny.get_config()
    config.update_from_flattened_dict(fields)
    return Config(config)


def test_what_a_resume_may_change_leaves_snapshots(tmp_path, caplog, monkeypatch):
    """As raising a limit that has ended the run: what has changed is logged, as with a checkpoint."""
    free = {"stall_seconds": 9.0, "model.remat": "block", "eval.every_steps": 7, "checkpoint.local_steps": 5}
    others = {"seed": 1, "model.dim": 64, "spikes.skip_data": "3:4", "diagnostics.every_steps": 1}
    before = Config(tiny.get_config())
    assert keeper._hash(with_fields(free)) == keeper._hash(before)
    for name, value in others.items():
        assert keeper._hash(with_fields({name: value})) != keeper._hash(before), name

    caplog.set_level("INFO")
    meta = {"config": before.to_dict(), **START._replace(rows=64, tokens=2048).to_meta(), "dataset": "d"}
    meta |= {"inputs": {}, "wandb_id": "w", "changes": [[2, "seed: 0 -> 1"]], "metrics": {"lines": 4}}
    found = SimpleNamespace(step=4, meta=json.loads(json.dumps(meta)), state=lambda layout: f"state {layout}")
    monkeypatch.setattr(Resume, "_compile_ahead", lambda *_: None)
    start = Resume(
        with_fields(free),
        SimpleNamespace(identity={"dataset": "d", "inputs": {}}, check_resume=lambda *_: None),
        None,
        SimpleNamespace(abstract_state="here"),
        SimpleNamespace(steps=lambda: [1], folder=tmp_path),
        SimpleNamespace(newest=lambda after: found if after == 1 else None),
    ).start_point()
    assert (start.state, start.step, start.saved_step, start.is_resumed) == ("state here", 4, 1, True)
    assert start.position == START._replace(rows=64, tokens=2048)
    assert (start.changes, start.wandb_id) == ([[2, "seed: 0 -> 1"]], "w")
    changed = [record.getMessage() for record in caplog.records if "changed" in record.getMessage()]
    assert len(changed) == len(free)
    assert "changed    stall_seconds: 300.0 -> 9.0" in changed


def test_older_than_the_checkpoint_or_of_another_folder(job, tmp_path):
    job(1, takes(2, 4))
    assert job(1, lambda snapshots: snapshots.newest(after=4)) == [None]
    job(1, takes(2, 4))
    (tmp_path / "run/snapshots.json").unlink()  # the run's folder was emptied
    assert job(1, finds) == [None]


def test_what_fails_leaves_the_one_before(job, tmp_path, caplog, monkeypatch):
    def fails(snapshots):
        takes(2)(snapshots)
        process = jax.process_index()
        if process == 1:
            snapshots._folder.path = lambda step, part: Path("/proc/nowhere")
        snapshots.take(4, tree(4)[0], {"rows": 4})
        snapshots._writing.exception()
        snapshots.take(6, tree(6)[0], {"rows": 6})
        snapshots._writing.exception()
        return snapshots._whole

    assert job(2, fails) == [2, 2]
    assert "that of step 4 is not whole" in caplog.text
    # Process 1 cannot keep what process 0 gives it: it sees that as it sends, or as it waits for an answer.
    said = re.escape(f"that of step 4 is not whole: process 1 ({socket.gethostname()}): ")
    assert re.search(said + r"(it closed the connection|\[Errno 32\]|\[Errno 104\])", caplog.text)
    assert job(2, finds) == [2, 2]


def test_close_removes_all(job, tmp_path):
    def close(snapshots):
        takes(2)(snapshots)
        snapshots.close()

    job(2, close)
    assert not list(tmp_path.glob("?/*"))
    assert not (tmp_path / "run/snapshots.json").exists()


def test_nothing_is_done_without_being_asked_for(job, tmp_path):
    def idle(snapshots):
        assert snapshots.newest(after=-1) is None
        snapshots.forget_others()
        assert not any(map(snapshots.is_due, range(10)))
        snapshots.close()

    job(1, idle, steps=0)
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def server(tmp_path):
    """A Server that keeps what comes in tmp_path/kept, and answers with it."""

    def handle(connection):
        message = connection.receive(lambda message: tmp_path / "kept" if message["keep"] else None)
        connection.send(message | {"done": True}, tmp_path / "kept")

    made = transfers.Server(Wire("localhost:1", TOKEN), handle)
    yield made
    made.close()


def test_files_of_all_sizes_go_to_and_fro(server, tmp_path):
    for size in (0, 1, transfers.CHUNK_BYTES, 3 * transfers.CHUNK_BYTES + 7):
        sent = random.Random(size).randbytes(size)
        (tmp_path / "sent").write_bytes(sent)
        (tmp_path / "kept").write_bytes(b"")
        connection = transfers.call(*server.address, TOKEN)
        connection.send({"keep": True}, tmp_path / "sent")
        assert connection.receive(lambda _: tmp_path / "came") == {"keep": True, "done": True}
        connection.close()
        assert (tmp_path / "kept").read_bytes() == sent
        assert not size or (tmp_path / "came").read_bytes() == sent


def test_a_full_disk_names_the_file(server, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "sent").write_bytes(b"x")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(transfers, "new_file", lambda _: contextlib.nullcontext(full))
        connection = transfers.call(*server.address, TOKEN)
        connection.send({"keep": True}, tmp_path / "sent")
        with pytest.raises(ConnectionResetError):
            connection.receive(lambda _: None)
    connection.close()
    assert f"from 127.0.0.1: [Errno 28] No space left on device: '{tmp_path}/kept'" in caplog.text


def test_a_stranger_gets_nothing(server, tmp_path, caplog):
    with pytest.raises(ConnectionError, match="does not have this job's token"):
        transfers.call(*server.address, b"y" * 32)
    with socket.create_connection(server.address) as connection:
        connection.sendall(bytes(64))
        answer = b"".join(iter(lambda: connection.recv(100), b""))
        assert len(answer) == 64
        assert answer[32:] == bytes(32)  # after a nonce no proof
    assert "stranger   127.0.0.1 does not have this job's token: closed" in caplog.text
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("position", [0, 5, 40, 200, -1])
def test_what_is_changed_on_the_way_is_not_kept(position, server, tmp_path):
    """Between the two ends is somebody who passes the handshake through, and then changes one byte."""
    (tmp_path / "sent").write_bytes(bytes(1000))
    connection = transfers.call(*server.address, TOKEN)
    taken = []
    real = connection._connection
    connection._connection = SimpleNamespace(sendall=taken.append)
    connection.send({"keep": True}, tmp_path / "sent")
    data = bytearray(b"".join(taken))
    data[position] ^= 1
    with contextlib.suppress(OSError):  # it may close before it has read all
        real.sendall(data)
        real.shutdown(socket.SHUT_WR)
        assert real.recv(100) == b""
    assert not (tmp_path / "kept").exists()
    assert not (tmp_path / "kept.tmp").exists()
