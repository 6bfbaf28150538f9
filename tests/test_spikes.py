"""Loss spikes: which steps are left out, on all meshes, across a resume, and the lines about them."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny

from trainit import config as config_lib
from trainit.checkpoints.store import CheckpointStore
from trainit.parallel import cpu_workarounds
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step
from trainit.train.skipped import spikes
from trainit.train.skipped.lines import SkippedSteps

WINDOW, SPIKE, COUNT = 8, 24, 28  # step SPIKE + 1 of COUNT has a spike
WHOLE = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
ALONE = dict.fromkeys(WHOLE, 1)


def make_config(deviations=6.0, **changes):
    config = tiny.get_config()
    config.model.update(attn_dropout=0.0, num_blocks=1)
    config.spikes.update(skip_deviations=deviations, window=WINDOW)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config_lib.resolve(config, 257)


@functools.cache
def build(deviations=6.0, whole=True):
    config = make_config(deviations, device_batch_size=2 if whole else 8)
    mesh = make_mesh(WHOLE) if whole else make_mesh(ALONE, jax.devices()[:1])
    return step.build(config, shape_on(config, mesh)), batch_sharding(mesh)


def batches(layout) -> list[dict]:
    """Two words to be learnt; the batch of number SPIKE has other ones."""
    rng = np.random.default_rng(5)
    tokens = [rng.integers(0, 2, (2, 8, 33)).astype(np.uint16) for _ in range(COUNT)]
    tokens[SPIKE] = rng.integers(0, 256, (2, 8, 33)).astype(np.uint16)
    lengths = np.full((2, 8), 32, np.int32)
    return [jax.device_put({"tokens": t, "lengths": lengths}, layout) for t in tokens]


def train(steps, state, data):
    """The state after each step, and each step's metrics."""
    states, trail = [], []
    for batch in data:
        state, metrics = steps.train(state, batch)
        states.append(jax.device_get(state))
        trail.append(jax.device_get(metrics))
    return states, trail


@pytest.fixture(scope="module")
def whole():
    steps, layout = build()
    return train(steps, steps.init(), batches(layout))


def test_bounds_are_those_of_a_double_precision_oracle():
    """600 steps with spikes, a level that rises for good, and numbers that are not finite."""
    config = make_config(3.0, spikes__window=16).spikes
    rng = np.random.default_rng(0)
    values = rng.normal([5.0, 2.0], [0.1, 0.3], (600, 2))
    values[300:, 0] += 1.0  # ten deviations, and it stays
    values[rng.choice(600, 20), rng.integers(0, 2, 20)] *= 3
    values[[50, 200], [0, 1]] = np.inf, np.nan
    judge = jax.jit(functools.partial(spikes.judge, config))
    state, window, skipped = spikes.init(config), [], 0
    for loss, norm in values.astype(np.float32):
        finite = bool(np.isfinite(loss + norm))
        sums = {"loss": loss * np.float32(4), "count": np.float32(4)}
        good, state, metrics = judge(state, sums, norm, finite)
        bounds = np.array([np.inf, np.inf])
        if len(window) >= 16:
            newest = np.array(window[-16:], np.float64)
            bounds = newest.mean(0) + 3.0 * np.sqrt(((newest - newest.mean(0)) ** 2).mean(0))
        is_spike = finite and (loss > bounds[0] or norm > bounds[1])
        assert bool(good) == (finite and not is_spike)
        found = metrics["train/loss_bound"], metrics["train/grad_norm_bound"]
        np.testing.assert_allclose(found, bounds, rtol=1e-5)
        skipped += is_spike
        assert int(metrics["train/skipped_spikes"]) == skipped
        if finite:
            window.append(np.minimum([loss, norm], bounds))
    assert skipped >= 20
    assert good and loss > 5.5  # the higher level is accepted by now


