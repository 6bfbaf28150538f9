"""Jobs of several processes on this machine, stopped, killed, suspended, hung, moved to other sizes."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import (
    ROOT,
    SMOOTH,
    assert_same_but_for_rounding,
    end,
    environments,
    exact,
    last_saved_is_last_logged,
    last_step,
    launch,
    metrics,
    pid_of,
    saving,
    start,
    started_again,
    wait_for,
)

from trainit.checkpoints import digests
from trainit.checkpoints.store import CheckpointStore

pytestmark = pytest.mark.evidence(
    "jobs of several processes: each kind of stop, loss, stall and failed save of the page Faults"
)


@pytest.fixture
def job(random_dataset, tmp_path):
    """Starts a job of the tests' smallest run, of one device a process, in tmp_path/run."""

    def begin(count, *args, workdir=tmp_path / "run", **environment) -> subprocess.Popen:
        return launch(
            count,
            f"--config={ROOT}/tests/tiny.py",
            f"--config.dataset.path={random_dataset}",
            f"--workdir={workdir}",
            *("--config.cpu_devices=1", "--config.mesh.data=1", "--config.mesh.fsdp=-1"),
            *("--config.mesh.tensor=1", "--config.steps=24"),
            *args,
            **environment,
        )

    return begin


@pytest.fixture
def patched(tmp_path):
    """Environment of processes that run a piece of Python first; RANK is the process's number in it."""

    def write(code) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(
            f"import os, time\nRANK = int(os.environ.get('TRAINIT_PROCESS_ID', 0))\n{code}"
        )
        return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}

    return write


@pytest.mark.evidence(
    "with `restart.limit`, launch/local.sh starts a job again when process 1, and then process 0, is killed: "
    "the run ends complete without anyone touching it, with losses bit-identical to an undisturbed one's; "
    "each process finds its program in the cache"
)
def test_stopped_then_each_process_killed(job, tmp_path):
    """Each step once, bit-identical to a run that nobody disturbed; who is killed is named."""
    steps = "--config.steps=90"  # which no machine does between the sight of a step and a kill
    calm, run = tmp_path / "calm", tmp_path / "run"
    output = end(job(2, steps, workdir=calm), 0)
    assert "process 1" in output
    assert "done       all 90 steps" in output

    process = job(2, steps)
    assert wait_for(process, lambda: last_step(run) >= 5)
    process.send_signal(signal.SIGUSR1)
    output = end(process, 75, 60)
    assert "stopped    on SIGUSR1 at step" in output
    assert last_saved_is_last_logged(run)
    assert last_step(run) >= 5

    process, killed = job(2, steps, "--config.restart.limit=2"), []
    for rank in (1, 0):
        before = last_step(run)
        assert wait_for(process, lambda before=before: last_step(run) >= before + 2)
        killed.append(pid_of(process, rank))
        os.kill(killed[-1], signal.SIGKILL)
        at = time.monotonic()
        assert wait_for(process, lambda rank=rank: started_again(process, rank, killed[-1]))
        assert time.monotonic() - at < 60  # nobody hangs
    output = end(process, 0)
    for rank, pid in zip((1, 0), killed, strict=True):
        assert re.search(rf"process {rank} \([^)]*pid {pid}\) is gone: it was killed or has crashed", output)
    said = re.findall(r"restart    a process ended with \d+, after step \d+: start (\d) of at most 3", output)
    assert said == ["2", "3"]
    assert exact(metrics(run)) == exact(metrics(calm))
    newest = run / "checkpoints/90"
    assert digests.problems(newest) == []
    assert {digests._writer(name) for name in digests.read(newest)} == {0, 1}
    for rank in (0, 1):  # the program that process 0 of the first job has put into the cache is for all
        *_, last = re.findall("program    train: .*", _log(run, rank))
        assert "from the cache" in last


FAILS = """
if RANK == 1:
    from pathlib import Path
    from trainit.data.dataset import Split
    read, count, wrong = Split.read, [0], Path("FILE")
    def fail(self, sequences, length):
        if self.name == "train":
            count[0] += 1
            if not wrong.exists() and count[0] == 12:
                wrong.write_text(str(list(sequences)))
            if wrong.exists() and wrong.read_text() == str(list(sequences)):
                raise RuntimeError("this record is wrong")
        return read(self, sequences, length)
    Split.read = fail
"""


