"""Checkpoints: other meshes, other models, unfinished saves, full disks, what a resume may change."""

import ctypes
import functools
import gc
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from processes import ROOT, TWO, exact, metrics, run, run_imported
from test_config import make

from trainit.checkpoints.store import CheckpointStore, due
from trainit.config import FREE, ConfigError, resolve
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.parallel.trees import path_name
from trainit.train import step
from trainit.train.resume import Resume, differences

EIGHT = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


def build(sizes=EIGHT, arg="", **changes) -> step.CompiledSteps:
    return built(tuple(sizes.items()), arg, tuple(changes.items()))


@functools.cache
def built(sizes: tuple, arg: str, changes: tuple) -> step.CompiledSteps:
    sizes, changes = dict(sizes), dict(changes)
    config = tiny.get_config(arg)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    config = resolve(config, 257)
    return step.build(config, shape_on(config, make_mesh(sizes, devices)))


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with checkpoints 1, 2, 3 and the state after them."""
    folder = tmp_path_factory.mktemp("run")
    state = build().init()
    checkpoints = CheckpointStore(folder)
    for number in (1, 2, 3):
        checkpoints.save(number, state, {"rows": 7 * number, "config": {"a": (1, 2)}})
    checkpoints.wait()
    checkpoints.close()
    return folder, state


def test_a_save_is_of_the_state_as_it_was_when_training_goes_on(tmp_path):
    """Steps that take over the state's memory while it is being written do not reach the checkpoint."""
    size = {"model__dim": 256, "model__vocab_size": 8192}  # 70 MB: longer to write than steps take
    steps = build(**size, model__context_length=4, model__attn_dropout=0.0)
    mesh = steps.abstract_state.step.sharding.mesh
    batch = {"tokens": np.ones((2, 8, 5), np.uint16), "lengths": np.full((2, 8), 4, np.int32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, _ = steps.train(steps.init(), batch)
    state, _ = steps.train(state, batch)
    before = jax.tree.map(np.array, state)
    checkpoints = CheckpointStore(tmp_path)
    checkpoints.save(2, state, {})
    for _ in range(5):
        state, _ = steps.train(state, batch)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore(2, steps.abstract_state), before)
    assert int(state.step) == 7
    assert not np.array_equal(state.params["head"]["kernel"], before.params["head"]["kernel"])
    checkpoints.close()


@pytest.mark.evidence("a checkpoint is restored bit for bit onto any mesh")
@pytest.mark.parametrize("sizes", [EIGHT, {**EIGHT, "data": 1}, {**EIGHT, "data": 1, "fsdp": 8, "tensor": 1}])
def test_restores_bit_exact_onto_any_mesh(saved, sizes):
    folder, state = saved
    steps = build(sizes)
    checkpoints = CheckpointStore(folder, read_only=True)
    restored = checkpoints.restore(2, steps.abstract_state)
    assert_equal(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(steps.abstract_state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert checkpoints.meta(2) == {"rows": 14, "config": {"a": [1, 2]}}
    assert checkpoints.steps() == [1, 2, 3]


def test_parameters_alone_whatever_the_optimizer(saved):
    folder, state = saved
    steps = build(arg="optimizer=sgdm")
    params = CheckpointStore(folder, read_only=True).restore_params(3, steps.abstract_state.params)
    assert_equal(params, state.params)
    leaf = params["head"]["kernel"]
    assert leaf.sharding.is_equivalent_to(steps.abstract_state.params["head"]["kernel"].sharding, 2)


@pytest.mark.parametrize(
    ("arg", "changes", "message"),
    [
        ("", {"model__dim": 64}, r"key/bias is float32\[2,4,8\] there and float32\[2,4,16\] here"),
        ("", {"model__tied_embeddings": True}, r"head/kernel is float32\[32,384\] there and missing here"),
        ("", {"model__qk_norm": True}, r"key_norm/scale is missing there and float32\[2,8\] here"),
        ("optimizer=sgdm", {}, "opt_state/.*overwrite_optimizer=True"),
    ],
)
def test_another_model_is_refused_by_name_and_shapes(saved, arg, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        CheckpointStore(saved[0], read_only=True).restore(1, build(arg=arg, **changes).abstract_state)
    assert "\n" not in str(error.value)


def test_a_new_optimizer_begins_at_the_parameters_that_were_loaded(saved):
    """DoG measures distances from where it began; at random parameters it would be far away."""
    steps = build(arg="optimizer=optax.contrib.dog")
    store = CheckpointStore(saved[0], read_only=True)
    state = steps.begin(store.restore_params(2, steps.abstract_state.params))
    assert_equal(state.params, saved[1].params)
    paths = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(state.opt_state)]
    begun = {path.partition("init_params/")[2]: leaf for path, leaf in paths if "init_params/" in path}
    assert len(begun) == len(jax.tree.leaves(state.params))
    for path, leaf in jax.tree.leaves_with_path(state.params):
        np.testing.assert_array_equal(begun[path_name(path)], leaf)


def test_an_unfinished_save_is_passed_over_and_can_be_done_again(saved, tmp_path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "run"))
    complete = folder / "checkpoints" / "3"
    complete.rename(folder / "checkpoints" / "3.orbax-checkpoint-tmp")  # as a kill leaves it
    (folder / "checkpoints" / "3.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    checkpoints = CheckpointStore(folder)
    assert checkpoints.steps()[-1] == 2
    assert_equal(checkpoints.restore(2, build().abstract_state), saved[1])
    checkpoints.save(3, saved[1], {"rows": 1})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    assert not list((folder / "checkpoints").glob("*tmp*"))
    checkpoints.close()


def test_keep_removes_the_oldest(saved, tmp_path):
    checkpoints = CheckpointStore(tmp_path, keep=2)
    for number in (1, 5, 9):
        checkpoints.save(number, saved[1], {})
    checkpoints.wait()
    checkpoints.close()
    assert CheckpointStore(tmp_path, read_only=True).steps() == [5, 9]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(folder), 2)


@pytest.mark.evidence(
    "a disk that fills up during a save: non-zero exit, and the checkpoint before is complete"
)
def test_a_full_disk_is_an_error_and_the_checkpoint_before_is_whole(small_disk, random_dataset, tmp_path):
    """The disk fills up while the second checkpoint is written; the run continues once there is room."""
    command = [
        f"--config={ROOT}/tests/tiny.py:schedule=constant",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={small_disk}/run",
        *TWO,
        "--config.model.dim=128",  # 0.7 M parameters: 8.5 MB a checkpoint
        "--config.schedule.warmup=2",  # one program, to whichever step
        "--config.steps=12",
        "--config.checkpoint.save_steps=6",
    ]
    run_imported(*command, "--config.steps=6")
    before = exact(metrics(small_disk / "run"))
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 3_000_000))
    more = "--config.checkpoint.overwrite_config=True"
    (tmp_path / "sitecustomize.py").write_text(
        "from trainit.checkpoints import retry\nretry.RETRY_SECONDS = (1, 1)\n"
    )
    output = run(*command, more, expect=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "No space left on device" in output
    assert "a checkpoint could not be saved in 3 attempts" in output
    assert "trainit: error:" in output
    checkpoints = CheckpointStore(small_disk / "run", read_only=True)
    assert checkpoints.steps()[-1] == 6
    steps = build(model__dim=128)
    assert int(checkpoints.restore(6, steps.abstract_state).step) == 6
    (small_disk / "ballast").unlink()
    run_imported(*command, more)
    assert exact(metrics(small_disk / "run"))[: len(before)] == before
    assert [r["step"] for r in metrics(small_disk / "run")] == list(range(13))


def test_a_lost_process_is_no_damage(tmp_path):
    store = CheckpointStore(tmp_path)
    store.compared.damage = lambda step: ""
    lost = "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:4523"
    with pytest.raises(ValueError, match="Connection closed by peer") as error, store.reading(3):
        raise ValueError(lost)
    assert not isinstance(error.value, ConfigError)
    with pytest.raises(ConfigError, match="checkpoints/3 is damaged"), store.reading(3):
        raise ValueError("not what was expected")


def test_due():
    assert [n for n in range(1, 10) if due(3, n)] == [3, 6, 9]
    assert [n for n in range(1, 10) if due((2, 7), n)] == [2, 7]
    assert not any(due(0, n) for n in range(10))


def test_importing_the_checkpoints_of_nowhere():
    assert CheckpointStore(Path("/nowhere"), read_only=True).steps() == []


def test_rates_after_a_config_that_lacks_fields(caplog):
    """As an earlier version wrote it; the rate is a line from its peak in step 1 to 0 after the last step."""
    before, config = (tiny.get_config("schedule=linear") for _ in range(2))
    config.steps = 80
    for one in (before, config):
        one.schedule.update(warmup=0, constant=0)
    meta = resolve(before, 257).to_dict()
    del meta["schedule"]["rewarm"], meta["schedule"]["rewarm_at"], meta["batch_schedule"]
    with caplog.at_level("INFO"):
        Resume._compare_rates(SimpleNamespace(config=resolve(config, 257)), meta, 40)
    assert "rate       0.00025 in step 40, 0.005 in step 41" in caplog.text
    assert "--config.schedule.warmup=0 --config.schedule.rewarm_at=40" in caplog.text


def test_differences_survive_json():

    config = resolve(make(checkpoint__save_steps=(3, 5)), 50257)
    saved = json.loads(json.dumps(config.to_dict()))
    assert differences(saved, config.to_dict()) == {}
    changed = resolve(make("optimizer=sgdm", steps=7, schedule__warmup=1), 50257)
    found = differences(saved, changed.to_dict())
    assert found["steps"] == (50_000, 7)
    assert found["optimizer.beta1"] == (0.9, None)
    assert found["optimizer.momentum"] == (None, 0.9)
    assert "model.dim" not in found


@pytest.mark.parametrize(
    ("field", "free"),
    [
        ("mesh.data", True),
        ("device_batch_size", True),
        ("dataset.path", True),  # the dataset's fingerprint decides
        ("dataset.validation_path", True),
        ("dataset.tokenizer", True),
        ("dataset.workers", True),
        ("model.remat", True),
        ("model.scan_layers", True),
        ("logits_mib", True),
        ("checkpoint.keep", True),
        ("eval.every_steps", True),
        ("model.dim", False),
        ("steps", False),
        ("batch_size", False),
        ("seed", False),
        ("optimizer.learning_rate", False),
        ("schedule.warmup", False),
        ("precision", False),
    ],
)
def test_what_a_resume_may_change(field, free):
    assert bool(FREE.match(field)) == free


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves
@pytest.mark.parametrize("of", ["meta/metadata", "state/_METADATA", "state/ocdbt.process_0/d/*"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, zero])
def test_a_damaged_checkpoint_is_named(damage, of, saved, tmp_path):
    """Whatever is wrong with its files, also where it has no digests, as those of earlier versions."""
    shutil.copytree(saved[0] / "checkpoints/3", tmp_path / "checkpoints/3")
    (tmp_path / "checkpoints/3/digests.json").unlink()
    (tmp_path / "checkpoints/3/_CHECKPOINT_METADATA").unlink()
    files = (tmp_path / "checkpoints/3").glob(of)
    damage(max(files, key=lambda path: path.stat().st_size))
    checkpoints = CheckpointStore(tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoints/3 is damaged or not Trainit's \(remove it") as error:
        checkpoints.meta(3)
        checkpoints.restore(3, build().abstract_state)
    assert "\n" not in str(error.value)
    checkpoints.close()
    del error
    gc.collect()
