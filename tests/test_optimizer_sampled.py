"""Sophia-G: its formula, and through the train step the gradients whose targets the model draws."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from optimizer_cases import RATES, STEPS, build, by_path, draw, draw_gradients, flat, some_shapes

from trainit import config as config_lib
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step

LENGTHS = np.array([5, 0, 17] + [32] * 13, np.int32)  # of the sequences' targets


def hessian(state) -> dict:
    is_sophia = lambda s: type(s).__name__ == "SophiaState"  # noqa: E731
    (found,) = [s.hessian for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)]
    return found


def test_sophia_g_follows_its_formula():
    """With B = 7 and a gradient of sampled targets that is twice the other."""
    parameters, gradients = draw(some_shapes(), 81), draw_gradients(some_shapes())
    fields = {"beta1": 0.8, "beta2": 0.7, "gamma": 0.5, "eps": 1e-3, "every_steps": 2, "estimator": "gnb"}
    optimizer = build("sophia", fields)

    @jax.jit
    def update(gradients, state, parameters, at):
        def sampled(there, key):
            same = jnp.all(jnp.array(jax.tree.leaves(jax.tree.map(jnp.array_equal, there, parameters))))
            return jax.tree.map(lambda g: jnp.where(same, 2 * g, jnp.nan), gradients), jnp.float32(7)

        return optimizer.update(gradients, state, parameters, step=at, sampled_gradient_at=sampled)

    state, m, h = optimizer.init(parameters), 0.0, 0.0
    for number, (at, gradient) in enumerate(zip(STEPS, gradients, strict=True)):
        change, state = update(gradient, state, parameters, np.int32(at))
        m = 0.8 * m + 0.2 * flat(gradient)
        h = h if number % 2 else 0.7 * h + 0.3 * 7 * (2 * flat(gradient)) ** 2
        expected = -RATES[at] * np.clip(m / np.maximum(0.5 * h, 1e-3), -1, 1)
        np.testing.assert_allclose(flat(change), expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"optimizer.estimator='fisher' is none of 'hutchinson', 'gnb'"):
        build("sophia", {"estimator": "fisher"})


def estimates(sizes: tuple, device_batch_size: int, count: int):
    """Sophia-G's estimates at fixed parameters, step by step, and the probabilities (B, L, V) there."""
    config = tiny.get_config("optimizer=sophia")
    config.model.update(attn_dropout=0.0, head_bias=True, num_blocks=1)
    config.device_batch_size = device_batch_size
    config.optimizer.update(estimator="gnb", learning_rate=0.0, weight_decay=0.0, beta2=0.0, every_steps=1)
    config = config_lib.resolve(config, 257)
    sizes = dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True))
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    shape = shape_on(config, mesh)
    steps, (micro_steps, rows, length) = step.build(config, shape), shape.batch_at(0)
    tokens = np.random.default_rng(3).integers(0, 256, (micro_steps, rows, length + 1)).astype(np.uint16)
    batch = {"tokens": tokens, "lengths": LENGTHS.reshape(micro_steps, rows)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, found = steps.init(), []
    bias = 2 * np.random.default_rng(4).standard_normal(config.model.vocab_size).astype(np.float32)
    bias = jax.device_put(bias, state.params["head"]["bias"].sharding)
    state = replace(state, params=state.params | {"head": state.params["head"] | {"bias": bias}})
    logits = jax.jit(GPT(config.model))(jax.device_get(state.params), tokens.reshape(16, -1)[:, :-1])
    for _ in range(count):
        state, _ = steps.train(state, batch)
        found.append(by_path(hessian(state.opt_state)))
    return found, np.asarray(jax.nn.softmax(logits), np.float64)


def test_the_model_draws_the_targets():
    """Of the head's bias the Gauss-Newton diagonal is the mean of p (1 - p); and any mesh draws the same."""
    found, p = estimates((1, 1, 1, 1), 16, 80)
    counts = np.arange(32) < LENGTHS.reshape(16, 1)
    expected = (p * (1 - p))[counts].mean(0)
    mean = np.mean([h["head/bias"] for h in found], axis=0)
    order = np.array_split(np.argsort(expected), 4)  # from rare targets to frequent ones
    got, want = [[x[part].sum() for part in order] for x in (mean, expected)]
    assert want[3] > 5 * want[2] > 10 * want[1]
    np.testing.assert_allclose(got, want, rtol=0.15)
    (split,), _ = estimates((2, 1, 2, 2), 4, 1)
    for path, value in split.items():  # squares of sums, some of which nearly cancel
        np.testing.assert_allclose(
            value, found[0][path], rtol=1e-3, atol=1e-12 + 1e-5 * value.mean(), err_msg=path
        )
    assert np.abs(found[0]["head/kernel"] / found[1]["head/kernel"] - 1).mean() > 0.1