def test_a_fault_that_repeats_at_its_step_is_not_tried_for_ever(job, patched, tmp_path):
    process = job(2, "--config.restart.limit=5", **patched(FAILS.replace("FILE", f"{tmp_path}/wrong")))
    output = end(process, 1)
    assert output.count(": start 2 of at most 6, from the newest checkpoint") == 1
    assert "restart    not done: a process ended with 1, after step" in output
    assert "start 3" not in output
    assert last_step(tmp_path / "run") >= 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_process_ends_the_job(rank, job, tmp_path):
    process = job(2, "--silence_seconds=4", TRAINIT_GRACE="2")
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= 2)
    pid = pid_of(process, rank)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    output = end(process, None, 60)
    assert time.monotonic() - stopped < 60
    assert f"pid {pid}) is lost: no sign of life for" in output
    assert "stack of thread MainThread" in (tmp_path / f"run/logs/process_{1 - rank}.log").read_text()


def test_a_briefly_suspended_process_changes_nothing(job, tmp_path):
    process = job(2, "--silence_seconds=8")
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= 2)
    pid = pid_of(process, 1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(pid, signal.SIGCONT)
    end(process, 0)
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(25))


HANGS = """
if RANK == 1:
    from trainit.data.dataset import Split
    read, count = Split.read, [0]
    def hang(self, sequences, length):
        count[0] += self.name == "train"
        while count[0] > 9:
            time.sleep(1)
        return read(self, sequences, length)
    Split.read = hang
"""


def test_a_stalled_process_is_named_by_all_with_its_stack(job, patched, tmp_path):
    """Process 1's data never comes: its file system hangs. All of it is alive, nothing makes progress."""
    process = job(2, "--config.stall_seconds=4", "--config.eval.every_steps=0", **patched(HANGS))
    output = end(process, None, 120)
    assert "stalls: no step done for" in output
    behind = output.split("behind: ")[1].splitlines()[0]
    assert behind.startswith("process 1 (")
    assert "waiting for data for" in behind
    assert "process 0 (" not in behind
    for rank in (0, 1):
        assert "stack of thread" in (tmp_path / f"run/logs/process_{rank}.log").read_text()
    assert "in hang" in (tmp_path / "run/logs/process_1.log").read_text()


def test_asked_to_stop_while_all_wait_for_data(job, patched, tmp_path):
    process = job(2, "--config.eval.every_steps=0", **patched(HANGS.replace("RANK == 1", "True")))
    run = tmp_path / "run"
    assert wait_for(process, lambda: last_step(run) >= 5)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output = end(process, 75, 60)
    assert time.monotonic() - asked < 20
    assert "stopped    on SIGTERM at step" in output
    assert last_saved_is_last_logged(run)


SLOW_COMPILER = """
if RANK == 1:
    os.environ["TRAINIT_CACHE"] += "/own"  # where it finds nothing of process 0's
    from jax._src import compiler
    compile = compiler.backend_compile_and_load
    def slow(backend, module, *args, **kwargs):
        if "train_step" in str(module.operation.attributes["sym_name"]):
            time.sleep(35)
        return compile(backend, module, *args, **kwargs)
    compiler.backend_compile_and_load = slow
"""


def test_one_process_compiles_longer_than_collectives_wait(job, patched, tmp_path):
    """Gloo's wait 30 s for a process that is not there yet."""
    started = time.monotonic()
    end(job(2, "--config.steps=4", **patched(SLOW_COMPILER), TRAINIT_CACHE=str(tmp_path)), 0)
    assert time.monotonic() - started > 35


def test_asked_to_stop_while_starting(job, tmp_path):
    """Before the first step is done, compiling included: nothing is lost, and nobody waits for it."""
    process = job(2, "--config.model.scan_layers=False", "--config.model.num_blocks=24")
    log = tmp_path / "run/logs/process_1.log"
    assert wait_for(process, lambda: log.exists() and "optimizer" in log.read_text())
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output = end(process, 75, 60)
    assert "stopped    on SIGTERM, before the first step was done" in output
    assert time.monotonic() - asked < 10
    assert last_step(tmp_path / "run") == -1


