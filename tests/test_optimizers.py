"""What holds for every optimizer's file here, for a file elsewhere, and for those of optax."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict, FrozenConfigDict
from optimizer_cases import (
    STEPS,
    build,
    by_path,
    draw,
    draw_gradients,
    draw_gradients_with_a_basis,
    jitted,
    model,
    parameter_shapes,
    some_shapes,
)
from processes import ROOT

from trainit import optimizers
from trainit.checkpoints.state import TrainState
from trainit.checkpoints.store import CheckpointStore
from trainit.config import ConfigError, choose, defaults, flatten, resolve, walk
from trainit.optimizers.common import registry
from trainit.parallel.layout import state_shardings
from trainit.parallel.mesh import make_mesh
from trainit.parallel.trees import path_name

OWN = """
from ml_collections import ConfigDict
import jax, jax.numpy as jnp, optax

def get_config():
    config = ConfigDict({"learning_rate": 1e-3, "weight_decay": 0.0})
    config.beta = 0.9
    return config

def make(config, context):
    def update(gradients, mean, params=None):
        mean = jax.tree.map(lambda m, g: config.beta * m + (1 - config.beta) * g, mean, gradients)
        return jax.tree.map(jnp.sign, mean), mean

    init = lambda params: jax.tree.map(jnp.zeros_like, params)
    return context.descend(optax.GradientTransformation(init, update))
"""
IN_PACKAGE = sorted(optimizers.choices())
WRAPPERS = (
    *("cautious", "cautious_decay", "ema_nesterov", "mechanic", "offset", "sam", "schedule_free", "sphere"),
)
NAMES = [
    *IN_PACKAGE,
    "own.py",
    "optax.lion",
    "schedule_free+adamw",
    "ema_nesterov+cautious_decay+sphere+muon",
]
# Of which a layer's update depends on the other layers, by definition.
WHOLE_TREE = {
    *("polar", "jump", "mirror_descent", "blackbox", "normalized_blackbox", "imperfect_hints", "mars"),
    *("sophia", "psgd"),  # whose random vectors are drawn for all layers at once
}
LATE = {"blackbox", "soap"}  # whose first update is 0, by definition
# Whose updates depend on eigenvectors, with what keeps parts without a gradient from being divided by
# almost 0.
EIGENVECTORS = {"soap": {"eps": 0.03}, "soap_muon": {"eps": 0.03}}
# Where an optimizer computes in bfloat16, or takes roots of what is next to 0.
EXACT = {"ns_precision": "float32", "ridge": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def own_file(tmp_path_factory):
    """A folder with own.py, as the working directory."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def rate(step):
    """0 at step 0; small enough for a loss to fall under every optimizer's own peak."""
    return jnp.where(step == 0, 0.0, 1.0)


def case(name: str, num_blocks: int = 2, mesh=None, gradient=None, stable=False):
    """An optimizer with its own defaults, its jitted init and update; made once.

    stable: with those changes that `stable_gradients` need.
    """
    return made(name, num_blocks, mesh, gradient, stable and name in EIGENVECTORS)


@functools.cache
def made(name: str, num_blocks: int, mesh, gradient, stable: bool):
    config = optimizers.choices()[name]()
    changes = {field: value for field, value in EXACT.items() if field in config}
    changes |= EIGENVECTORS[name] if stable else {}
    schedule = lambda s: config.learning_rate * rate(s)  # noqa: E731
    optimizer = build(name, changes, schedule=schedule, shapes=some_shapes(num_blocks), mesh=mesh)
    return optimizer, jax.jit(optimizer.init), jitted(optimizer, gradient)


def stable_gradients(name: str, shapes: dict) -> list[dict]:
    """Of which the updates are the same up to rounding, however it falls."""
    return (draw_gradients_with_a_basis if name in EIGENVECTORS else draw_gradients)(shapes)


def run(name, parameters, gradients, num_blocks=2, mesh=None, put=lambda tree: tree, stable=False):
    """Updates at STEPS, each applied before the next, and the last state."""
    _, init, update = case(name, num_blocks, mesh, stable=stable)
    parameters = put(parameters)
    state, updates = put(init(parameters)), []
    for step, gradient in zip(STEPS, gradients, strict=True):
        change, state, parameters = update(put(gradient), state, parameters, np.int32(step))
        updates.append(change)
    return updates, state


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})


def same(got, want, rtol):
    for update, expected in zip(map(by_path, got), map(by_path, want), strict=True):
        for path, value in update.items():
            atol = rtol * np.abs(expected[path]).max()
            np.testing.assert_allclose(value, expected[path], rtol=rtol, atol=atol, err_msg=path)


