"""Which runs a sweep's file means, how they are started, and how a schedule is found piece by piece."""

import json
import math
import os
import re
import runpy
import signal
import time

import numpy as np
import pytest
from processes import ROOT, start, wait_for
from test_compare import write

from trainit.__main__ import main
from trainit.config import ConfigError, flatten
from trainit.experiments.sweep import command, greedy, spec
from trainit.experiments.sweep import launch as starting

RATE = "optimizer.learning_rate"


def sweep_file(tmp_path, **asked):
    asked = {"config": "configs/debug.py"} | asked
    (tmp_path / "sweep.py").write_text(f"def get_sweep(arg):\n    return {asked!r}\n")
    return spec.read(f"{tmp_path}/sweep.py", tmp_path / "out")


def points(jobs):
    return [(job.variant, *dict(job.changes).values(), job.seed) for job in jobs]


def test_grid_is_all_combinations(tmp_path):
    variants = {
        "a": {"groups": "optimizer=adamw"},
        "b": {"groups": "optimizer=muon", "grid": {RATE: [0.5]}, "fields": {"steps": 7}},
    }
    sweep = sweep_file(
        tmp_path,
        config="configs/debug.py:dataset=demo",
        fields={"steps": 5},
        variants=variants,
        grid={RATE: [0.1, 0.2], "clip_norm": [0.0, 1.0]},
        seeds=[3, 4],
    )
    jobs = sweep.wanted(lambda job: None)
    grid = [("a", rate, clip, seed) for rate in (0.1, 0.2) for clip in (0.0, 1.0) for seed in (3, 4)]
    assert points(jobs) == grid + [("b", 0.5, clip, seed) for clip in (0.0, 1.0) for seed in (3, 4)]
    assert len({job.folder for job in jobs}) == len(jobs)
    assert jobs[-1].arguments == (
        "--config=configs/debug.py:dataset=demo,optimizer=muon",
        "--config.steps=7",
        "--config.optimizer.learning_rate=0.5",
        "--config.clip_norm=1.0",
        "--config.seed=4",
        f"--workdir={tmp_path}/out/b/learning_rate=0.5,clip_norm=1/seed_4",
    )


@pytest.mark.parametrize(
    "values",
    [
        [0.1, math.nextafter(0.1, 1), 0.1000001],
        ["a/b", "a_b", "a//b", "a_/b", "/a/b"],
        [1, 1.5, "x", True, "1,2"],
    ],
)
def test_other_values_have_other_folders(values, tmp_path):
    jobs = sweep_file(tmp_path, grid={"optimizer.beta1": values}, seeds=[1]).wanted(lambda job: None)
    assert [dict(job.changes)["optimizer.beta1"] for job in jobs] == values
    assert len({job.folder for job in jobs}) == len(values)
    assert {job.folder.parent.parent for job in jobs} == {tmp_path / "out"}


def test_what_would_share_a_folder_is_refused(tmp_path):
    """And what is meant twice is run once."""
    sweep = sweep_file(tmp_path, grid={"a.x": ["1,y=2", "1"], "a.y": ["3", "2,y=3"]}, seeds=[1])
    with pytest.raises(ConfigError, match=r"the folder .*x=1,y=2,y=3/seed_1: .*x=1,y=2 and .*x=1;"):
        sweep.wanted(lambda job: None)
    assert len(sweep_file(tmp_path, grid={RATE: [0.1, 0.1]}, seeds=[1]).wanted(lambda job: None)) == 1


def test_random_search_draws_the_same_each_time(tmp_path):
    ranges = {RATE: ("log", 1e-4, 1e-1), "optimizer.beta1": ("uniform", 0.8, 0.99), "steps": [10, 20]}
    jobs, again = (
        sweep_file(tmp_path, random=ranges, samples=200, seeds=[1]).wanted(lambda job: None) for _ in range(2)
    )
    assert jobs == again
    drawn = [dict(job.changes) for job in jobs]
    rates = [d[RATE] for d in drawn]
    assert 1e-4 <= min(rates) < 2e-4
    assert 5e-2 < max(rates) <= 1e-1
    assert 70 < sum(rate < 10**-2.5 for rate in rates) < 130  # half of them, on a logarithmic scale
    assert all(0.8 <= d["optimizer.beta1"] <= 0.99 for d in drawn)
    assert {d["steps"] for d in drawn} == {10, 20}


