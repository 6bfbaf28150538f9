"""Schedule-Free: its formula, and through the train step where gradients are taken."""

import jax
import numpy as np
import optax
import pytest
import tiny
from optimizer_cases import (
    RATES,
    STEPS,
    Adam,
    build,
    by_path,
    compare,
    decay_mask,
    draw,
    draw_gradients,
    flat,
    run,
    some_shapes,
    unflat,
)

from trainit import config as config_lib
from trainit import optimizers
from trainit.config import ConfigError
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step


@pytest.mark.parametrize("base", ["adamw", "sgdm"])
def test_schedule_free(base):
    """Defazio et al. 2024, equations 3 to 5, with decay at y; for AdamW, algorithm 1."""
    parameters, gradients = draw(some_shapes(), 71), draw_gradients(some_shapes())
    fields = {"schedule_free": {"beta": 0.7}} | ({"beta2": 0.97, "eps": 1e-3} if base == "adamw" else {})
    got = run(build(f"schedule_free+{base}", fields, 0.3, 40.0), parameters, gradients)
    adam, x = Adam(0.0, 0.97, 1e-3), flat(parameters)
    z, total, mask, expected = x, 0.0, decay_mask(parameters), []
    for at, raw in zip(STEPS, map(flat, gradients), strict=True):
        y = 0.3 * z + 0.7 * x
        g = raw * min(1.0, 40.0 / np.linalg.norm(raw))
        z = z - RATES[at] * ((adam(g) if base == "adamw" else g) + 0.3 * mask * y)
        total += RATES[at] ** 2
        c = RATES[at] ** 2 / total
        expected.append(unflat(c * (z - x), parameters))
        x = (1 - c) * x + c * z
    compare(got, expected, 1e-4)


def test_gradients_are_taken_at_y_and_the_model_is_x(random_dataset):
    """Two groups on eight devices, one of them averaged, against plain gradients of all rows."""
    config = tiny.get_config("optimizer=sgdm")
    config.model.attn_dropout = 0.0
    config.schedule = config_lib.SCHEDULES["constant"]()
    config.schedule.warmup = 0
    config.clip_norm = 0.0
    config.optimizer.update(learning_rate=0.2, weight_decay=0.0, momentum=0.0)
    config.parameter_groups = (
        "blocks/.* optimizer=schedule_free+sgdm learning_rate=0.4 weight_decay=0 schedule_free.beta=0.6",
    )
    config = config_lib.resolve(config, 257)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    steps, model = step.build(config, shape_on(config, mesh)), GPT(config.model)
    tokens = np.random.default_rng(3).integers(0, 256, (4, 2, 8, 33)).astype(np.uint16)
    layout = batch_sharding(mesh)

    def loss(p, ids):
        logits = model(p, ids[:, :-1].astype(np.int32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:].astype(np.int32)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    state = steps.init()
    x = by_path(state.params)
    z = dict(x)
    averaged = {path for path in x if path.startswith("blocks/")}

    def tree(flat):
        leaves = [flat[path].astype(np.float32) for path in by_path(state.params)]
        return jax.tree.unflatten(jax.tree.structure(state.params), leaves)

    for number, batch in enumerate(tokens, start=1):
        y = {path: 0.4 * z[path] + 0.6 * x[path] for path in x}
        value, gradient = value_and_grad(tree(y), batch.reshape(16, 33))
        for path, g in by_path(gradient).items():
            z[path] = z[path] - (0.4 if path in averaged else 0.2) * g
            x[path] = x[path] + (z[path] - x[path]) / number if path in averaged else z[path]
        lengths = np.full((2, 8), 32, np.int32)
        state, metrics = steps.train(state, jax.device_put({"tokens": batch, "lengths": lengths}, layout))
        np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-5)
    assert max(np.abs(x[path] - z[path]).max() for path in averaged) > 1e-3
    for path, value in by_path(state.params).items():
        np.testing.assert_allclose(value, x[path], atol=2e-5, err_msg=path)


def test_it_comes_first():
    names = optimizers.choices()
    assert names["schedule_free+cautious+adamw"]().beta1 == 0.0
    assert names["schedule_free+optax.lion"]().b1 == 0.0
    with pytest.raises(ConfigError, match=r"cautious\+schedule_free\+adamw: schedule_free .* come first"):
        names["cautious+schedule_free+adamw"]
    with pytest.raises(ConfigError, match=r"take optimizer=schedule_free\+NAME"):
        names["optax.contrib.schedule_free_adamw"]