SLOW_EVALUATION = """
from trainit.data.rows import order
call = order.Spaced.__call__
def slow(self, positions):
    time.sleep(1)
    return call(self, positions)
order.Spaced.__call__ = slow
"""


def test_asked_to_stop_while_evaluating(job, patched, tmp_path):
    """An evaluation of a minute is given up, and done by whoever resumes: metrics as if nothing had been."""
    run = tmp_path / "run"
    more = "--config.eval.sequences=0", "--config.batch_size=4", "--config.steps=12"
    process = job(2, *more, "--config.eval.every_steps=6", **patched(SLOW_EVALUATION))
    assert wait_for(process, lambda: "step 0: validation" in _log(run, 0) and last_step(run) == 5)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    end(process, 75, 60)
    assert time.monotonic() - asked < 15
    assert (last_step(run), CheckpointStore(run, read_only=True).steps()[-1]) == (5, 6)
    end(job(2, *more, "--config.eval.every_steps=6"), 0)
    end(job(2, *more, "--config.eval.every_steps=6", workdir=tmp_path / "calm"), 0)
    assert exact(metrics(run)) == exact(metrics(tmp_path / "calm"))


def _log(run, rank) -> str:
    path = run / f"logs/process_{rank}.log"
    return path.read_text() if path.exists() else ""


def test_asked_to_stop_while_saving(job, tmp_path):
    run = tmp_path / "run"
    process = job(2, "--config.model.dim=256", "--config.checkpoint.save_steps=2", "--config.steps=400")
    assert wait_for(process, lambda: last_step(run) >= 3 and saving(run))
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    output = end(process, 75, 60)
    assert time.monotonic() - asked < 20
    assert "stopped    on SIGINT" in output
    assert last_saved_is_last_logged(run)


def test_a_terminal_that_is_closed_stops_the_job(job, tmp_path):
    """As a lost ssh does: SIGHUP comes to launch/local.sh and its processes, and nothing reads any more."""
    run = tmp_path / "run"
    master, slave = pty.openpty()
    process = job(1, "--config.steps=100000", terminal=slave)
    os.close(slave)
    assert wait_for(process, lambda: last_step(run) >= 2)
    os.close(master)
    assert process.wait(60) == 75
    assert "stopped    on SIGHUP at step" in _log(run, 0)
    assert last_saved_is_last_logged(run)


@pytest.mark.evidence("when launch/local.sh is killed, its processes save and end by themselves")
def test_a_launcher_that_is_killed_leaves_nothing_behind(job, tmp_path):
    run = tmp_path / "run"
    process = job(2, "--config.steps=100000")
    assert wait_for(process, lambda: last_step(run) >= 2)
    process.kill()
    output = process.communicate(timeout=60)[0]  # until no process has its end of the pipe any more
    assert "stopped    on the end of its launcher at step" in output
    assert not (run / "lock.json").exists()
    assert last_saved_is_last_logged(run)


def test_two_processes_train_as_one(random_dataset, job, tmp_path):
    """Two processes of four devices: the run of one process with eight, up to the order of sums."""
    mesh = "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    end(job(2, *mesh, "--config.cpu_devices=4"), 0)
    end(job(1, *mesh, "--config.cpu_devices=8", workdir=tmp_path / "one"), 0)
    assert_same_but_for_rounding(metrics(tmp_path / "run"), metrics(tmp_path / "one"))
    assert {p.name for p in (tmp_path / "run/logs").iterdir()} == {"process_0.log", "process_1.log"}


@pytest.mark.evidence("4 processes, then 3, 2 and 1: the same batches, losses within rounding")
def test_other_numbers_of_processes_go_on_with_the_same_run(job, tmp_path):
    """Stopped on 4 processes, resumed on 3, on 2 and on 1: the same batches, losses within rounding."""
    run = tmp_path / "run"
    size = "--config.batch_size=24", "--config.model.dim=48"
    for count, step in ((4, 4), (3, 9), (2, 15)):
        process = job(count, *size)
        assert wait_for(process, lambda step=step: last_step(run) >= step)
        process.send_signal(signal.SIGTERM)
        end(process, 75, 60)
    end(job(1, *size), 0)
    end(job(1, *size, workdir=tmp_path / "calm"), 0)
    assert_same_but_for_rounding(metrics(run), metrics(tmp_path / "calm"))


