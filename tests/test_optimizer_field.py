"""The field's optimizers and the wrappers, against their papers' formulas in NumPy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tiny
from optimizer_cases import (
    CURVATURE,
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
    jitted,
    numpy_updates,
    run,
    some_shapes,
    unflat,
)

from trainit import config as config_lib
from trainit import optimizers
from trainit.checkpoints.state import named_key
from trainit.config import ConfigError, choose, defaults, resolve
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step

pytestmark = pytest.mark.evidence("optimizers and wrappers against the formulas of their papers, in float64")

ADAM = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3}


def inputs():
    return draw(some_shapes(), 51), draw_gradients(some_shapes())


@pytest.mark.parametrize("exact", [False, True])
def test_mars(exact):
    parameters, gradients = inputs()
    got = run(build("mars", ADAM | {"gamma": 0.1, "exact": exact}, 0.3, 40.0), parameters, gradients)
    mask = decay_mask(parameters)
    x, adam, expected = flat(parameters), Adam(**ADAM), []
    before, last = x, 0.0
    for number, (at, tree) in enumerate(zip(STEPS, gradients, strict=True)):
        raw = flat(tree)
        g = raw * min(1.0, 40.0 / np.linalg.norm(raw))
        past = raw + CURVATURE * (before - x) if exact else last
        c = g + (0.1 * 0.8 / 0.2 * (g - past) if number else 0.0)
        update = -RATES[at] * (adam(c / max(1.0, np.linalg.norm(c))) + 0.3 * mask * x)
        expected.append(unflat(update, parameters))
        before, last, x = x, g, x + update
    compare(got, expected, 3e-3 if exact else 1e-4)  # the test's gradient there subtracts in float32


def blocks_of(path: str, g: np.ndarray) -> list[tuple]:
    """Indexes of the parts of an array that share a mean square: Zhang et al. 2024, algorithm 3."""
    layers = range(len(g)) if path.startswith("blocks/") else [None]
    result = []
    for layer in layers:
        own = () if layer is None else (layer,)
        part = g if layer is None else g[layer]
        if path.endswith("embedding"):  # a token's or a position's row
            result += [(*own, i) for i in range(part.shape[0])]
        elif path.endswith(("head/kernel", "up/kernel", "down/kernel", "query/kernel", "key/kernel")):
            # a token, a unit, a head
            result += [(*own, slice(None), i) for i in range(part.shape[1])]
        elif path.endswith("value/kernel"):  # a unit
            result += [(*own, slice(None), i, j) for i in range(part.shape[1]) for j in range(part.shape[2])]
        elif path.endswith("out/kernel"):
            result += [(*own, slice(None), slice(None), i) for i in range(part.shape[2])]
        elif path.endswith(("query/bias", "key/bias")):
            result += [(*own, i) for i in range(part.shape[0])]
        else:
            result.append(own or (...,))
    return result


def test_adam_mini():
    shapes = some_shapes()
    attention = {**shapes["blocks"]["attention"], "value": shapes["blocks"]["attention"]["query"]}
    shapes = {**shapes, "blocks": {**shapes["blocks"], "attention": attention}}
    parameters, gradients = draw(shapes, 52), draw_gradients(shapes)
    adams = {path: Adam(**ADAM) for path in by_path(parameters)}

    def direction(path, g, t):
        square = np.zeros_like(g)
        for block in blocks_of(path, g):
            square[block] = (g[block] ** 2).mean()
        return adams[path](g, square)

    got = run(build("adam_mini", ADAM, 0.3, 40.0, shapes=shapes), parameters, gradients)
    compare(got, numpy_updates(direction, parameters, gradients, 0.3, 40.0))


def test_sophia_follows_its_formula():
    """With h = z^2 CURVATURE at every second update; the state holds z."""
    parameters, gradients = inputs()
    fields = {"beta1": 0.8, "beta2": 0.7, "gamma": 0.5, "eps": 1e-3, "every_steps": 2}
    optimizer = build("sophia", fields)
    update, state = jitted(optimizer), jax.jit(optimizer.init)(parameters)
    m, h = 0.0, np.zeros(flat(parameters).size)
    for number, (at, gradient) in enumerate(zip(STEPS, gradients, strict=True)):
        change, state, parameters = update(gradient, state, parameters, np.int32(at))
        (found,) = [flat(s.hessian) for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)]
        if number % 2:
            np.testing.assert_array_equal(found, h)
        else:
            squares = (found - 0.7 * h) / 0.3 / CURVATURE
            assert squares.min() > -1e-3
            assert squares.mean() == pytest.approx(1, abs=0.06)  # of a normal distribution
            assert squares.var() == pytest.approx(2, abs=0.4)
        h = found
        m = 0.8 * m + 0.2 * flat(gradient)
        expected = -RATES[at] * np.clip(m / np.maximum(0.5 * h, 1e-3), -1, 1)
        np.testing.assert_allclose(flat(change), expected, rtol=1e-4, atol=1e-6)


def is_sophia(state) -> bool:
    return type(state).__name__ == "SophiaState"


def test_sophia_estimates_the_diagonal_of_a_full_hessian():
    rng = np.random.default_rng(0)
    hessian = rng.standard_normal((6, 6)).astype(np.float32)
    hessian = hessian + hessian.T
    shapes = {"final_norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)}}
    optimizer = build("sophia", {"beta2": 0.0, "every_steps": 1}, shapes=shapes, schedule=lambda s: 0.0)
    x = {"final_norm": {"scale": jnp.ones(6)}}

    def gradient(p):
        return {"final_norm": {"scale": jnp.sin(hessian @ p["final_norm"]["scale"])}}  # not even linear

    def one(state, at):
        _, state = optimizer.update(gradient(x), state, x, step=at, gradient_at=gradient)
        (found,) = [s.hessian for s in jax.tree.leaves(state, is_leaf=is_sophia) if is_sophia(s)]
        return state, found["final_norm"]["scale"]

    _, estimates = jax.lax.scan(one, optimizer.init(x), jnp.arange(40_000))
    jacobian = np.cos(hessian.sum(1))[:, None] * hessian
    np.testing.assert_allclose(estimates.mean(0), np.diag(jacobian), atol=0.1)


def test_cautious():
    """Liang et al. 2024, algorithm 2: what disagrees is left out, the rest grows; decay is spared."""
    parameters, gradients = inputs()
    adams = {path: Adam(**ADAM) for path in by_path(parameters)}
    left_out = []

    def direction(path, g, t):
        u = adams[path](g)
        layers = [...] if not path.startswith("blocks/") else range(len(u))
        for layer in layers:  # by array of each layer
            phi = u[layer] * g[layer] > 0
            left_out.append(1 - phi.mean())
            u[layer] = u[layer] * phi * phi.size / (phi.sum() + 1)
        return u

    got = run(build("cautious+adamw", ADAM, 0.3, 40.0), parameters, gradients)
    compare(got, numpy_updates(direction, parameters, gradients, 0.3, 40.0))
    assert 0.1 < np.mean(left_out) < 0.6


def test_offset_adds_the_mean_of_the_changes():
    """At rates that differ, whose past is not in the mean; decay is spared."""
    parameters, gradients = inputs()
    adams = {path: Adam(**ADAM) for path in by_path(parameters)}
    means = dict.fromkeys(adams, 0.0)

    def direction(path, g, t):
        u = adams[path](g)
        means[path] = 0.7 * means[path] + 0.3 * u
        return u + means[path]

    got = run(build("offset+adamw", ADAM | {"offset": {"beta": 0.7}}, 0.3, 40.0), parameters, gradients)
    compare(got, numpy_updates(direction, parameters, gradients, 0.3, 40.0))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive):
    parameters, gradients = inputs()
    fields = {"momentum": 0.0, "sam": {"rho": 5.0, "adaptive": adaptive}}
    got = run(build("sam+sgdm", fields), parameters, gradients)
    x, expected = flat(parameters), []
    for at, g in zip(STEPS, map(flat, gradients), strict=True):
        scale = np.abs(x) if adaptive else 1.0
        e = 5.0 * scale**2 * g / np.linalg.norm(scale * g)
        update = -RATES[at] * (g + CURVATURE * e)
        expected.append(unflat(update, parameters))
        x = x + update
    compare(got, expected, 3e-3)  # the test's own gradient there subtracts parameters in float32


def test_mechanic_is_optax_around_the_other():
    parameters, gradients = inputs()
    fields = {"momentum": 0.0, "mechanic": {"start": 0.01}}  # or float32 parameters would not move at all
    got = run(build("mechanic+sgdm", fields), parameters, gradients)
    rates = iter([RATES[at] for at in STEPS])
    state, expected, x = None, [], parameters
    for gradient in gradients:
        one = optax.contrib.mechanize(optax.sgd(next(rates)), s_init=0.01)
        state = state or one.init(x)
        update, state = one.update(gradient, state, x)
        x = optax.apply_updates(x, update)
        expected.append(by_path(update))
    assert max(np.abs(value).max() for value in expected[-1].values()) > 1e-3
    for update, want in zip(map(by_path, got), expected, strict=True):
        for path, value in update.items():  # differences of parameters, rounded as these are
            np.testing.assert_allclose(value, want[path], rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.evidence("gradients at other points are the batch's own, through accumulation on 8 devices")
@pytest.mark.parametrize("name", ["sam+sgdm", "sophia", "mars"])
def test_gradients_elsewhere_are_the_batch_s_own(name, random_dataset):
    """Through the train step: two micro-steps on eight devices, against plain gradients of all rows."""
    config = tiny.get_config(f"optimizer={name}")
    config.model.attn_dropout = 0.0
    config.schedule = config_lib.SCHEDULES["constant"]()
    config.schedule.warmup = 0
    config.clip_norm = 0.0
    config.optimizer.weight_decay = 0.0
    changes = {
        "sam+sgdm": {"learning_rate": 0.5, "momentum": 0.0, "sam": {"rho": 0.3}},
        "sophia": {"learning_rate": 0.01, "beta1": 0.0, "beta2": 0.0},
        "mars": {"learning_rate": 0.01, "exact": True, "gamma": 1.0},
    }
    config.optimizer.update(changes[name])
    config = resolve(config, 257)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    steps, model = step.build(config, shape_on(config, mesh)), GPT(config.model)
    tokens = np.random.default_rng(3).integers(0, 256, (2, 2, 8, 33)).astype(np.uint16)
    lengths = np.full((2, 8), 32, np.int32)

    def gradient(params, ids):
        def loss(p):
            logits = model(p, ids[:, :-1].astype(np.int32))
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:].astype(np.int32)).mean()

        return jax.grad(loss)(params)

    state = steps.init()
    x = jax.device_get(state.params)
    plain = optimizers.build(
        config.optimizer,
        optimizers.Context(
            schedule=lambda at: config.optimizer.learning_rate,
            steps=40,
            parameters=x,
            weight_decay=0.0,
            clip_norm=0.0,
            key=jax.random.key_data(named_key(config.seed, "optimizer")),
        ),
    )
    opt_state = plain.init(x)

    @jax.jit
    def plain_update(x, opt_state, at, ids):
        near = functools.partial(gradient, ids=ids)
        return plain.update(near(x), opt_state, x, step=at, gradient_at=near)

    for number in range(2):
        batch = {"tokens": tokens[number], "lengths": lengths}
        state, _ = steps.train(state, jax.device_put(batch, batch_sharding(mesh)))
        ids = tokens[number].reshape(16, 33)
        update, opt_state = plain_update(x, opt_state, number, ids)
        for path, value in by_path(opt_state).items():
            atol = 2e-3 * np.abs(value).max(initial=1e-6)
            np.testing.assert_allclose(by_path(state.opt_state)[path], value, atol=atol, err_msg=path)
        if name == "sam+sgdm":  # the others divide by what may be nearly 0
            for path, value in by_path(optax.apply_updates(x, update)).items():
                np.testing.assert_allclose(by_path(state.params)[path], value, atol=1e-5, err_msg=path)
        x, opt_state = jax.device_get((state.params, state.opt_state))
    assert np.abs(flat(x) - flat(steps.init().params)).max() > 1e-3


def choice(name: str):
    return choose(defaults(), f"optimizer={name}", optimizer=optimizers.choices()).optimizer


def test_a_wrapper_is_a_choice(tmp_path, monkeypatch):
    config = choice("cautious+adamw")
    assert config.name == "cautious+adamw"
    assert config.cautious.eps == 1.0
    assert {field: config[field] for field in choice("adamw") if field != "name"} == {
        field: value for field, value in choice("adamw").items() if field != "name"
    }
    assert choice("mechanic+sam+optax.lion").sam.rho == 0.05
    assert choice("mechanic+sgdm").learning_rate == 1.0
    with pytest.raises(
        ConfigError,
        match=r"unknown wrapper 'careful': there are cautious, cautious_decay, ema_nesterov, mechanic",
    ):
        choice("careful+adamw")
    with pytest.raises(ConfigError, match=r"unknown optimizer 'sam\+adamv': there are ada_ftrl"):
        choice("sam+adamv")
    with pytest.raises(ConfigError, match=r"optimizer.sam.rho=0.0 must be above 0"):
        build("sam+sgdm", {"sam": {"rho": 0.0}})
    (tmp_path / "mine.py").write_text("from trainit.optimizers.sgdm import get_config, make\n")
    monkeypatch.chdir(tmp_path)
    own = choice("sam+mine.py")
    assert own.name == "sam+mine.py"
    assert optimizers.own_files_hash(own, ()) == optimizers.own_files_hash(choice("mine.py"), ()) != ""


def test_gradients_elsewhere_need_all_parameters():
    config = tiny.get_config()
    for name in ("sam+sgdm", "sophia estimator=gnb"):
        config.parameter_groups = (f"blocks/.*/kernel optimizer={name}",)
        with pytest.raises(
            ConfigError, match="parameter_groups: an optimizer that takes gradients elsewhere"
        ):
            optimizers.check(resolve(config, 257))
    config.parameter_groups = ("blocks/.*/kernel optimizer=muon",)
    optimizers.check(resolve(config, 257))