def known(losses):
    """Losses of jobs by the rate; a rate that is not among them has not been run."""
    return lambda job: losses.get(dict(job.changes)[RATE])


@pytest.mark.evidence("a sweep looks for rates beyond its grid, and judges them by other seeds")
def test_best_rate_is_looked_for_beyond_the_grid_and_judged_by_other_seeds(tmp_path):
    asked = {"grid": {RATE: [0.01, 0.02]}, "tuning_seeds": [0], "seeds": [1, 2], "extend": True}
    sweep = sweep_file(tmp_path, **asked)
    assert points(sweep.wanted(known({0.01: 3.0}))) == [("", 0.01, 0), ("", 0.02, 0)]
    assert points(sweep.wanted(known({0.01: 3.0, 0.02: 2.0})))[2:] == [("", 0.04, 0)]
    # Seven are the grid's, its extension's, and the best's.
    losses = {0.01: 3.0, 0.02: 2.0, 0.04: 2.5}
    assert points(sweep.wanted(known(losses)))[2:] == [("", 0.04, 0), ("", 0.02, 1), ("", 0.02, 2)]
    assert points(sweep.wanted(known({0.01: 2.0, 0.02: 2.1})))[2:] == [("", 0.005, 0)]
    # A run that fails is worse than any; where all fail there is no best.
    assert points(sweep.wanted(known({0.01: 3.0, 0.02: math.inf, 0.005: 4.0})))[3:] == [
        ("", 0.01, 1),
        ("", 0.01, 2),
    ]
    assert len(sweep.wanted(known({0.01: math.inf, 0.02: math.inf}))) == 2
    # It ends, even if every further rate is better.
    endless = sweep.wanted(lambda job: 1 / dict(job.changes)[RATE])
    assert max(dict(job.changes)[RATE] for job in endless) == 0.02 * 2**spec.EXTENSIONS
    plain = sweep_file(tmp_path, **asked | {"extend": False})
    assert points(plain.wanted(known({0.01: 3.0, 0.02: 2.0})))[2:] == [("", 0.02, 1), ("", 0.02, 2)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sees": [1]}, r"unknown sees; a sweep has config, fields"),
        ({"seeds": 3}, r"seeds=3 is no list"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be different whole numbers"),
        ({"seeds": [1], "tuning_seeds": [1]}, r"\[1\] are in seeds and in tuning_seeds"),
        ({"grid": {RATE: 0.1}}, r"grid optimizer.learning_rate=0.1 is no list of values"),
        (
            {"variants": {"a": {"group": ""}}},
            r"variant a has group; it may have groups, fields, grid, random",
        ),
        ({"variants": {"a": {}}, "baseline": "b"}, r"baseline='b'; there are a"),
        ({"random": {RATE: (1, 2)}, "samples": 1}, r"random optimizer.learning_rate=\(1, 2\): write \('log'"),
        ({"random": {RATE: [1]}}, r"random needs samples"),
        ({"extend": True}, r"extend needs tuning_seeds"),
        ({"variants": {}}, r"variants={} has none"),
        ({"variants": {1: {}}}, r"variant 1: its name is that of a folder"),
        ({"variants": {"../x": {}}}, r"variant '../x': its name is that of a folder"),
        ({"variants": {"/x": {}}}, r"variant '/x': its name is that of a folder"),
        ({"variants": {"a": None}}, r"variant a: None is no dict of groups, "),
        ({"random": {RATE: []}, "samples": 1}, r"random optimizer.learning_rate=\[\]: write \('log'"),
        ({"seeds": []}, r"seeds=\[\] has none: nothing would be run"),
        ({"grid": {"seed": [1, 2]}}, r"seed is no field of a sweep: give all of them as 'seeds'"),
        ({"fields": {"seed": 1}}, r"seed is no field of a sweep"),
    ],
)
def test_what_cannot_be_meant(tmp_path, asked, message):
    with pytest.raises(ConfigError, match=message):
        sweep_file(tmp_path, **asked)