def test_streams_go_on_in_other_numbers_of_processes(tmp_path):
    """Straight from .jsonl: stopped in 2 processes with a worker each, done by one.

    At step 3 the batch grows, and with it the micro-steps: a process has streams that were another's.
    """
    draw = np.random.default_rng(0)
    for name, count in (("train", 400), ("validation", 60)):
        sizes = draw.integers(20, 400, count)
        texts = ["".join(map(chr, draw.integers(97, 123, size))) for size in sizes]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def begin(count, workers, workdir=tmp_path / "run"):
        return launch(
            count,
            f"--config={ROOT}/tests/tiny.py:dataset=jsonl",
            *(f"--config.dataset.path={tmp_path}/train.jsonl", "--config.dataset.tokenizer=bytes"),
            f"--config.dataset.validation_path={tmp_path}/validation.jsonl",
            *(
                "--config.dataset.streams=4",
                "--config.dataset.window=6",
                f"--config.dataset.workers={workers}",
            ),
            *("--config.cpu_devices=1", "--config.mesh.data=1", "--config.mesh.fsdp=-1"),
            *("--config.mesh.tensor=1", "--config.steps=20", "--config.device_batch_size=8"),
            *("--config.batch_schedule=3: 32", f"--workdir={workdir}"),
        )

    process = begin(2, 1)
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= 4)
    process.send_signal(signal.SIGTERM)
    output = end(process, 75, 60) + end(begin(1, 0), 0)
    assert "read them too" not in output  # each process has streams of its own
    end(begin(1, 0, tmp_path / "calm"), 0)
    assert_same_but_for_rounding(metrics(tmp_path / "run"), metrics(tmp_path / "calm"))


def test_a_mixture_in_blocks_goes_on_in_other_numbers_of_processes(job, subset_dataset, tmp_path):
    """Subsets by changing weights, read by workers, validated apart: 2 processes, then 1, as 1 alone."""
    run, calm = tmp_path / "run", tmp_path / "calm"
    more = (
        f"--config.dataset.path={subset_dataset}",
        "--config.dataset.mixture=Alpha 0.5, Beta (1) 0.5; 30: Beta (1) 0.3, Gamma 0.7",
        *("--config.dataset.order=blocks", "--config.dataset.block_tokens=128", "--config.dataset.workers=1"),
        *("--config.steps=60", SMOOTH),
    )
    process = job(2, *more)
    assert wait_for(process, lambda: last_step(run) >= 8)
    process.send_signal(signal.SIGTERM)
    end(process, 75, 60)
    assert last_step(run) < 30  # the weights are to change yet
    end(job(1, *more), 0)
    end(job(1, *more, workdir=calm), 0)
    assert_same_but_for_rounding(metrics(run), metrics(calm))
    assert {f"valid/loss/{name}" for name in ("Alpha", "Beta (1)", "Gamma")} <= metrics(run)[-1].keys()


FULL_DISK = """
from trainit.checkpoints import retry
retry.RETRY_SECONDS = (1, 1, 1)
if RANK == 1:
    import resource
    from trainit.checkpoints.store import CheckpointStore
    save, left = CheckpointStore.save, [FAILURES]
    def fail(self, *args):
        left[0] -= 1
        most = 20_000 if left[0] >= 0 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        save(self, *args)
    CheckpointStore.save = fail
"""


def test_a_save_that_fails_on_one_process_is_done_again_by_all(job, patched, tmp_path):
    """Process 1 cannot write files of more than 20 kB for the time of two saves."""
    output = end(job(2, **patched(FULL_DISK.replace("FAILURES", "2"))), 0)
    assert "save       failed, tried again in 1 s" in output
    assert "File too large" in output
    end(job(2, workdir=tmp_path / "calm"), 0)
    assert exact(metrics(tmp_path / "run")) == exact(metrics(tmp_path / "calm"))
    assert CheckpointStore(tmp_path / "run", read_only=True).steps()[-1] == 24