def test_decay_mask():
    shapes = parameter_shapes()
    context = optimizers.Context(
        lambda step: 1.0, 1, shapes, 0.1, 0.0, jax.random.key_data(jax.random.key(0))
    )
    mask = by_path(context.decay_mask)
    assert mask.keys() == by_path(draw(shapes, 0)).keys()
    assert {path for path, decays in mask.items() if not decays} == {
        path for path in mask if path.split("/")[-1] in ("bias", "scale")
    }


def test_every_file_is_an_optimizer():
    folder = Path(optimizers.__file__).parent
    variants = {"nadam", "rmsprop", "muon_og"}  # which share a file with the optimizers that they vary
    assert set(registry.VARIANTS) == variants
    assert set(IN_PACKAGE) == {file.stem for file in folder.glob("[!_]*.py")} | variants
    assert {"adamw", "sgdm"} <= set(IN_PACKAGE)


@pytest.mark.parametrize("name", NAMES)
def test_config_declares_what_every_optimizer_has(name):
    config = optimizers.choices()[name]()
    assert isinstance(config, ConfigDict)
    assert config.name == name
    assert isinstance(config.learning_rate, float) and config.learning_rate > 0
    assert isinstance(config.weight_decay, float) and config.weight_decay >= 0
    config.learning_rate = 123.0
    assert optimizers.choices()[name]().learning_rate != 123.0  # each call makes its own


@pytest.mark.parametrize("name", [*IN_PACKAGE, *(f"{wrapper}+sgdm" for wrapper in WRAPPERS)])
def test_every_field_says_what_it_is(name):
    for field, _, declared in walk(optimizers.choices()[name]()):
        assert len(declared.help) > 4, field


class Reads:
    """A config that remembers which of its fields were read."""

    def __init__(self, config, prefix="", read=None):
        self._config, self._prefix, self.read = config, prefix, set() if read is None else read

    def __getattr__(self, field):
        return self[field]

    def __getitem__(self, field):
        value = self._config[field]
        if isinstance(value, FrozenConfigDict):
            return Reads(value, f"{self._prefix}{field}.", self.read)
        self.read.add(self._prefix + field)
        return value

    def __iter__(self):
        return iter(self._config)

    def items(self):
        return [(field, self[field]) for field in self._config]


@pytest.mark.evidence("every optimizer: each of its fields is read")
@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_read(name):
    """When the optimizer is made, or when its functions are traced."""
    shapes = parameter_shapes()
    config = FrozenConfigDict(optimizers.choices()[name]())
    context = optimizers.Context(
        lambda step: 1.0, 1, shapes, 0.1, 0.0, jax.random.key_data(jax.random.key(0))
    )
    reads = Reads(config)
    optimizer = optax.with_extra_args_support(registry.load(name).make(reads, context))
    jax.eval_shape(
        lambda p: optimizer.update(p, optimizer.init(p), p, step=1, gradient_at=lambda q: q), shapes
    )
    assert set(flatten(config)) - reads.read <= {"name", "learning_rate", "weight_decay"}


