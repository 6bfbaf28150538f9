"""float16 and its loss scale: the same run as in float32, overflows that are skipped, checkpoints."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from trainit import config as config_lib
from trainit.checkpoints.store import CheckpointStore
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step
from trainit.train.skipped import loss_scale

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
MESH = make_mesh(SIZES)


@functools.cache
def build(precision="float16", arg="", **changes):
    config = tiny.get_config(arg)
    config.precision = precision
    config.model.update(attn_dropout=0.0, num_blocks=1)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    config = config_lib.resolve(config, 257)
    return step.build(config, shape_on(config, MESH))


def batches(count: int) -> list[dict]:
    """Of two micro-steps, some rows of which end early."""
    rng = np.random.default_rng(3)
    layout = batch_sharding(MESH)
    return [
        jax.device_put(
            {
                "tokens": rng.integers(0, 8, (2, 8, 33)).astype(np.uint16) ** 2,
                "lengths": rng.choice([32, 32, 17], (2, 8)).astype(np.int32),
            },
            layout,
        )
        for _ in range(count)
    ]


def train(steps, state, data):
    trail = []
    for batch in data:
        state, metrics = steps.train(state, batch)
        trail.append(jax.device_get(metrics))
    return state, trail


def with_scale(state, scale, good_steps=0):
    layout = state.loss_scale["scale"].sharding
    values = {"scale": np.float32(scale), "good_steps": np.int32(good_steps)}
    return replace(state, loss_scale=jax.device_put(values, layout))


@pytest.mark.evidence(
    "float16 against float32, through accumulation on 8 devices and with gradients of the optimizer's own"
)
@pytest.mark.parametrize(
    "arg, changes",
    [
        ("optimizer=sam+adamw,diagnostics=full", {"diagnostics__noise_scale": True, "z_loss": 0.01}),
        ("optimizer=sophia", {"optimizer__estimator": "gnb"}),
        ("optimizer=sophia", {"optimizer__estimator": "hutchinson"}),
    ],
    ids=["sam and diagnostics", "sophia gnb", "sophia hutchinson"],
)
def test_a_run_is_that_in_float32(arg, changes):
    """Losses, norms and every statistic, through two micro-steps on 8 devices; the scale stays."""
    data = batches(6)
    wide, narrow = build("float32", arg, **changes), build("float16", arg, **changes)
    _, expected = train(wide, wide.init(), data)
    state, found = train(narrow, with_scale(narrow.init(), 2.0**4), data)
    assert expected[-1]["train/loss"] < expected[0]["train/loss"] - 0.05
    for there, here in zip(expected, found, strict=True):
        assert here["train/loss_scale"] == 2.0**4 and "train/loss_scale" not in there
        assert here["train/skipped"] == 0
        for name in ("train/loss", "train/grad_norm"):
            np.testing.assert_allclose(here[name], there[name], rtol=5e-3)
        for name in ("grads/l2", "noise/gradient_square") if there["diagnostics"] else ():
            np.testing.assert_allclose(here["diagnostics"][name], there["diagnostics"][name], rtol=0.02)
    assert int(state.loss_scale["good_steps"]) == len(data)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_the_gradient_does_not_depend_on_the_scale():
    """Powers of two change nothing, as long as nothing is too large or too small for float16."""
    steps, (batch,) = build(), batches(1)

    def norm(scale):
        return float(steps.train(with_scale(steps.init(), scale), batch)[1]["train/grad_norm"])

    np.testing.assert_allclose(norm(2.0**8), norm(2.0**12), rtol=1e-6)
    assert abs(norm(2.0**-8) / norm(2.0**12) - 1) > 1e-5


@pytest.mark.evidence("a loss scale that is too large is found without ending the run")
def test_a_scale_that_is_too_large_is_found_without_ending_the_run():
    """Halved in each step that overflows, which changes nothing else and is no step on the way to the end."""
    steps, data = build(), batches(30)
    state = with_scale(steps.init(), 2.0**30, good_steps=5)
    before = jax.device_get((state.params, state.opt_state))
    scale, overflows = 2.0**30, 0
    for batch in data:
        state, metrics = steps.train(state, batch)
        assert metrics["train/loss_scale"] == scale and np.isfinite(metrics["train/loss"])
        if int(state.skipped) == overflows:
            break
        scale, overflows = scale / 2, overflows + 1
        assert int(metrics["skipped_in_a_row"]) == 0
        assert float(state.loss_scale["scale"]) == scale and int(state.loss_scale["good_steps"]) == 0
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    assert 3 <= overflows < 25
    assert float(state.loss_scale["scale"]) == scale and int(state.loss_scale["good_steps"]) == 1
    assert not np.array_equal(state.params["head"]["kernel"], before[0]["head"]["kernel"])


def test_at_the_floor_steps_that_are_not_finite_count_in_a_row():
    steps, (batch,) = build(), batches(1)
    state = with_scale(steps.init(), 2 * loss_scale.FLOOR)
    broken = state.params["final_norm"]["scale"].at[3].set(jnp.nan)
    for number, in_a_row in enumerate((0, 1, 2), 1):
        params = state.params | {"final_norm": state.params["final_norm"] | {"scale": jnp.array(broken)}}
        state, metrics = steps.train(replace(state, params=params), batch)
        assert float(state.loss_scale["scale"]) == loss_scale.FLOOR
        assert (int(metrics["train/skipped"]), int(metrics["skipped_in_a_row"])) == (number, in_a_row)
    good = steps.init().params["final_norm"]["scale"]
    params = state.params | {"final_norm": state.params["final_norm"] | {"scale": good}}
    _, metrics = steps.train(replace(state, params=params), batch)
    assert (int(metrics["train/skipped"]), int(metrics["skipped_in_a_row"])) == (3, 0)


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_an_overflow_that_hides_in_the_optimizers_state_is_one(estimator):
    """Sophia divides by what it estimates from a gradient of its own: by infinity, unless that is seen."""
    old = {"h": jnp.array([1.0, jnp.inf]), "count": jnp.int32(3)}
    assert loss_scale.stays_finite({"h": jnp.array([2.0, jnp.inf]), "count": jnp.int32(4)}, old)
    assert not loss_scale.stays_finite({"h": jnp.array([jnp.inf, jnp.inf]), "count": jnp.int32(4)}, old)
    steps, (batch,) = build("float16", "optimizer=sophia", optimizer__estimator=estimator), batches(1)
    state, metrics = steps.train(with_scale(steps.init(), 2.0**40), batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.opt_state)))
    assert int(metrics["train/skipped"]) == 1


def test_many_good_steps_double_it_up_to_its_ceiling():
    good, bad = jnp.bool(True), jnp.bool(False)
    state = loss_scale.init(True)
    for _ in range(loss_scale.GROWTH_STEPS - 1):
        state = {"scale": state["scale"], "good_steps": state["good_steps"] + 1}
    assert loss_scale.after(state, bad)[0] == {"scale": loss_scale.START / 2, "good_steps": 0}
    assert loss_scale.after(state, good)[0] == {"scale": loss_scale.START * 2, "good_steps": 0}
    state |= {"scale": jnp.float32(loss_scale.CEILING)}
    assert loss_scale.after(state, good)[0] == {"scale": loss_scale.CEILING, "good_steps": 0}


def test_checkpoints_hold_it_and_those_of_other_precisions_do_not(tmp_path):
    """Bit for bit; from bfloat16's, which have none and are as they were, it begins."""
    narrow, plain, data = build(), build("bfloat16"), batches(3)
    checkpoints = CheckpointStore(tmp_path)
    state, _ = train(narrow, with_scale(narrow.init(), 2.0**9, good_steps=77), data[:2])
    other, _ = train(plain, plain.init(), data[:1])
    for number, saved in ((2, state), (3, other)):
        checkpoints.save(number, saved, {})
    checkpoints.wait()
    names = {path.name for path in (tmp_path / "checkpoints" / "3").iterdir() if path.is_dir()}
    assert "state" in names and "loss_scale" not in names
    restored = checkpoints.restore(2, narrow.abstract_state)
    assert jax.device_get(restored.loss_scale) == {"scale": 2.0**9, "good_steps": 79}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *(train(narrow, s, data[2:])[1] for s in (state, restored)))
    assert checkpoints.restore(2, plain.abstract_state).loss_scale == {}
    assert checkpoints.restore(3, narrow.abstract_state).loss_scale == {}
    begun = narrow.begin_separate["loss_scale"](restored.params)
    assert jax.device_get(begun) == {"scale": loss_scale.START, "good_steps": 0}
    checkpoints.close()


def test_gelu_of_large_float16_inputs_has_a_slope():
    """Hidden units of 300: the tanh form cubes them."""
    config = tiny.get_config()
    config.model.update(attn_dropout=0.0, num_blocks=1)
    model = GPT(config_lib.resolve(config, 257).model, "float16")
    params = model.init(jax.random.key(0))
    params["blocks"]["mlp"]["up"]["bias"] += 300.0
    gradient = jax.grad(lambda p: model(p, jnp.arange(16)[None]).mean())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