def test_a_file_that_raises(tmp_path):
    (tmp_path / "s.py").write_text("def get_sweep(arg):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"s.py raises ZeroDivisionError: division by zero"):
        spec.read(f"{tmp_path}/s.py", None)
    with pytest.raises(ConfigError, match=r"none.py: there is no such file"):
        spec.read(f"{tmp_path}/none.py", None)


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    (job,) = sweep_file(tmp_path, fields={"steps": 10}, seeds=[1]).wanted(lambda job: None)
    job.folder.mkdir(parents=True)
    (job.folder / "arguments.txt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/arguments\.txt'"):
        starting.prepare(job)


def test_finished_runs_are_known_by_their_folder(tmp_path):
    (job,) = sweep_file(tmp_path, fields={"steps": 10}, seeds=[1]).wanted(lambda job: None)
    assert not starting.finished(job)
    write(job.folder, [5.0, 4.0])
    starting.prepare(job)
    assert starting.finished(job)
    (longer,) = sweep_file(tmp_path, fields={"steps": 20}, seeds=[1]).wanted(lambda job: None)
    with pytest.raises(ConfigError, match=r"other settings \(--config.steps=10 -> --config.steps=20\)"):
        starting.finished(longer)
    (more,) = sweep_file(tmp_path, fields={"steps": 10, "clip_norm": 1}, seeds=[1]).wanted(lambda job: None)
    with pytest.raises(ConfigError, match=r"other settings \(.*clip_norm"):
        starting.finished(more)


def segments(tmp_path, loss_of, **asked):
    """A greedy search whose runs end with loss_of(steps, rate), and the jobs that it has started."""
    sweep = sweep_file(tmp_path, greedy=asked, seeds=[1])
    started = []

    def run(jobs):
        for job in jobs:
            started.append(job)
            given = dict(argument[2:].split("=", 1) for argument in job.arguments)
            steps, rate = int(given["config.steps"]), dict(job.changes)["rate"]
            loss = loss_of(steps, rate)
            if loss is None:
                job.folder.mkdir(parents=True, exist_ok=True)
                continue
            write(job.folder, [5.0] * (steps // 10) + [loss])
            (job.folder / "metrics.jsonl").write_text(
                "\n".join(
                    json.dumps({"step": n, "tokens": n, "train/loss": loss, "valid/loss": loss})
                    for n in range(steps - 9, steps + 1)
                )
            )
            (job.folder / "checkpoints").mkdir()
            starting.prepare(job)

    return sweep, started, run


@pytest.mark.evidence("a schedule is found piece by piece")
def test_greedy_search_goes_on_from_the_best_of_each_segment(tmp_path):
    best = {10: 0.1, 20: 0.2, 30: 0.05}
    sweep, started, run = segments(
        tmp_path,
        lambda steps, rate: 3 + abs(rate - best[steps]) if rate < 1 else None,  # a rate of 1 breaks
        boundaries=[0, 10, 20, 30],
        first=[0.01, 0.1, 1.0],
    )
    assert greedy.search(sweep, run) == [0.0, 0.1, 0.2, 0.05]
    tried = [dict(job.changes)["rate"] for job in started]
    assert tried == [0.01, 0.1, 1.0, 0, 0.025, 0.05, 0.1, 0.2, 0.4, 0, 0.05, 0.1, 0.2, 0.4, 0.8]
    last = next(job for job in started if job.folder.parent.name == "steps_20-30")
    assert "--config.schedule.boundaries=(0, 10, 20, 30)" in last.arguments
    assert "--config.schedule.values=(0.0, 0.1, 0.2, 0.0)" in last.arguments
    assert f"--config.checkpoint.load_path={tmp_path}/out/steps_10-20/rate=0.2" in last.arguments
    assert "--config.checkpoint.load_step=20" in last.arguments
    kept = sorted(path.parent.name for path in (tmp_path / "out").rglob("checkpoints"))
    assert kept == ["rate=0.05", "rate=0.1", "rate=0.2"]
    found = json.loads((tmp_path / "out/schedule.json").read_text())
    assert found == {"boundaries": [0, 10, 20, 30], "values": [0.0, 0.1, 0.2, 0.05]}
    count = len(started)
    assert greedy.search(sweep, run) == [0.0, 0.1, 0.2, 0.05]
    assert len(started) == count + 1  # what broke is tried again; the rest is done


def test_greedy_search_prefers_a_large_rate_of_equals(tmp_path):
    losses = {0.01: 3.0, 0.1: 3.05, 1.0: 3.2}
    sweep, _, run = segments(
        tmp_path, lambda steps, rate: losses[rate], boundaries=[0, 10], first=list(losses), epsilon=0.07
    )
    assert greedy.search(sweep, run) == [0.0, 0.1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"boundaries": [0, 10, 10]}, r"boundaries=\[0, 10, 10\] must be whole steps that rise from 0"),
        ({"boundaries": [0, 10], "factor": 1.0}, r"factor=1.0 must be above 1"),
        ({"boundaries": [0, 10], "steps": 1}, r"unknown steps; there are boundaries, first"),
    ],
)
def test_greedy_searches_that_cannot_work(tmp_path, asked, message):
    with pytest.raises(ConfigError, match=message):
        greedy.search(sweep_file(tmp_path, greedy=asked, seeds=[1]), lambda jobs: None)