def test_the_save_of_a_stop_that_fails_on_one_process(job, patched, tmp_path):
    """Process 0 cannot write files of more than 20 kB for the time of the only save; process 1 can."""
    full = FULL_DISK.replace("RANK == 1", "RANK == 0").replace("FAILURES", "1")
    process = job(2, "--config.checkpoint.save_steps=0", "--config.steps=400", **patched(full))
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= 3)
    process.send_signal(signal.SIGTERM)
    assert "save       failed, tried again in 1 s" in end(process, 75, 60)
    assert last_saved_is_last_logged(tmp_path / "run")


COMMIT_FAILS = """
from trainit.checkpoints import digests, retry, store
retry.RETRY_SECONDS, store.TIMEOUT_SECONDS = (1, 1, 1), 6
collect, calls = digests.collect, []
def fail(folder):
    calls.append(folder)
    if len(calls) in (1, 3):
        raise OSError(28, "No space left on device")
    collect(folder)
digests.collect = fail
"""


def test_a_save_that_fails_when_all_have_written_is_done_again(job, patched, tmp_path):
    """Process 0 cannot complete a checkpoint, once in the midst of a run and once while it stops.

    Process 1 still waits for the first one in the background, until that takes too long.
    """
    run, flags = tmp_path / "run", ("--config.checkpoint.save_steps=(3,)", "--config.steps=100000")
    process = job(2, *flags, **patched(COMMIT_FAILS))
    assert wait_for(process, lambda: any(path.name.isdigit() for path in run.glob("checkpoints/*")))
    time.sleep(7)
    process.send_signal(signal.SIGTERM)
    end(process, 75, 60)
    again = "save       failed, tried again in 1 s: "
    for rank, reason in enumerate(("[Errno 28] No space left on device", "another process says why")):
        assert _log(run, rank).count(again) == _log(run, rank).count(again + reason) == 2
    assert last_saved_is_last_logged(run)


def test_a_save_that_keeps_failing_ends_the_job(job, patched, tmp_path):
    """After the first save, which is good, no more: the job ends, and that one is whole."""
    never = FULL_DISK.replace("[FAILURES]", "[5]").replace("left[0] >= 0", "left[0] < 4")
    code = "from trainit.checkpoints import retry\nretry.RETRY_SECONDS = (1, 1, 1)\n" + never
    output = end(job(2, **patched(code)), 1, 120)
    assert "a checkpoint could not be saved in 4 attempts" in output
    assert CheckpointStore(tmp_path / "run", read_only=True).steps()[-1] == 3
    end(job(2), 0)
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(25))


