"""A job of two processes, each with a host's folder of its own, that loses one of them with its folder."""

import os
import random
import re
import shutil
import signal
import time

import pytest
from processes import ROOT, end, exact, last_step, launch, metrics, pid_of, started_again, wait_for

# Both have other folders for what is temporary, as on two hosts.
HOSTS = """
import os
os.environ["TMPDIR"] = "FOLDER/host_" + os.environ.get("TRAINIT_PROCESS_ID", "x")
os.makedirs(os.environ["TMPDIR"], exist_ok=True)
"""


@pytest.mark.evidence(
    "with `checkpoint.local_steps`, a job that loses process 1, and then process 0, by SIGKILL at a random "
    "moment and with all that its host has, continues from the snapshot on the other host, without any "
    "checkpoint: losses are bit-identical to an undisturbed run's"
)
def test_each_process_is_lost_with_its_snapshots(random_dataset, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOSTS.replace("FOLDER", str(tmp_path)))
    run, calm, hosts = tmp_path / "run", tmp_path / "calm", [tmp_path / f"host_{rank}" for rank in (0, 1)]

    def job(workdir, *more):
        return launch(
            2,
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={workdir}", "--config.cpu_devices=1"),
            *("--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.mesh.tensor=1"),
            *("--config.steps=90", "--config.eval.every_steps=30", "--config.checkpoint.save_steps=0", *more),
            PYTHONPATH=f"{tmp_path}:{ROOT}",
        )

    def whole(step):
        """Whether there is a snapshot after a step, with each part on both hosts."""
        names = [{path.name for path in host.glob("trainit-*/*/*")} for host in hosts]
        kept = [name for name in names[0] & names[1] if name.endswith(".1") and int(name[:-2]) > step]
        return any(f"{name[:-2]}.0" in names[0] & names[1] for name in kept)

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, before, at_kill = random.Random(seed), 0, []
    process = job(run, "--config.checkpoint.local_steps=4", "--config.restart.limit=2")
    for rank in (1, 0):
        assert wait_for(process, lambda before=before: whole(before))
        time.sleep(draw.uniform(0, 0.1))
        pid = pid_of(process, rank)
        os.kill(pid, signal.SIGKILL)
        shutil.rmtree(hosts[rank])
        before = last_step(run)
        at_kill.append(before)
        # All that is left of the job ends before it starts again.
        assert wait_for(process, lambda rank=rank, pid=pid: started_again(process, rank, pid))
    output = end(process, 0)

    text = r"resume     at step (\d+) of 90, from the hosts' snapshot; the newest checkpoint is of step none"
    resumed = list(map(int, re.findall(text, output)))
    print(f"lost after steps {at_kill}, resumed at {resumed}")
    assert len(resumed) == 2
    assert all(0 < step <= known + 1 and step % 4 == 0 for step, known in zip(resumed, at_kill, strict=True))
    for rank, step in zip((1, 0), resumed, strict=True):
        log = (run / f"logs/process_{rank}.log").read_text()
        assert f"snapshots  part {rank} of step {step}: from process {1 - rank}" in log
    end(job(calm), 0)
    assert exact(metrics(run)) == exact(metrics(calm))
    assert [path for host in hosts for path in host.glob("trainit-*")] == []
    assert not (run / "snapshots.json").exists()