SMALL = {
    "steps": 4,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.num_blocks": 1,
    "model.context_length": 16,
    "cpu_devices": 1,
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "eval.sequences": 4,
    "dataset.path": "",
}


@pytest.fixture
def real(tmp_path, random_dataset):
    """A sweep of three runs, of which one cannot work."""
    asked = {
        "config": "configs/debug.py",
        "fields": SMALL | {"dataset.path": str(random_dataset), "cpu_devices": 2, "mesh.fsdp": 2},
        "grid": {"batch_size": [4, 5]},
        "seeds": [1],
    }
    asked["variants"] = {"a": {}, "b": {"grid": {"batch_size": [8]}}}
    (tmp_path / "sweep.py").write_text(f"def get_sweep(arg):\n    return {asked!r}\n")
    return tmp_path


@pytest.mark.evidence(
    "a sweep that was stopped continues where it was; one that was killed waits for the run that it has left"
)
def test_a_sweep_is_run_stopped_and_gone_on_with(real):
    """Stopped at its first run, killed, then resumed; what broke is named, and it exits with 1."""
    arguments = (f"{real}/sweep.py", f"--output={real}/out")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # which a child inherits
    process = start(*arguments, command="sweep")
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    first = real / "out/a/batch_size=4/seed_1"
    try:
        while not (first / "arguments.txt").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "the same command resumes it" in output
    assert not (real / "out/b").exists()

    # Killed when its run has taken the folder, and started again while that run still has it.
    process, lock = start(*arguments, command="sweep"), first / "lock.json"
    assert wait_for(process, lock.exists)
    orphan = json.loads(lock.read_text())["pid"]
    os.kill(orphan, signal.SIGSTOP)
    process.kill()
    process.wait()
    process = start(*arguments, command="sweep")
    said = next(line for line in process.stdout if "waiting until" in line)
    os.kill(orphan, signal.SIGCONT)
    assert f"a batch_size=4 seed 1: waiting until alone, pid {orphan} on " in said
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    for name in ("a/batch_size=4/seed_1", "b/batch_size=8/seed_1"):
        assert (real / "out" / name / "metrics.jsonl").read_text().count('"valid/loss"') == 2
    failed = [line for line in output.splitlines() if line.startswith("failed")]
    assert [line.split(": ")[0] for line in failed] == ["failed  a batch_size=5 seed 1"]
    assert "batch_size=5 is not a multiple of mesh.data*mesh.fsdp=2" in failed[0]
    assert (real / "out/sweep.png").stat().st_size > 10_000
    assert "<svg" in (real / "out/sweep.html").read_text()


def test_dry_run_prints_the_commands(real, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["sweep", f"{real}/sweep.py", f"--output={real}/out", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("trainit train --config=configs/debug.py --config.") for line in lines)
    assert not (real / "out").exists()


def test_dry_run_shows_all_stages(tmp_path, capsys):
    """Commands that can be given, and as comments those that wait for results."""
    grid = {RATE: [0.1, 0.2]}
    asked = {"grid": grid, "tuning_seeds": [1, 2], "seeds": [3, 4], "extend": True}
    command.print_plan(sweep_file(tmp_path, **asked))
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("trainit train ") for line in lines] == [True] * 4 + [False] * 3
    for line, seed in zip(lines[4:6], (3, 4), strict=True):
        assert line.startswith("# then: trainit train ")
        assert f"{RATE}=BEST --config.seed={seed} " in line
    assert lines[6].startswith("# then: further rates")
    for job in (sweep := sweep_file(tmp_path, **asked | {"extend": False})).wanted(lambda job: None):
        write(job.folder, [5.0, 3.0 + dict(job.changes)[RATE]])
        starting.prepare(job)
    command.print_plan(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"rate=(\S+) --config.seed=(\d)", line) for line in lines] == [
        [("0.1", "3")],
        [("0.1", "4")],
    ]


