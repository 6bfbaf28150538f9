"""Runs from start to end, killed, stopped, resumed, moved and broken: as processes."""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import tiny
from processes import (
    FAST,
    ROOT,
    assert_same_but_for_rounding,
    end,
    exact,
    last_saved_is_last_logged,
    last_step,
    metrics,
    saving,
    wait_for,
)

from trainit import config as config_lib
from trainit.checkpoints import digests
from trainit.checkpoints.store import CheckpointStore
from trainit.cluster.process import STOP_SIGNALS
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.prepare.demo import write_dataset
from trainit.tokenizers import ByteTokenizer
from trainit.train import step

KILLS = 10
# One program, compiled as users' are, for most runs here; others, with which one run is made, are given FAST.
run = functools.partial(processes.run_imported, XLA_FLAGS="")
start = functools.partial(processes.Fork, XLA_FLAGS="")


@pytest.fixture(scope="session")
def command(random_dataset):
    tiny_run = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}"
    return *tiny_run, "--config.cpu_devices=2", "--config.mesh.data=1", "--config.mesh.tensor=1"


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(*command, f"--workdir={workdir}")
    return workdir


@pytest.fixture(scope="session")
def undisturbed(whole):
    """Its metrics."""
    return metrics(whole)


def test_undisturbed_run(undisturbed):
    assert [record["step"] for record in undisturbed] == list(range(41))
    assert [r["step"] for r in undisturbed if "valid/loss" in r] == [0, 10, 20, 30, 40]
    assert undisturbed[40]["valid/loss"] < undisturbed[0]["valid/loss"] - 0.5
    assert undisturbed[40]["tokens"] == 40 * 16 * 32
    assert undisturbed[1]["train/learning_rate"] == 0
    assert {
        "throughput/tokens_per_second",
        "time/step_seconds",
        "time/data_fraction",
        "memory/peak_gib",
    } <= set(undisturbed[5])