@pytest.mark.evidence("a step whose loss spikes changes nothing, is counted and reported")
def test_a_spike_changes_nothing_but_counts(whole):
    states, trail = whole
    before, after = states[SPIKE - 1], states[SPIKE]
    assert trail[SPIKE]["train/loss"] > trail[SPIKE]["train/loss_bound"]
    assert np.isfinite(trail[SPIKE]["train/update_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert [int(m["train/skipped"]) for m in trail] == [0] * SPIKE + [1] * (COUNT - SPIKE)
    assert [int(m["train/skipped_spikes"]) for m in trail] == [0] * SPIKE + [1] * (COUNT - SPIKE)
    assert [int(m["skipped_in_a_row"]) for m in trail] == [int(n == SPIKE) for n in range(COUNT)]
    losses = np.array([m["train/loss"] for m in trail])
    bounds = [m["train/loss_bound"] for m in trail]
    assert np.isinf(bounds[:WINDOW]).all() and np.isfinite(bounds[WINDOW:]).all()
    # The spike has entered as its bound.
    entered = np.minimum(losses, bounds)[-WINDOW:]
    np.testing.assert_allclose(sorted(states[-1].spikes["newest"][0]), sorted(entered), rtol=1e-6)


@pytest.mark.evidence("loss spikes are the same steps on one device and on a mesh of eight")
def test_one_device_leaves_out_the_same_steps(whole):
    steps, layout = build(whole=False)
    _, trail = train(steps, steps.init(), batches(layout))
    for name in ("train/loss", "train/loss_bound", "train/grad_norm_bound", "train/skipped"):
        here, there = ([m[name] for m in t] for t in (trail, whole[1]))
        np.testing.assert_allclose(here, there, rtol=2e-3, err_msg=name)


@pytest.mark.evidence("a resume before a loss spike leaves it out as the undisturbed run does, bit for bit")
def test_a_resume_across_a_spike_is_exact(whole, tmp_path):
    steps, layout = build()
    plain, _ = build(0.0)
    data = batches(layout)
    state = steps.init()
    for batch in data[:SPIKE]:
        state, _ = steps.train(state, batch)
    checkpoints = CheckpointStore(tmp_path)
    checkpoints.save(SPIKE, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(SPIKE, steps.abstract_state)
    states, trail = train(steps, restored, data[SPIKE:])
    jax.tree.map(np.testing.assert_array_equal, states[-1], whole[0][-1])
    jax.tree.map(np.testing.assert_array_equal, trail, whole[1][SPIKE:])
    # With a run that leaves out none, checkpoints are exchanged in both directions.
    assert checkpoints.restore(SPIKE, plain.abstract_state).spikes == {}
    checkpoints.save(30, plain.init(), {})
    checkpoints.wait()
    assert not (tmp_path / "checkpoints/30/spikes").exists()
    restored = checkpoints.restore(30, steps.abstract_state)
    assert restored.spikes == {}
    begun = steps.begin_separate["spikes"](restored.params)
    assert jax.tree.map(np.shape, begun) == jax.tree.map(np.shape, steps.abstract_state.spikes)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(begun))
    checkpoints.close()


@pytest.mark.evidence("a run that leaves out no spikes has the program that it would have without them")
def test_programs_with_and_without(monkeypatch):
    def program(deviations):
        config = make_config(deviations)
        steps = step.build(config, shape_on(config, make_mesh(WHOLE)))
        batch = batches(build()[1])[0]
        return steps.train.lower(steps.abstract_state, batch).as_text()

    off = program(0.0)
    monkeypatch.setattr(cpu_workarounds, "on_cpu", lambda mesh: False)
    on = program(6.0)  # as for GPUs: no branch, and no value for which the host is asked
    assert "stablehlo.case" not in on and "callback" not in on
    monkeypatch.undo()
    monkeypatch.setattr(spikes, "init", lambda config: {})
    monkeypatch.setattr(spikes, "judge", lambda config, state, sums, norm, finite: (finite, {}, {}))
    assert off == program(6.0) != on


def record(step, skipped, loss=2.0, **more):
    values = {"loss": loss, "grad_norm": 1.0, "update_norm": 0.5, "skipped": skipped}
    return {"step": step} | {f"train/{name}": value for name, value in (values | more).items()}


def test_a_skipped_step_is_one_line(caplog):
    skips = SkippedSteps(make_config(), 3)
    bounds = {"loss_bound": 2.5, "grad_norm_bound": 1.25}
    skips.add(record(7, 3, **bounds), 0, False)
    assert not caplog.messages
    skips.add(record(8, 4, 9.5, **bounds), 1, False)
    skips.add(record(9, 5, math.nan, **bounds), 2, False)
    skips.add(record(10, 6, loss_scale=32768.0), 0, False)
    numbers = "gradient norm 1, update norm 0.5"
    assert caplog.messages == [
        f"skipped    step 8: loss 9.5, {numbers}: a spike, above loss 2.5 or gradient norm 1.25; no update "
        "(1 of 15 in a row)",
        f"skipped    step 9: loss nan, {numbers}: not finite; no update (2 of 15 in a row)",
        f"skipped    step 10: loss 2, {numbers}: not finite; no update (the loss scale is lowered)",
    ]


def test_many_skipped_steps_are_one_line_of_each_logged_interval(caplog):
    skips = SkippedSteps(make_config(log__every_steps=10), 0)
    for number in range(1, 26):
        skips.add(record(number, max(0, number - 5), math.inf), number - 5, now=number == 25)
    heads = [message.partition(": ")[0] for message in caplog.messages]
    assert heads == [f"skipped    {n} steps, the last is step {at}" for n, at in ((5, 10), (10, 20), (5, 25))]