def test_dry_run_of_a_greedy_search(tmp_path, capsys):
    sweep, started, run = segments(
        tmp_path, lambda steps, rate: 3 + rate, boundaries=[0, 10, 20, 30], first=[0.1, 0.2]
    )
    command.print_plan(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"values=\S+ (\S+)\)'", line) for line in lines[:2]] == [["0.1"], ["0.2"]]
    later = [f"# then: steps {at} to {at + 10}, from the best at {at}" for at in (10, 20)]
    assert lines[2:] == later
    run(greedy.plan(sweep)[0])
    todo, after = greedy.plan(sweep)
    assert [dict(job.changes)["rate"] for job in todo] == [0.0, 0.025, 0.05, 0.1, 0.2, 0.4]
    assert after == ["steps 20 to 30, from the best at 20"]
    assert len(list((tmp_path / "out").rglob("checkpoints"))) == 2  # a plan deletes nothing
    greedy.search(sweep, run)
    assert greedy.plan(sweep) == ([], [])
    assert len(started) == len(set(started))


@pytest.mark.parametrize(("name", "script"), [("sbatch", "launch/slurm.sh"), ("qsub", "launch/sge.sh")])
def test_array_jobs_carry_each_runs_arguments(real, name, script, monkeypatch):
    """What the scheduler is given, by one that only writes it down."""
    (real / name).write_text(f'#!/bin/sh\necho "$TRAINIT_ARRAY" "$@" > {real}/given\n')
    (real / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{real}:/usr/bin:/bin")
    monkeypatch.chdir(ROOT)
    command = ["sweep", f"{real}/sweep.py", f"--output={real}/out", f"--{name}=-l gpus=1"]
    assert main(command) == 1  # no run is done
    array = f"{real}/out/array"
    given = (real / "given").read_text().split()
    assert given[0] == array
    assert given[-3:] == ["-l", "gpus=1", script]
    assert {"--array=1-3", "--wait"} <= set(given) or {"1-3", f"TRAINIT_ARRAY={array}", "-sync"} <= set(given)
    (last,) = (real / "out/b/batch_size=8/seed_1/arguments.txt").parent.parent.glob("seed_1")
    assert f"--workdir={last}" in (real / "out/array/3").read_text()


@pytest.mark.parametrize("size", ["small", "medium", "full"])
def test_benchmark_of_optimizers_names_what_there_is(size):
    """Its optimizers, and the fields that it sets."""
    sweep = spec.read(f"{ROOT}/configs/bench_optimizers.py:{size}", None)
    for variant in sweep.variants:
        file, _, groups = variant.config.partition(":")
        config = flatten(runpy.run_path(str(ROOT / file))["get_config"](groups))
        assert {*variant.fields, *variant.grid} <= set(config)
        assert RATE in variant.grid


def test_values_of_numpy_name_folders_as_others_do(tmp_path):
    rates = np.logspace(-4, -3, 3)
    (tmp_path / "sweep.py").write_text(
        f"import numpy as np\ndef get_sweep(arg):\n    rates = np.logspace(-4, -3, 3)\n"
        f"    return {{'config': 'configs/debug.py', 'grid': {{{RATE!r}: list(rates)}}}}\n"
    )
    jobs = spec.read(f"{tmp_path}/sweep.py", tmp_path / "out").wanted(lambda job: None)
    names = [f"learning_rate={rate}" for rate in ("0.0001", repr(float(rates[1])), "0.001")]
    assert [job.folder.parent.name for job in jobs] == names


def test_a_value_of_two_lines_is_the_same_run_again(tmp_path):
    (job,) = sweep_file(tmp_path, grid={"wandb.name": ["two\nlines"]}).wanted(lambda job: None)
    starting.prepare(job)
    assert starting.loss(job) is None  # not other settings


def test_all_values_are_checked_before_anything_runs(tmp_path, capsys):
    asked = {"config": "configs/debug.py", "grid": {"steps": [3, -3]}}
    (tmp_path / "sweep.py").write_text(f"def get_sweep(arg):\n    return {asked!r}\n")
    assert main(["sweep", f"{tmp_path}/sweep.py", f"--output={tmp_path}/out"]) == 2
    assert "steps=-3 must lie in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