@pytest.mark.parametrize("name", NAMES)
def test_updates_move_every_parameter_downhill(name):
    """From its own defaults, without decay: shapes, types, finite values, no parameter left out."""
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 13), draw_gradients(shapes)
    _, init, update = case(name)
    state = jax.eval_shape(init, parameters)
    for leaf in jax.tree.leaves(state):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32
    updates, _ = run(name, parameters, gradients)
    late = name in LATE
    assert not late or not any(value.any() for value in by_path(updates[0]).values())
    for change in updates[late:]:
        assert jax.tree.map(lambda u: (u.shape, u.dtype), change) == jax.tree.map(
            lambda s: (s.shape, s.dtype), shapes
        )
        for path, value in by_path(change).items():
            assert np.isfinite(value).all(), path
            assert np.abs(value).max() > 0, path
    first, gradient = by_path(updates[0]), by_path(gradients[0])
    assert late or sum((first[path] * gradient[path]).sum() for path in first) < 0
    still, _, _ = update(gradients[0], init(parameters), parameters, np.int32(0))
    for path, value in by_path(still).items():  # the rate is 0 there
        np.testing.assert_array_equal(value, 0, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_give_finite_updates(name):
    """A parameter that takes no part in the loss must not turn into NaN by a division 0 / 0."""
    shapes = some_shapes()
    gradients = [jax.tree.map(jnp.zeros_like, tree) for tree in draw_gradients(shapes)]
    gradients[2] = draw(shapes, 15)
    for update in run(name, draw(shapes, 16), gradients)[0]:
        for path, value in by_path(update).items():
            assert np.isfinite(value).all(), path


@pytest.mark.parametrize("name", NAMES)
def test_an_update_needs_the_step(name):
    """A forgotten step is an error, not a rate by some count."""
    (optimizer, _, _), parameters = case(name), draw(some_shapes(), 18)
    state = jax.eval_shape(optimizer.init, parameters)
    with pytest.raises(TypeError, match="step"):
        jax.eval_shape(lambda s: optimizer.update(parameters, s, parameters), state)


def part_of(tree: dict, shapes: dict) -> dict:
    """What of a tree has a place in another one."""
    return {
        key: part_of(tree[key], below) if isinstance(below, dict) else tree[key]
        for key, below in shapes.items()
    }


def within(tree: dict, part: dict) -> dict:
    """A tree with the leaves of such a part in their places."""
    return tree | {
        key: within(tree[key], below) if isinstance(below, dict) else below for key, below in part.items()
    }


@pytest.fixture(scope="module")
def value_and_grad():
    """The loss of a tiny GPT on a fixed text, by `some_shapes` of its parameters; compiled once for all."""
    gpt = model()
    whole = gpt.init(jax.random.key(1))
    tokens = np.random.default_rng(5).integers(0, 100, (4, 9))

    def loss(parameters):
        logits = jax.nn.log_softmax(gpt(within(whole, parameters), tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    return part_of(whole, some_shapes()), jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name, value_and_grad):
    parameters, evaluate = value_and_grad
    gradient = (lambda p: evaluate(p)[1]) if name == "sophia" else None
    _, init, update = case(name, gradient=gradient)
    state, losses = init(parameters), []
    for step in range(1, 21):
        loss, gradients = evaluate(parameters)
        losses.append(float(loss))
        _, state, parameters = update(gradients, state, parameters, np.int32(step))
    assert losses[-1] < losses[0] - 0.02, losses


@pytest.mark.evidence(
    "every optimizer: eight devices make the updates of one, and each holds its share of the state"
)
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_make_the_same_updates_and_hold_a_share_each(name, mesh, tmp_path):
    """Also: what is saved and restored continues bit for bit."""
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 19), stable_gradients(name, shapes)
    one, _ = run(name, parameters, gradients, stable=True)

    def put(tree):
        return jax.device_put(tree, state_shardings(tree, shapes, mesh))

    eight, state = run(name, parameters, gradients, mesh=mesh, put=put, stable=True)
    same(eight, one, 1e-4)
    large = 2 * 16 * 16  # entries of a block's smallest matrices; whatever has that many is split
    for path, leaf in jax.tree.leaves_with_path(state):
        assert leaf.size < large or not leaf.sharding.is_fully_replicated, path_name(path)
    checkpoints = CheckpointStore(tmp_path)
    whole = TrainState(jnp.int32(5), put(parameters), state, jnp.int32(0), jnp.int32(0), {}, {}, {})
    checkpoints.save(5, whole, {})
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), whole)
    restored = checkpoints.restore(5, abstract)
    checkpoints.close()
    _, _, update = case(name, mesh=mesh, stable=True)
    arguments = put(gradients[0]), put(parameters), np.int32(3)
    jax.tree.map(
        np.testing.assert_array_equal,
        update(arguments[0], restored.opt_state, *arguments[1:]),
        update(arguments[0], state, *arguments[1:]),
    )


@pytest.mark.evidence("every optimizer: stacked layers are updated as separate ones would be")
@pytest.mark.parametrize("name", [n for n in NAMES if n not in WHOLE_TREE])
def test_stacked_layers_are_separate_layers(name):
    """Each of two stacked layers is updated as it would be alone."""
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 21), stable_gradients(name, shapes)
    together, _ = run(name, parameters, gradients, stable=True)

    def alone(tree, layer):
        return tree | {"blocks": jax.tree.map(lambda x: x[layer : layer + 1], tree["blocks"])}

    for layer in range(2):
        updates, _ = run(
            name, alone(parameters, layer), [alone(g, layer) for g in gradients], num_blocks=1, stable=True
        )
        same([alone(update, layer) for update in together], updates, 1e-4)


def choice(name: str, **changes):
    config = choose(defaults(), f"optimizer={name}", optimizer=optimizers.choices())
    config.update_from_flattened_dict({f"optimizer.{field}": value for field, value in changes.items()})
    return resolve(config, 257).optimizer


