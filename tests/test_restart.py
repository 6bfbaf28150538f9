"""When a job is started again after a fault, and on which hosts."""

import json
import subprocess
import sys

import pytest

from trainit.cluster import restart
from trainit.cluster.place import Place
from trainit.cluster.restart import AGAIN, END, QUEUE, History, decide

pytestmark = pytest.mark.evidence(
    "after a fault, a job continues where its hosts are well, on a spare for one that is lost or failed "
    "twice, on fewer if the run may shrink, or else goes back to the queue; never after a config error, a "
    "request to stop, or a fault that comes again at its step"
)
HOSTS = ["n1", "n2", "n3"]
RUN = {"limit": 3, "processes": 4}  # two on each of two hosts
OF_2 = {"code": 1, "text": "process 2 (n2, pid 7) is gone: it was killed or has crashed"}


def after(result=1, answering="n1 n2 n3", hosts=HOSTS, run=RUN, fault=OF_2, step="9", history=None):
    return decide(result, hosts, answering.split(), 2, run, fault, step, history or History())


@pytest.mark.parametrize(
    ("changes", "code", "hosts", "said"),
    [
        ({}, AGAIN, "n1 n2", "a process ended with 1, after step 9: start 2 of at most 4"),
        ({"answering": "n1 n3"}, AGAIN, "n1 n3", "from the newest checkpoint, on n1, n3 instead of n1, n2"),
        ({"answering": "n2 n3"}, AGAIN, "n2 n3", "on n2, n3 instead of n1, n2"),
        ({"history": History(step="7", used=["n1", "n3"])}, AGAIN, "n1 n3", "start 2 of"),
        ({"answering": "n1"}, QUEUE, "n2", "back in the queue: 1 of 2 hosts are left, without n2"),
        ({"answering": "n1", "run": {**RUN, "fits": [1, 2]}}, AGAIN, "n1", "on n1 instead of n1, n2"),
        ({"answering": "n1", "run": {**RUN, "fits": [1, 3]}}, QUEUE, "n2", "without n2"),
        ({"answering": "", "run": {**RUN, "fits": [1, 2]}}, QUEUE, "n1 n2", "0 of 2 hosts are left"),
        ({"run": {}}, END, "", ""),
        ({"run": {**RUN, "limit": 0}}, END, "", ""),
        ({"result": 2}, END, "", ""),
        ({"result": 75}, END, "", ""),
        ({"fault": {"code": 2, "text": "process 1 (n1, pid 5) failed: x"}}, END, "", ""),
        ({"fault": {"code": 75, "text": "process 1 (n1, pid 5) failed: x"}}, END, "", ""),
        ({"history": History(step="9")}, END, "", "as at the start before; what is wrong there"),
        ({"history": History(step="9"), "answering": "n1 n3"}, AGAIN, "n1 n3", "start 2"),
        ({"history": History(step="8", starts=4)}, END, "", "started 4 times; restart.limit is 3"),
    ],
)
def test_decisions(changes, code, hosts, said):
    decision = after(**changes)
    assert (decision.code, decision.hosts) == (code, hosts.split()), decision.lines
    assert said in " ".join(decision.lines)
    assert bool(said) == bool(decision.lines)


def test_a_host_that_failed_twice_is_not_used_again():
    """The first time, all start again there; a fault of another host in between does not count."""
    history = History()
    assert after(step="1", history=history).hosts == ["n1", "n2"]
    of_0 = {"code": 1, "text": "process 0 (n1, pid 3) failed: out of memory"}
    assert after(step="2", fault=of_0, history=history).hosts == ["n1", "n2"]
    third = after(step="3", history=history)
    assert third.hosts == ["n1", "n3"]
    assert third.lines[0].startswith("n2 failed twice and is not used again in this job")
    assert third.lines[0].endswith(OF_2["text"])
    assert history.failures == {"n2": 2, "n1": 1}


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("process 1 (n1, pid 5) stalls: no step done for 9 s; behind: process 3 (n2, pid 7): waiting", "n2"),
        (
            "process 0 (n1, pid 5) failed: after 300 s 1 of 4 processes are missing: 3; process 0 listens",
            "n2",
        ),
        ("process 1 (n1, pid 5) is lost: no sign of life for 40 s", "n1"),
        ("process 9 (n1, pid 5) is lost: no sign of life for 40 s", ""),
        ("", ""),
    ],
)
def test_whose_fault_it_was(text, host):
    history = History()
    after(fault={"code": 1, "text": text}, history=history)
    assert history.failures == ({host: 1} if host else {})


def test_the_command_keeps_what_was_before_in_files(tmp_path, monkeypatch):
    file, run = tmp_path / "job.run", tmp_path / "run"
    monkeypatch.setenv("TRAINIT_RUN_FILE", str(file))
    monkeypatch.setenv("TRAINIT_NODES", "2")
    run.mkdir()

    def command(*args) -> tuple[int, str, str]:
        module = [sys.executable, "-m", "trainit.cluster.restart"]
        done = subprocess.run([*module, *args], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip(), done.stderr

    restart.report_run(Place("", "", 4, 1), run, 5)
    restart.report_run(Place("", "", 4, 0), run, 0)
    assert not file.exists()
    for step in (3, 5):
        restart.report_run(Place("", "", 4, 0), run, 5)
        restart.report_fault(1, OF_2["text"], "")
        restart.report_fault(1, "process 0 (n1, pid 3) failed: its peer is gone", "")  # a consequence
        (run / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps({"step": step}) + "\n")
        code, hosts, said = command("137", "n1 n2", "n1 n2")
        assert f"after step {step}: start" in said
        file.with_name("job.run.fault").unlink()
    assert (code, hosts) == (QUEUE, "n2")
    # Of what the job gets next, the bad host is not used either.
    assert command("start", "n1 n2 n3", "n1 n2 n3")[:2] == (AGAIN, "n1 n3")
    assert command("start", "n1 n2", "n1 n2")[:2] == (QUEUE, "n2")
    # Somebody wants the run to stop, and it fails meanwhile.
    restart.report_fault(1, OF_2["text"], "SIGUSR1")
    assert command("1", "n1 n2 n3", "n1 n2 n3") == (END, "", "")
