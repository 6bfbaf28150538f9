"""AdamW and SGDM against their papers' formulas in NumPy, and what holds for every optimizer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

import trainit.config
from trainit import optimizers
from trainit.model import GPT

NAMES = sorted(optimizers.choices())
# Not in order and not from 0, so that a count of updates gives other rates.
STEPS = (4, 9, 2, 2, 7)
RATES = np.array([0.0, 0.5, 0.02, 0.9, 0.1, 0.6, 0.3, 0.07, 0.8, 0.4])


def parameter_shapes() -> dict:
    """Of a GPT that has every kind of parameter."""
    config = trainit.config.defaults()
    config.model = trainit.config.model(
        dim=16, num_heads=2, num_blocks=2, context_length=8, vocab_size=128, head_bias=True, qk_norm=True
    )
    config.optimizer = optimizers.choices()["adamw"]()
    return jax.eval_shape(GPT(trainit.config.resolve(config, 100).model).init, jax.random.key(0))


def by_path(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def draw(shapes: dict, seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), shapes)


def draw_gradients(shapes: dict) -> list[dict]:
    """Of five steps, with global norms below and above 40, and some parameters' small."""
    gradients = [draw(shapes, seed, scale) for seed, scale in enumerate((0.1, 3.0, 1.0, 0.01, 2.0))]
    for gradient in gradients:
        gradient["blocks"]["mlp"]["up"]["kernel"] *= 1e-2
        gradient["head"]["bias"] *= 1e-3
    return gradients


def build(name: str, changes: dict, weight_decay: float = 0.0, clip_norm: float = 0.0, schedule=None):
    """An optimizer, the way `step` builds it."""
    config = optimizers.choices()[name]()
    config.update(changes)
    context = optimizers.Context(
        schedule=schedule or (lambda step: jnp.asarray(RATES, jnp.float32)[step]),
        steps=len(RATES),
        parameters=parameter_shapes(),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        key=jax.random.key(0),
    )
    return optimizers.build(FrozenConfigDict(config), context)


def run(optimizer, parameters: dict, gradients: list[dict]) -> list[dict]:
    """The updates at STEPS, each applied before the next."""
    update = jax.jit(lambda g, state, p, step: optimizer.update(g, state, p, step=step))
    state, updates = optimizer.init(parameters), []
    for step, gradient in zip(STEPS, gradients, strict=True):
        change, state = update(gradient, state, parameters, jnp.int32(step))
        parameters = jax.tree.map(jnp.add, parameters, change)
        updates.append(change)
    return updates


def numpy_updates(direction, parameters, gradients, weight_decay, clip_norm) -> list[dict]:
    """Clip by global norm, `direction`(path, gradient, t), decoupled decay, minus the step's rate."""
    parameters, updates = by_path(parameters), []
    for t, (step, gradient) in enumerate(zip(STEPS, map(by_path, gradients), strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = min(1.0, clip_norm / norm) if clip_norm else 1.0
        update = {}
        for path, g in gradient.items():
            decay = weight_decay if path.endswith(("kernel", "embedding")) else 0.0
            update[path] = -RATES[step] * (direction(path, clip * g, t) + decay * parameters[path])
            parameters[path] = parameters[path] + update[path]
        updates.append(update)
    return updates


def numpy_adam(beta1, beta2, eps, nesterov):
    """Kingma & Ba 2014, algorithm 1; with Nesterov the numerator looks one step ahead (Dozat 2016)."""
    m, v = {}, {}

    def direction(path, g, t):
        m[path] = beta1 * m.get(path, 0.0) + (1 - beta1) * g
        v[path] = beta2 * v.get(path, 0.0) + (1 - beta2) * g**2
        mean = m[path] / (1 - beta1**t)
        if nesterov:
            mean = beta1 * m[path] / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        return mean / (np.sqrt(v[path] / (1 - beta2**t)) + eps)

    return direction


def numpy_momentum(momentum, nesterov):
    """Polyak 1964; with Nesterov as Sutskever et al. 2013 have it, the gradient behind the momentum step."""
    m = {}

    def direction(path, g, t):
        m[path] = momentum * m.get(path, 0.0) + g
        return momentum * m[path] + g if nesterov else m[path]

    return direction


def compare(updates: list[dict], expected: list[dict]):
    for number, (update, want) in enumerate(zip(map(by_path, updates), expected, strict=True)):
        assert update.keys() == want.keys()
        for path, value in update.items():
            where = f"{path} at update {number}"
            assert np.abs(want[path]).max() > 0, where
            # Sums of opposite terms round at the size of the largest.
            atol = 1e-6 * np.abs(want[path]).max()
            np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=atol, err_msg=where)


@pytest.mark.parametrize(
    "nesterov, weight_decay, clip_norm",
    [(False, 0.0, 0.0), (False, 0.3, 40.0), (True, 0.0, 40.0), (True, 0.3, 0.0)],
)
def test_adamw_equals_its_formula(nesterov, weight_decay, clip_norm):
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 11), draw_gradients(shapes)
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3, "nesterov": nesterov}
    updates = run(build("adamw", fields, weight_decay, clip_norm), parameters, gradients)
    compare(updates, numpy_updates(numpy_adam(**fields), parameters, gradients, weight_decay, clip_norm))


