"""Steps done again: equal, edited in the log, on another mesh, of streamed data, by several processes."""

import json
import re
import shutil

import pytest
from processes import FAST, ROOT, end, launch, run_imported
from scipy import stats

from trainit.__main__ import main as trainit_command
from trainit.cluster import devices
from trainit.tools.replay import again

OTHER = "--config.mesh.data=4", "--config.mesh.tensor=1"


@pytest.fixture(scope="module")
def whole(random_dataset, tmp_path_factory):
    """A run of nine steps on the devices of this process, with the settings of XLA that it has."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    arguments = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}"
    more = "--config.steps=9", "--config.eval.every_steps=0", "--config.model.attn_dropout=0"
    run_imported(*arguments, *more, f"--workdir={folder}", XLA_FLAGS=FAST, TRAINIT_SETTINGS="off")
    return folder


@pytest.fixture
def replay(monkeypatch, capsys, keep_compiled, tmp_path_factory):
    """A function that runs the command on this process's devices: its exit code, output and errors."""
    monkeypatch.setattr(devices, "configure", lambda *_: None)  # JAX runs already
    keep_compiled(tmp_path_factory.getbasetemp() / "compiled-replay")

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        return trainit_command(["replay", *map(str, arguments)]), *capsys.readouterr()

    return call


def edited(run, folder, step: int, metric: str, factor: float):
    """A copy of a run, with one number of its log multiplied."""
    copy = shutil.copytree(run, folder)
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] == step:
            record[metric] *= factor
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return copy


def contents(folder) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.evidence("`trainit replay`: steps of a run are done again, bit for bit as its log has them")
def test_the_same_devices_give_the_same_bits(replay, whole, tmp_path):
    """And one changed bit of the log is found. Nothing in the run's folder is touched."""
    before = contents(whole)
    code, output, _ = replay(whole, "--step=3", "--steps=4")
    assert code == 0, output
    assert f"{whole} steps 4 to 7: 4 logged steps are as logged, bit for bit; on 8 × cpu" in output
    assert contents(whole) == before
    copy = edited(whole, tmp_path / "copy", 5, "train/grad_norm", 1 + 2**-52)
    code, output, _ = replay(copy, "--step=3")
    assert code == 1
    assert "steps 4 to 9: step 5 is the first that differs: train/grad_norm is " in output
    code, output, _ = replay(copy)  # from the newest checkpoint with steps after it
    assert code == 0, output
    assert f"{copy} steps 7 to 9: 3 logged steps are as logged, bit for bit" in output


@pytest.mark.evidence("`trainit replay` on another mesh: within what rounding does to this very run")
def test_another_mesh_gives_the_same_within_rounding(replay, whole, tmp_path):
    """The bound is small: a thousandth more in the log is found."""
    code, output, _ = replay(whole, "--step=3", "--steps=3", *OTHER)
    assert code == 0, output
    found = re.search(r"3 logged steps are as logged, within rounding, ± ([\d.e-]+) in the last loss", output)
    assert 1e-7 < float(found[1]) < 1e-3
    assert "mesh data 4 × fsdp 2 × tensor 1 × context 1" in output
    assert re.search(r"; logged on 8 × cpu .* mesh data 2 × fsdp 2 × tensor 2 × context 1", output)
    copy = edited(whole, tmp_path / "copy", 6, "train/loss", 1.001)
    code, output, _ = replay(copy, "--step=3", "--steps=3", *OTHER)
    assert code == 1
    assert re.search(r"step 6 is the first that differs: train/loss is .* in the log, .* more than ±", output)


def test_streamed_data_and_batches_of_two_sizes(replay, tmp_path):
    """From the run's beginning, since it has no checkpoint in between."""
    lines = [json.dumps({"text": f"{n} bottles of beer on the wall, " * 9}) + "\n" for n in range(200)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "streamed.py").write_text(
        "import runpy\n"
        "from trainit.config import jsonl\n"
        "def get_config(arg):\n"
        f"    config = runpy.run_path('{ROOT}/tests/tiny.py')['get_config'](arg)\n"
        f"    config.dataset = jsonl('{tmp_path}/train.jsonl', '{tmp_path}/validation.jsonl')\n"
        "    config.dataset.update(tokenizer='bytes', streams=16)\n"
        "    config.update(steps=4, batch_schedule='50%: 32')\n"
        "    config.checkpoint.save_steps = 0\n"
        "    config.mesh.update(data=8, fsdp=1, tensor=1)\n"
        "    config.model.update(num_blocks=1, attn_dropout=0.0)\n"
        "    return config\n"
    )
    run = tmp_path / "run"
    environment = {"XLA_FLAGS": FAST, "TRAINIT_SETTINGS": "off"}
    run_imported(f"--config={tmp_path}/streamed.py", f"--workdir={run}", **environment)
    code, output, _ = replay(run, "--step=0")
    assert code == 0, output
    assert "steps 1 to 4: 4 logged steps are as logged, bit for bit" in output


def test_two_processes(random_dataset, tmp_path):
    """The run and its replay have the same launcher, devices and mesh."""
    folder, mesh = tmp_path / "run", ("--config.mesh.data=1", "--config.mesh.tensor=1")
    arguments = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}", *mesh
    arguments += "--config.cpu_devices=1", "--config.steps=4", "--config.eval.every_steps=0"
    end(launch(2, *arguments, f"--workdir={folder}", XLA_FLAGS=FAST), 0)
    output = end(launch(2, folder, "--step=3", XLA_FLAGS=FAST, TRAINIT_COMMAND="replay"), 0)
    assert output.count("1 logged steps are as logged, bit for bit; on 2 × cpu") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step=5",), "has no checkpoint of step 5; there are [0, 3, 6, 9], where 0 is how it began"),
        (("--step=9",), "metrics.jsonl has no step from 10 to 19"),
        (("--config.seed=1",), "--config.seed would make another run of it"),
        (("--config.mesh.data=3",), "mesh=(data 3, fsdp 2, tensor 2, context 1) covers 12 devices"),
    ],
)
def test_usage(replay, whole, arguments, message):
    code, output, errors = replay(whole, *arguments)
    assert (code, output) == (2, "")
    assert message in errors


def test_the_quantile_is_that_of_students_distribution():
    """Of the root of DRAWS squares as the estimate of a standard deviation; both sides, 1 in 10,000."""
    assert pytest.approx(stats.t.ppf(1 - 0.5e-4, again.DRAWS), rel=0.01) == again.QUANTILE
    draws = [{1: {"train/loss": 2.0 + moved}} for moved in (3e-6, -4e-6, 0.0, 0.0)]
    bounds = again.rounding({1: {"train/loss": 2.0, "train/accuracy": 0.5}}, draws, 1e-6)
    assert bounds == {1: {"train/loss": pytest.approx(15.5 * 2.5e-6 + 2e-6)}}
