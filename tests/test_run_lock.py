"""The run's folder: writable, and held by one job at a time."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainit.cluster import run_lock
from trainit.cluster.run_lock import RunLock
from trainit.config import ConfigError

pytestmark = pytest.mark.evidence(
    "a run's folder is held by one job at a time; a holder that died does not count"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 1.0)


def lock(lost=None) -> RunLock:
    return RunLock("Slurm job 7", lost or pytest.fail)


def holder(folder) -> dict:
    return json.loads((folder / "lock.json").read_text())


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
    first = lock()
    first.take(tmp_path)
    with pytest.raises(ConfigError, match=rf"held by Slurm job 7, pid {os.getpid()} on .*, since 20.*wait"):
        lock().take(tmp_path)
    first.release()
    assert not (tmp_path / "lock.json").exists()
    second = lock()
    second.take(tmp_path)
    second.release()


def test_a_dead_process_of_this_host_does_not_block(tmp_path):
    code = "import sys, os, pathlib; from trainit.cluster.run_lock import RunLock; "
    code += "RunLock('job 1', print).take(pathlib.Path(sys.argv[1])); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert holder(tmp_path)["job"] == "job 1"
    start = time.monotonic()
    mine = lock()
    mine.take(tmp_path)
    assert holder(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - start < run_lock.DEAD_SECONDS + 1.0  # it was seen to be dead, not waited for
    mine.release()


def test_a_reused_pid_is_another_process(tmp_path):
    mine = lock()
    mine.take(tmp_path)
    about = holder(tmp_path) | {"id": "other", "started": "12345", "pid": os.getppid()}
    mine.release()
    (tmp_path / "lock.json").write_text(json.dumps(about))
    mine = lock()
    mine.take(tmp_path)
    mine.release()


def elsewhere(tmp_path):
    """A lock that a job on another host holds."""
    mine = lock()
    mine.take(tmp_path)
    about = holder(tmp_path) | {"host": "n17", "id": "other"}
    mine.release()
    (tmp_path / "lock.json").write_text(json.dumps(about))


def test_a_holder_on_another_host_lives_as_long_as_it_touches_the_lock(tmp_path):
    elsewhere(tmp_path)
    over = threading.Event()

    def beat():
        while not over.wait(0.2):
            os.utime(tmp_path / "lock.json")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on n17"):
            lock().take(tmp_path)
    finally:
        over.set()
        thread.join()
    mine = lock()
    mine.take(tmp_path)  # and when it does no more, it is dead
    mine.release()


def test_who_loses_the_folder_hears_of_it(tmp_path):
    lost = []
    mine = RunLock("job 1", lost.append)
    mine.take(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps(holder(tmp_path) | {"id": "other", "job": "job 2"}))
    end = time.monotonic() + 5
    while not lost and time.monotonic() < end:
        time.sleep(0.05)
    assert "was taken over by job 2" in lost[0]


def test_who_has_lost_the_folder_lets_nobody_in(tmp_path, monkeypatch):
    """A process that was suspended, and comes to its end before it has noticed that another job took over."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 60)
    first = lock()
    first.take(tmp_path)
    other = {**holder(tmp_path), "id": "another", "job": "job 8"}
    (tmp_path / "lock.json").write_text(json.dumps(other))
    first.release()
    assert holder(tmp_path) == other


@pytest.mark.parametrize(
    ("what", "said"), [("runs", "=.*/runs was removed"), ("runs/lock.json", "has lost its lock.json")]
)
def test_a_folder_that_is_removed(what, said, tmp_path):
    (tmp_path / "runs").mkdir()
    lost, heard = [], threading.Event()
    first = lock(lambda text: (lost.append(text), heard.set()))
    first.take(tmp_path / "runs")
    path = tmp_path / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert heard.wait(10)
    assert re.search(said, lost[0])
    first.release()


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path):
    """As on a full disk, where the file can be created but has no content; here, files may have no bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ConfigError, match=r"lock.json cannot be written: File too large"):
            lock().take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        "null",
        '{"host": "HOST"}',
        '{"host": "HOST", "namespace": 3}',
        b"\xff\0",
        "[" * 100_000,
    ],
)
def test_a_damaged_lock_is_replaced_at_once_with_a_line(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "DEAD_SECONDS", 3600.0)  # which would be waited for a holder elsewhere
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)
    content = (
        content if isinstance(content, bytes) else content.replace("HOST", socket.gethostname()).encode()
    )
    (tmp_path / "lock.json").write_bytes(content)
    mine = lock()
    mine.take(tmp_path)
    assert holder(tmp_path)["pid"] == os.getpid()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"workdir    {tmp_path}/lock.json is damaged and names no job: replaced"
    mine.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_to_nothing_is_a_damaged_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)
    (tmp_path / "lock.json").symlink_to("nothing")
    mine = lock()
    mine.take(tmp_path)
    assert holder(tmp_path)["pid"] == os.getpid()
    mine.release()


def test_whoever_holds_a_lock_that_is_damaged_says_so(tmp_path):
    lost, heard = [], threading.Event()
    mine = lock(lambda text: (lost.append(text), heard.set()))
    mine.take(tmp_path)
    (tmp_path / "lock.json").write_text("")
    assert heard.wait(10)
    assert lost[0] == f"--workdir={tmp_path} has lost its lock.json: damaged"


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    first = lock()
    first.take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    with pytest.raises(ConfigError, match="held by Slurm job 7"):
        lock().take(tmp_path)
    first.release()


@pytest.mark.parametrize(("code", "is_left"), [(0, False), (75, False), (2, False), (1, True)])
def test_an_exit_with_a_code_that_ends_all_processes_releases_it(code, is_left, tmp_path):
    """After a failure, other processes of the job may still be writing."""
    script = "import sys, pathlib; from trainit.cluster import process, run_lock\n"
    script += "mine = run_lock.RunLock('job 1', print); leave = process.Exit(lead=True)\n"
    script += "leave.release_lock = mine.release; mine.take(pathlib.Path(sys.argv[1]))\n"
    script += "leave(int(sys.argv[2]))"
    result = subprocess.run([sys.executable, "-c", script, tmp_path, str(code)], check=False)
    assert result.returncode == code
    assert (tmp_path / "lock.json").exists() == is_left


def test_of_many_that_take_over_at_once_one_has_it(tmp_path):
    elsewhere(tmp_path)
    outcomes = []

    def take():
        mine = RunLock("race", lambda text: None)
        try:
            mine.take(tmp_path)
            mine.confirm()
            outcomes.append(mine)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if isinstance(outcome, RunLock)]
    assert len(winners) == 1, outcomes
    winners[0].release()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run cannot be written: Not a directory"):
        run_lock.make_folder(tmp_path / "file" / "run", 0)
    assert run_lock.make_folder(tmp_path / "run", 3).is_dir()
    assert list((tmp_path / "run" / "logs").iterdir()) == []
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "gone")  # known before the first step, not after
    with pytest.raises(ConfigError, match=r"run/checkpoints cannot be written: File exists"):
        run_lock.make_folder(tmp_path / "run", 0)
    (tmp_path / "gone").mkdir()
    run_lock.make_folder(tmp_path / "run", 0)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"loop cannot be written: Too many levels of symbolic links"):
        run_lock.make_folder(tmp_path / "loop", 0)
    with pytest.raises(ConfigError, match=r"has \*\*, which checkpoints cannot have"):
        run_lock.make_folder(tmp_path / "a**", 0)
    with pytest.raises(ConfigError, match=r"is no UTF-8, which checkpoints need"):
        run_lock.make_folder(tmp_path / os.fsdecode(b"\xff"), 0)