def test_two_jobs_in_one_folder(job, random_dataset, tmp_path):
    """The second refuses to start and says who is there; a dead holder does not block."""
    run = tmp_path / "run"
    first = job(2, "--config.steps=100000")
    assert wait_for(first, lambda: last_step(run) >= 1)
    lead = pid_of(first, 0)
    second = start(
        f"--config={ROOT}/tests/tiny.py",
        *(f"--config.dataset.path={random_dataset}", f"--workdir={run}", "--config.steps=100000"),
    )
    output = end(second, 2, 60)
    assert f"run is held by launch script, pid {lead} on " in output.splitlines()[-1]
    before = last_step(run)
    assert wait_for(first, lambda: last_step(run) > before)  # it was not disturbed
    # The holder first, which then leaves its lock behind; the other one may be gone before its turn comes.
    for pid in [pid_of(first, rank) for rank in (0, 1)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end(first, None, 60)
    third = job(2, "--config.steps=100000")
    assert wait_for(third, lambda: last_step(run) > before + 2)
    third.send_signal(signal.SIGTERM)
    assert "workdir    taken over from launch script" in end(third, 75, 60)


def test_the_doctor_sees_a_folder_that_is_not_shared(random_dataset, tmp_path):
    """Two processes, each of which sees a folder of its own under the same name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from trainit.tools.doctor import environment\n"
        "environment.SHARED_SECONDS = 1.0\n"
        "if os.environ.get('TRAINIT_PROCESS_ID') == '1':\n"
        "    from trainit.config import command_line\n"
        "    workdir = command_line.workdir\n"
        "    command_line.workdir = lambda arguments: workdir(arguments) / 'elsewhere'\n"
    )
    environment = {"TRAINIT_COMMAND": "doctor", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    arguments = (
        f"--config={ROOT}/tests/tiny.py",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}/run",
    )
    output = end(launch(2, *arguments, "--config.cpu_devices=4", **environment), 1, 90)
    assert [line.split()[0] for line in output.splitlines() if "  FAIL  " in line] == ["shared"]
    assert "1 of 16 checks failed" in output
    assert re.search(r"process 1 \([^)]*\) cannot see what process 0 \(", " ".join(output.split()))


def test_a_process_that_does_not_come_is_named(random_dataset, tmp_path):
    """Two of three start: both say which one is missing, and end."""
    command = (
        f"--config={ROOT}/tests/tiny.py",
        *(f"--config.dataset.path={random_dataset}", f"--workdir={tmp_path}/run", "--wait_seconds=2"),
        *("--coordinator=localhost:61437", "--num_processes=3"),
    )
    processes = [start(*command, f"--process_id={rank}") for rank in (0, 2)]
    for process in processes:
        assert "1 of 3 processes are missing: 1" in end(process, 1, 60)


def test_a_wrong_config_ends_the_job_with_2(job):
    assert "batch_size=5 is not a multiple" in end(job(2, "--config.batch_size=5"), 2, 60)


def listens_at(pid: int) -> list[str]:
    """Where a process listens: addresses with ports, in the kernel's notation."""
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            links.append(str(descriptor.readlink()))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


@pytest.mark.evidence(
    "a job's token and the key of W&B are in no file that a run leaves and on no command line; its ports are "
    "open at the job's address alone; files and folders have the umask's modes"
)
def test_what_a_job_leaves_has_no_secrets_and_the_umask_s_modes(job, tmp_path):
    run, key = tmp_path / "run", "0123456789" * 4
    before = os.umask(0o027)
    try:
        more = "--config.wandb.project=x", "--config.steps=2"
        process = job(2, *more, WANDB_MODE="offline", WANDB_API_KEY=key, WANDB_SILENT="true")
    finally:
        os.umask(before)
    # Programs are compiled for seconds after W&B has begun.
    assert wait_for(process, lambda: list(run.glob("wandb/*/*.wandb")))
    pids = [pid_of(process, rank) for rank in (0, 1)]
    variables = dict(
        entry.split(b"=", 1) for entry in Path(f"/proc/{pids[0]}/environ").read_bytes().split(b"\0") if entry
    )
    token = variables[b"TRAINIT_TOKEN"]
    assert re.fullmatch(rb"[0-9a-f]{64}", token)
    for pid in (process.pid, *pids):
        assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert Path(f"/proc/{pid}/environ").stat().st_mode & 0o077 == 0
    # What process 0 has started, such as W&B's service, was not handed the token. A child that has not yet
    # begun its own program still shows its parent's environment.
    assert wait_for(
        process, lambda: (e := environments("-P", str(pids[0])).values()) and not any(token in x for x in e)
    )
    # The port at which the processes have met is closed, JAX's coordinator is open at one address.
    for pid in pids:
        assert not [where for where in listens_at(pid) if set(where.split(":")[0]) == {"0"}]
    port = int(variables[b"TRAINIT_COORDINATOR"].split(b":")[1])
    assert not [where for where in listens_at(pids[0]) if int(where.split(":")[1], 16) == port]
    local = "0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"
    assert [where for where in listens_at(pids[0]) if where.split(":")[0] in local]
    output = end(process, 0)
    assert "stranger" not in output

    left = [path for path in run.rglob("*") if "probe" not in path.name]
    assert {"config.json", "metrics.jsonl", "process_1.log"} <= {path.name for path in left}
    assert any(path.suffix == ".wandb" for path in left)
    for path in left:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o750 if path.is_dir() else 0o640), (path, oct(mode))
        if path.is_file():
            content = path.read_bytes()
            assert token not in content, path
            assert bytes.fromhex(token.decode()) not in content, path
            assert key.encode() not in content, path
    assert token.decode() not in output
    assert key not in output


def test_usage():
    result = subprocess.run([ROOT / "launch/local.sh", "4"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage:" in result.stderr