@pytest.mark.parametrize(
    "momentum, nesterov, weight_decay, clip_norm",
    [
        (0.7, False, 0.0, 0.0),
        (0.7, False, 0.3, 40.0),
        (0.7, True, 0.0, 40.0),
        (0.7, True, 0.3, 0.0),
        (0.0, False, 0.3, 40.0),
        (0.0, True, 0.0, 0.0),
    ],
)
def test_sgdm_equals_its_formula(momentum, nesterov, weight_decay, clip_norm):
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 12), draw_gradients(shapes)
    fields = {"momentum": momentum, "nesterov": nesterov}
    updates = run(build("sgdm", fields, weight_decay, clip_norm), parameters, gradients)
    direction = numpy_momentum(**fields)
    compare(updates, numpy_updates(direction, parameters, gradients, weight_decay, clip_norm))


def test_the_gradients_are_clipped_at_some_steps_only():
    norms = [
        np.sqrt(sum((g**2).sum() for g in by_path(tree).values()))
        for tree in draw_gradients(parameter_shapes())
    ]
    assert min(norms) < 0.5 * 40 and max(norms) > 2 * 40


def test_decay_mask():
    shapes = parameter_shapes()
    context = optimizers.Context(lambda step: 1.0, 1, shapes, 0.1, 0.0, jax.random.key(0))
    mask = by_path(context.decay_mask)
    assert mask.keys() == by_path(draw(shapes, 0)).keys()
    assert {path for path, decays in mask.items() if not decays} == {
        path for path in mask if path.split("/")[-1] in ("bias", "scale")
    }


def test_every_file_is_an_optimizer():
    folder = Path(optimizers.__file__).parent
    assert set(NAMES) == {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert {"adamw", "sgdm"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_declares_what_every_optimizer_has(name):
    config = optimizers.choices()[name]()
    assert isinstance(config, ConfigDict)
    assert config.name == name
    assert isinstance(config.learning_rate, float) and config.learning_rate > 0
    assert isinstance(config.weight_decay, float) and config.weight_decay >= 0
    config.learning_rate = 123.0
    assert optimizers.choices()[name]().learning_rate != 123.0  # each call makes its own


@pytest.mark.parametrize("name", NAMES)
def test_updates_move_every_parameter_downhill(name):
    """From its own defaults, without decay: shapes, types, finite values, no parameter left out."""
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 13), draw_gradients(shapes)
    optimizer = build(name, {}, schedule=lambda step: jnp.float32(1e-3))
    state = optimizer.init(parameters)
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32
    updates = run(optimizer, parameters, gradients)
    for update in updates:
        assert jax.tree.map(lambda u: (u.shape, u.dtype), update) == jax.tree.map(
            lambda s: (s.shape, s.dtype), shapes
        )
        for path, value in by_path(update).items():
            assert np.isfinite(value).all(), path
            assert np.abs(value).max() > 0, path
    first, gradient = by_path(updates[0]), by_path(gradients[0])
    assert sum((first[path] * gradient[path]).sum() for path in first) < 0


@pytest.mark.parametrize("name", NAMES)
def test_rate_zero_moves_nothing(name):
    shapes = parameter_shapes()
    optimizer = build(name, {}, weight_decay=0.1, clip_norm=1.0, schedule=lambda step: jnp.float32(0))
    for update in run(optimizer, draw(shapes, 14), draw_gradients(shapes)):
        for path, value in by_path(update).items():
            np.testing.assert_array_equal(value, 0, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_give_finite_updates(name):
    """A parameter that takes no part in the loss must not turn into NaN by a division 0 / 0."""
    shapes = parameter_shapes()
    gradients = [jax.tree.map(jnp.zeros_like, tree) for tree in draw_gradients(shapes)]
    gradients[2] = draw(shapes, 15)
    for update in run(build(name, {}, clip_norm=1.0), draw(shapes, 16), gradients):
        for path, value in by_path(update).items():
            assert np.isfinite(value).all(), path


@pytest.mark.parametrize("name", NAMES)
def test_an_update_needs_the_step(name):
    """A forgotten step is an error, not a rate by some count."""
    optimizer, parameters = build(name, {}), draw(parameter_shapes(), 18)
    state = jax.eval_shape(optimizer.init, parameters)
    with pytest.raises(TypeError, match="step"):
        jax.eval_shape(lambda s: optimizer.update(parameters, s, parameters), state)