def test_a_file_of_ones_own_is_a_choice_like_others(own_file):
    assert choice("own.py", beta=0.5).beta == 0.5
    assert choice(str(own_file / "own.py")).name == str(own_file / "own.py")
    with pytest.raises(ConfigError, match=r"optimizer.beta=1.5 must lie in \[0, 1\)"):
        choice("own.py", beta=1.5)
    config = FrozenConfigDict(ConfigDict({**choice("own.py"), "gamma": 1}))
    with pytest.raises(ConfigError, match=r"own.py has the fields beta, learning_rate, name,.*not"):
        optimizers.build(config, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"bad.py raises ZeroDivisionError: division by zero \(line 1\)$"),
        ("def get_config(): pass", "bad.py has no function make"),
        ("make = get_config = lambda: None", "bad.py: get_config raises AttributeError"),
        ("make = 1\n\ndef get_config():\n  1 / 0", r"bad.py has no function make"),
        (OWN + "\ndef get_config():\n  1 / 0\n", r"get_config raises ZeroDivisionError: .* \(line \d+\)$"),
        (OWN.replace('"weight_decay": 0.0', ""), "bad.py: its get_config declares no weight_decay"),
    ],
)
def test_a_bad_file_is_one_line(source, message, own_file):
    (own_file / "bad.py").write_text(source)
    with pytest.raises(ConfigError, match=message) as error:
        choice("bad.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lion", "unknown optimizer 'lion'; did you mean optax.lion?"),
        ("elsewhere/own.py", "elsewhere/own.py: there is no such file in .*elsewhere"),
        ("optax.lyon", "optimizer=optax.lyon: optax of this version has no lyon"),
        ("optax.nowhere.adam", "optax.nowhere of this version has no adam"),
        ("optax.contrib", "optimizer=optax.contrib is not a function"),
        ("optax.polyak_sgd", "optax.polyak_sgd takes no learning_rate and is no scale_by_"),
        ("optax.lookahead", "optax.lookahead takes no learning_rate"),
        ("optax.scale_by_schedule", "optimizer=optax.scale_by_schedule needs step_size_fn"),
    ],
)
def test_what_cannot_be_an_optimizer(name, message):
    with pytest.raises(ConfigError, match=message):
        choice(name)


def test_an_optimizer_of_optax_that_needs_the_loss():
    with pytest.raises(ConfigError, match=r"optax.contrib.momo needs more than gradients and .*'value'"):
        build("optax.contrib.momo", {})


def test_a_check_touches_no_device():
    """For any optimizer: JAX gets a platform that does not exist, and would fail if it began with one."""
    code = """
import jax, tiny
from trainit import optimizers
from trainit.config import resolve
for name in (*optimizers.choices(), "optax.lion", "schedule_free+cautious+sgdm", "mechanic+sam+adamw"):
    config = tiny.get_config(f"optimizer={name}")
    config.parameter_groups = ("head/.* optimizer=muon",) if name == "adamw" else ()
    optimizers.check(resolve(config, 257))
try:
    jax.devices()
except RuntimeError:
    print("checked")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "checked\n"


def test_a_check_looks_at_the_state(own_file):
    (own_file / "keyed.py").write_text(
        OWN
        + """
import jax
def make(config, context):
    return optax.GradientTransformation(lambda p: {"key": jax.random.key(0)}, lambda g, s, p=None: (g, s))
"""
    )
    config = tiny.get_config("optimizer=keyed.py")
    with pytest.raises(
        ConfigError, match=r"keyed.py: its state has key of type key<fry>, which no checkpoint"
    ):
        optimizers.check(resolve(config, 257))


def test_a_changed_file_is_read_again(own_file):
    file = own_file / "changing.py"
    for default in (0.25, 0.75):
        file.write_text(OWN.replace("0.9", str(default)))
        os.utime(file, ns=(int(default * 1e9), int(default * 1e9)))
        assert choice("changing.py").beta == default


def test_optax_fields_are_parameters_with_simple_defaults():
    config = choice("optax.contrib.prodigy", betas=(0.8, 0.99))
    assert config.betas == (0.8, 0.99)
    assert config.learning_rate == 1.0
    assert set(choice("optax.lion")) == {"name", "learning_rate", "weight_decay", "b1", "b2"}
    assert choice("optax.lion").weight_decay == 1e-3
    assert choice("optax.sgd").weight_decay == 0.0
    assert choice("optax.rmsprop", eps_in_sqrt=False).eps_in_sqrt is False
    assert choice("optax.adamw").eps_root == 0