@pytest.mark.evidence(
    "ten `kill -9` at random moments, in the middle of steps and of saves: each step once, losses "
    "bit-identical"
)
def test_padding_is_no_token(tmp_path):
    """Each batch is an epoch, whose last sequence is short: the targets of the split, counted by NumPy."""
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 115)))
    write_dataset(tmp_path / "data", ByteTokenizer(), {"train": [text], "validation": [text]})
    arguments = [f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={tmp_path}/data"]
    arguments += [f"--workdir={tmp_path}/run", "--config.batch_size=4", "--config.device_batch_size=4"]
    arguments += [
        "--config.cpu_devices=1",
        *(f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")),
    ]
    for steps in (3, 5):  # the second continues the first
        more = [f"--config.steps={steps}", "--config.checkpoint.overwrite_config=True"]
        run(*arguments, *more, XLA_FLAGS=FAST)
        found = [record["tokens"] for record in metrics(tmp_path / "run")]
        assert found == [115 * step for step in range(steps + 1)]


def test_ten_kills_change_nothing(command, undisturbed, tmp_path):
    """kill -9 mid-step and mid-save; the joined metrics have each step once, bit-identical."""
    seed = int(os.environ.get("KILLS_SEED", random.randrange(2**32)))
    print(f"seed of the moments: {seed}")
    draw = random.Random(seed)
    mid_save = 0
    for kill in range(KILLS):
        saved = max(CheckpointStore(tmp_path, read_only=True).steps(), default=0)
        before = _inode(tmp_path)
        process = start(*command, f"--workdir={tmp_path}")
        try:
            assert wait_for(process, lambda before=before: _inode(tmp_path) not in (before, None)), (
                "did not start"
            )
            if kill % 2:
                assert wait_for(process, lambda: saving(tmp_path)), "did not save"
                time.sleep(draw.uniform(0, 0.02))
                mid_save += saving(tmp_path)
            else:  # up to two steps past the last checkpoint, at any moment of a step
                target = saved + draw.randrange(0, 3)
                assert wait_for(process, lambda target=target: last_step(tmp_path) >= target), "did not step"
                time.sleep(draw.uniform(0, 0.05))
        finally:
            process.kill()
            output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    assert mid_save >= 2, "too few of the kills hit a save"
    run(*command, f"--workdir={tmp_path}")
    assert exact(metrics(tmp_path)) == exact(undisturbed)


@pytest.mark.evidence(
    "a damaged checkpoint: exit code 2, its file and the newest whole one, from which `fallback` continues"
)
def test_a_damaged_checkpoint_ends_the_run_or_is_passed_over(command, whole, undisturbed, tmp_path):
    """One bit is flipped in the newest one. The run from the one before writes the same metrics again.

    A line of metrics.jsonl, torn long before that, is found in the checkpoint; as a folder, it is an error.
    """
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    path = max((copy / "checkpoints/40").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    output = run(*command, f"--workdir={copy}", expect=2)
    (line,) = (line for line in output.splitlines() if "error" in line)
    assert f"checkpoint {copy}/checkpoints/40 is damaged: {path.relative_to(copy / 'checkpoints/40')}" in line
    assert "of step 39: --config.checkpoint.fallback=True takes that" in line
    assert exact(metrics(copy)) == exact(undisturbed)

    path = copy / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 20,', "", 1))
    output = run(*command, f"--workdir={copy}", "--config.checkpoint.fallback=True")
    assert f"{path} lacked 1 of 40 lines or had others: 1 are written again, 0 are lost" in output
    assert "the run continues from step 39" in output
    assert exact(metrics(copy)) == exact(undisturbed)
    assert CheckpointStore(copy, read_only=True).steps() == [36, 39, 40]
    assert [step for step in (36, 39, 40) if digests.problems(copy / f"checkpoints/{step}")] == []
    assert (copy / "checkpoints/40.damaged").is_dir()

    shutil.rmtree(copy / "checkpoints/40")
    path.unlink()
    path.mkdir()
    output = run(*command, f"--workdir={copy}", expect=1)
    assert f"error: [Errno 21] Is a directory: '{path}'" in output
    assert "Traceback" not in output


def _inode(workdir) -> int | None:
    """The lines of metrics.jsonl, which each start writes again."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


@pytest.mark.evidence(
    "stopped on 8 devices, resumed on 4, then on 1: the same batches, losses within rounding"
)
def test_other_sizes_go_on_with_the_same_run(command, undisturbed, tmp_path):
    """Stopped half-way on 8 devices, resumed on 4, then on 1: the same except for rounding."""
    workdir = f"--workdir={tmp_path}"
    eight = "--config.cpu_devices=8", "--config.mesh.data=2", "--config.mesh.tensor=2"
    _run_until(20, tmp_path, *command, workdir, *eight, XLA_FLAGS=FAST)
    four = "--config.cpu_devices=4", "--config.mesh.tensor=2"
    _run_until(30, tmp_path, *command, workdir, *four, XLA_FLAGS=FAST)
    run(*command, workdir, "--config.cpu_devices=1", "--config.mesh.fsdp=1", XLA_FLAGS=FAST)
    assert_same_but_for_rounding(metrics(tmp_path), undisturbed)


def _run_until(step, workdir, *args, **environment):
    """Asks the run to stop when it has reached a step, and checks that it saved and left with 75."""
    process = start(*args, **environment)
    wait_for(process, lambda: last_step(workdir) >= step)
    process.send_signal(signal.SIGTERM)
    output = end(process, 75, 60)
    assert CheckpointStore(workdir, read_only=True).steps()[-1] >= step
    assert "run the same command to continue" in output
    return output


@pytest.mark.evidence("SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2: everything is saved, exit code 75")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signals(number, command, tmp_path):
    process = start(*command, f"--workdir={tmp_path}")
    wait_for(process, lambda: last_step(tmp_path) >= 1)
    process.send_signal(number)
    output = end(process, 75, 60)
    assert f"stopped    on {number.name}" in output
    assert last_saved_is_last_logged(tmp_path)


@pytest.fixture(scope="module")
def stopped_at_ten(command, tmp_path_factory):
    """The folder of a run that was asked to stop at step 10 exactly."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "sitecustomize.py").write_text(
        "from trainit.train.loop import Job\n"
        "validate_and_save = Job.validate_and_save\n"
        "def stop_at_ten(self, step, state, reason):\n"
        "    return validate_and_save(self, step, state, reason or ('TEST' if step == 10 else ''))\n"
        "Job.validate_and_save = stop_at_ten\n"
    )
    workdir, path = folder / "run", f"{folder}:{ROOT}"
    processes.run(*command, f"--workdir={workdir}", expect=75, PYTHONPATH=path, XLA_FLAGS="")
    return workdir


def test_stopped_where_validation_is_due(command, stopped_at_ten, undisturbed, tmp_path):
    """Asked to stop at step 10, killed after resuming there: step 10 stands there once, and whole."""
    shutil.copytree(stopped_at_ten, tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 9  # step 10 waits for its validation
    process = start(*command, f"--workdir={tmp_path}/run")
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= 10)
    process.kill()
    process.communicate()
    run(*command, f"--workdir={tmp_path}/run")
    assert exact(metrics(tmp_path / "run")) == exact(undisturbed)


def test_time_limit_resume_and_complete(command, undisturbed, tmp_path):
    """Stopped by its time limit, resumed to the end; once more reports that nothing is to be done."""
    output = run(*command, f"--workdir={tmp_path}", "--config.max_minutes=0.001", expect=75)
    assert "stopped    on max_minutes" in output
    run(*command, f"--workdir={tmp_path}")
    assert exact(metrics(tmp_path)) == exact(undisturbed)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 7,', '"step": 3,'))
    output = run(*command, f"--workdir={tmp_path}")
    assert "all 40 steps are done; nothing to do" in output
    assert f"{path} lacked 1 of 41 lines or had others: 1 are written again, 0 are lost" in output
    assert exact(metrics(tmp_path)) == exact(undisturbed)


@pytest.mark.evidence("steps that are not finite end a run with its last good state saved")
def test_non_finite_updates_stop_the_run_with_the_last_good_state(command, random_dataset, tmp_path):
    """A learning rate beyond all bounds: the updates overflow, are skipped, and the run gives up."""
    command = *command, f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e39"
    output = run(*command, "--config.max_skipped=4", expect=1, XLA_FLAGS=FAST)
    assert "4 steps in a row (max_skipped) were skipped, up to step 4: loss" in output
    assert "Traceback" not in output
    assert re.search(r"skipped    step 1: loss .*: not finite; no update \(1 of 4 in a row\)", output)
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5]  # 5 was under way when the fourth was seen
    assert [r["train/skipped"] for r in records[1:]] == [1, 2, 3, 4, 5]
    output = run(*command, "--config.max_skipped=4", expect=1, XLA_FLAGS=FAST)
    assert "ended at step 5 after 5 steps in a row" in output  # starting it again does not help

    config = tiny.get_config()
    config.dataset.path = str(random_dataset)
    config = config_lib.resolve(config, 257)
    steps = step.build(config, shape_on(config, make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})))
    saved = CheckpointStore(tmp_path, read_only=True)
    assert saved.steps()[-1] == 5
    state = saved.restore(5, steps.abstract_state)
    assert int(state.skipped_in_a_row) == 5
    born = steps.init()
    for a, b in ((state.params, born.params), (state.opt_state, born.opt_state)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_a_postponed_validation_that_is_no_longer_asked_for(command, stopped_at_ten, tmp_path):
    """Stopped where validation is due, resumed with validation off: the step's own metrics are kept."""
    workdir = shutil.copytree(stopped_at_ten, tmp_path / "run")
    more = "--config.eval.every_steps=0", "--config.steps=12", "--config.checkpoint.overwrite_config=True"
    run(*command, f"--workdir={workdir}", *more, XLA_FLAGS=FAST)
    records = metrics(workdir)
    assert [r["step"] for r in records] == list(range(13))
    assert "train/loss" in records[10]
    assert "valid/loss" not in records[10]
    log = (workdir / "logs/process_0.log").read_text()
    starts = re.findall(r"start      to the end of step (\d+): .* (init|restore) ", log)
    assert starts == [("1", "init"), ("11", "restore")]


def test_load_path(command, whole, undisturbed, tmp_path):
    second, third = tmp_path / "second", tmp_path / "third"
    load = f"--config.checkpoint.load_path={whole}"

    # The whole state of another run's step, and the same steps from there.
    run(*command, f"--workdir={second}", load, "--config.checkpoint.load_step=36")
    assert exact(metrics(second)) == exact(undisturbed)[37:]

    # A config that differs is refused, and taken if that is asked for.
    rate = "--config.optimizer.learning_rate=0.02"
    output = run(*command, f"--workdir={third}", load, rate, expect=2)
    assert "optimizer.learning_rate: 0.01 -> 0.02" in output
    output = run(*command, f"--workdir={third}", load, "--config.checkpoint.load_step=5", expect=2)
    assert "load_step=5" in output

    # The parameters with a new optimizer: steps and schedule begin, the data continues where it was.
    fresh = "--config.checkpoint.overwrite_config=True", "--config.checkpoint.overwrite_optimizer=True"
    sgdm = f"{command[0]}:optimizer=sgdm", *command[1:], "--config.steps=20"
    run(*sgdm, f"--workdir={third}", load, *fresh, XLA_FLAGS=FAST)
    records = metrics(third)
    assert [r["step"] for r in records] == list(range(21))
    assert records[0]["valid/loss"] == pytest.approx(undisturbed[40]["valid/loss"], rel=1e-6)
    assert records[1]["tokens"] == 41 * 16 * 32
    assert records[1]["train/learning_rate"] == 0


def test_training_for_longer(command, whole, tmp_path):
    """The rates around the step, flags that warm up again, and what a comparison reads of it."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    longer = "--config.steps=44", "--config.checkpoint.overwrite_config=True"
    config = tiny.get_config("")
    flags = "--config.schedule.warmup=4", "--config.schedule.rewarm_at=40"
    assert " ".join(flags) in (workdir / "logs/process_0.log").read_text()

    # The schedule of 44 steps continues from where it would be; its rate is above the one that had ended.
    output = run(*command, f"--workdir={workdir}", *longer, XLA_FLAGS=FAST)
    peak = config.optimizer.learning_rate
    cosines = [math.cos(math.pi * (step - 4) / (steps - 4)) for step, steps in ((39, 40), (40, 44))]
    last, now = (peak * (1 + cosine) / 2 for cosine in cosines)
    assert f"rate       {last:.3g} in step 40, {now:.3g} in step 41" in output
    assert f"to warm up again there: {' '.join(flags)}" in output
    records = metrics(workdir)
    assert records[40]["train/learning_rate"] == pytest.approx(last, rel=1e-4)
    assert records[41]["train/learning_rate"] == pytest.approx(now, rel=1e-4)
    changes = json.loads((workdir / "run.json").read_text())["changes"]
    assert changes == [[40, "steps: 40 -> 44"]]

    # With the flags, the rate begins at 0; the changes are kept, and no rate is reported that stays.
    more = "--config.steps=60", longer[1], "--config.schedule.warmup=4", "--config.schedule.rewarm_at=44"
    output = run(*command, f"--workdir={workdir}", *more, XLA_FLAGS=FAST)
    records = metrics(workdir)
    assert records[45]["train/learning_rate"] == 0 < records[46]["train/learning_rate"]
    changes = json.loads((workdir / "run.json").read_text())["changes"]
    assert [step for step, _ in changes] == [40, 44]
    assert "steps: 44 -> 60" in changes[1][1]


def test_an_older_step_of_the_own_folder(command, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    own = f"--workdir={workdir}", f"--config.checkpoint.load_path={workdir}/../run", "--config.steps=44"
    for more in ("--config.checkpoint.load_step=36", "--config.checkpoint.overwrite_optimizer=True"):
        output = run(*command, *own, more, "--config.checkpoint.overwrite_config=True", expect=2)
        assert (
            "is the run's own folder, which continues at its newest step 40; to begin at another one"
            in output
        )
    assert exact(metrics(workdir)) == exact(metrics(whole))
