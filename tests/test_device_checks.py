"""Devices that keep or compute wrong numbers are found and named; others raise no alarm."""

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from processes import FAST, ROOT, end, launch

from trainit.cluster import device_checks
from trainit.cluster.device_checks import DeviceCheck
from trainit.config import MESH_AXES, resolve
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step

QUIET = SimpleNamespace(long_task=contextlib.nullcontext), SimpleNamespace(wait=lambda: None)


def begin(*sizes: int):
    """The check of a run on a mesh of these sizes, its first state, and a batch."""
    config = tiny.get_config()
    config.model.update(num_blocks=1, attn_dropout=0.1)
    config = resolve(config, 257)
    shape = shape_on(config, make_mesh(dict(zip(MESH_AXES, sizes, strict=True))))
    steps, (parts, rows, length) = step.build(config, shape), shape.batch_at(0)
    ids = np.random.default_rng(0).integers(0, 257, (parts, rows, length + 1)).astype(np.uint16)
    batch = {"tokens": ids, "lengths": np.full((parts, rows), length, np.int32)}
    batch = jax.device_put(batch, batch_sharding(shape.device_mesh))
    return DeviceCheck(2, steps, *QUIET), steps.init(), batch


def flipped(array: jax.Array, device: int, bit: int) -> jax.Array:
    """The same array, with one bit of one number on one device changed."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part.view(np.uint32).flat[part.size // 2] ^= np.uint32(1 << bit)
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def with_kernel(state, change):
    """The state with another kernel of the MLP."""
    params = jax.tree.map(lambda x: x, state.params)
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    params["blocks"]["mlp"]["up"]["kernel"] = change(kernel)
    return dataclasses.replace(state, params=params)


@pytest.mark.evidence(
    "`check.every_steps`: one bit of one device's parameters is found, and names the device"
)
def test_a_flipped_bit_is_found_on_the_device_that_has_it():
    """The highest and the lowest bit. The odd one of four replicas is named, and no other."""
    check, state, batch = begin(4, 2, 1, 1)
    check(2, state, batch)
    for device, bit in ((5, 0), (0, 31), (7, 12)):
        bad = with_kernel(state, lambda kernel, d=device, b=bit: flipped(kernel, d, b))
        named = f"after step 2, device {device} (cpu) of process 0 have another state than their replicas: "
        with pytest.raises(device_checks.DamageError, match=re.escape(named)):
            check(2, bad, batch)
        with pytest.raises(device_checks.DamageError):
            check.replicas(3, bad)  # as before each save
        check(3, bad, batch)  # nothing is due
    # An optimizer's state, too.
    moments = jax.tree.leaves(state.opt_state)
    at = max(range(len(moments)), key=lambda index: moments[index].size)
    moments[at] = flipped(moments[at], 3, 7)
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), moments)
    with pytest.raises(device_checks.DamageError, match=r"device 3 \(cpu\)"):
        check.replicas(2, dataclasses.replace(state, opt_state=opt_state))


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 1, 2, 2), (1, 8, 1, 1)], ids=str)
def test_no_false_alarm(sizes):
    """Also after steps, in which replicas are updated; and a gradient that differs is found."""
    check, state, batch = begin(*sizes)
    for done in (1, 2):
        state, _ = check.steps.train(state, batch)
        check(done, state, batch)
    hashes = check.steps.hashes["gradient"]
    other = iter([hashes(state.params, batch, state.step), hashes(state.params, batch, state.step + 1)])
    check.steps = SimpleNamespace(hashes=check.steps.hashes | {"gradient": lambda *_: next(other)})
    with pytest.raises(device_checks.DamageError, match="compute another gradient when they do it again"):
        check(2, state, batch)


def test_a_hash_by_numpy(monkeypatch):
    """Also where chunks do not divide an array, and of types of all sizes."""
    monkeypatch.setattr(device_checks, "CHUNK", 10)
    draw = np.random.default_rng(0)
    for dtype in (np.float32, np.int32, np.uint16, np.int8, bool):
        for size in (1, 10, 37):
            array = draw.integers(-9, 9, size).astype(dtype)
            unsigned = array.view(f"u{array.dtype.itemsize}").astype(np.uint64)
            expected = (unsigned * (2 * np.arange(size, dtype=np.uint64) + 1)).sum() % 2**32
            assert int(device_checks._hash(jax.numpy.asarray(array))) == expected


def test_who_is_odd():
    """A majority is right; without one, all are named. Along the axes that replicate alone."""
    found = np.array([[1, 5], [1, 6], [2, 5]])
    assert device_checks.odd_ones(found, [0]).tolist() == [[False, False], [False, True], [True, False]]
    assert device_checks.odd_ones(found[1:], [0]).tolist() == [[True, True], [True, True]]
    assert not device_checks.odd_ones(found[:1], [0]).any()
    assert device_checks.odd_ones(found[:1].T[None], [1]).tolist() == [[[True], [True]]]


def test_a_job_of_two_processes_ends_with_70_and_saves_nothing(random_dataset, tmp_path):
    """A bit on process 1 flips after step 4; the save that is due after step 6 is not begun."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('TRAINIT_PROCESS_ID'):\n"
        f"    sys.path.insert(0, '{ROOT}/tests')\n"
        "    from trainit.train import loop\n"
        "    train = loop.Job.train\n"
        "    def damaged(self, step, state, batch):\n"
        "        if step == 4:\n"
        "            import test_device_checks as t\n"
        "            bad = t.jax.local_devices()[0].id if t.jax.process_index() == 1 else -1\n"
        "            state = t.with_kernel(state, lambda kernel: t.flipped(kernel, bad, 3))\n"
        "        return train(self, step, state, batch)\n"
        "    loop.Job.train = damaged\n"
    )
    arguments = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}"
    mesh = "--config.cpu_devices=1", "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"
    more = "--config.check.every_steps=5", "--config.steps=9", "--config.eval.every_steps=0"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "XLA_FLAGS": FAST}
    run = tmp_path / "run"
    output = end(launch(2, *arguments, *mesh, *more, f"--workdir={run}", **environment), 70)
    assert "trainit: error: after step 5, device 0 (cpu) of process 0, device " in output
    assert "(cpu) of process 1 have another state than their replicas" in output
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"3"}
