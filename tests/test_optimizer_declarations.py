"""What optimizers declare of their updates (NEEDS, ELEMENTWISE) is what tracing finds in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tiny
from ml_collections import FrozenConfigDict
from optimizer_cases import draw, some_shapes

from trainit import optimizers
from trainit.config import ConfigError, resolve

WRAPPERS = (
    *("cautious", "cautious_decay", "ema_nesterov", "mechanic", "offset", "sam", "schedule_free", "sphere"),
)
NAMES = [*sorted(optimizers.choices()), *(f"{wrapper}+adamw" for wrapper in WRAPPERS)]
# Fields on which a declaration depends, and combinations.
CHANGED = {
    "mars": {"exact": True},
    "sophia": {"estimator": "gnb"},
    "sam+sophia": {"estimator": "gnb"},
    "cautious+sam+mars": {},
    "sam+muon": {},
    "schedule_free+optax.lion": {},
    "cautious+optax.contrib.prodigy": {},
}
OWN = """
import jax, optax
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"learning_rate": 1e-3, "weight_decay": 0.0})

def make(config, context):
    def update(gradients, state, params, *, gradient_at, **extra_args):
        return gradient_at(jax.tree.map(lambda x: 2 * x, params)), state

    return context.descend(optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
"""


def build(name: str, changes=None, groups=(), state: str = "float32", mesh=None):
    config = optimizers.choices()[name]()
    config.update(changes or {})
    context = optimizers.Context(
        schedule=lambda step: 0.1,
        steps=9,
        parameters=some_shapes(),
        weight_decay=0.1,
        clip_norm=1.0,
        key=jax.random.key_data(jax.random.key(0)),
        mesh=mesh,
    )
    return optimizers.build(FrozenConfigDict(config), context, groups, state)


def trace(optimizer) -> tuple[set[str], bool]:
    """Which gradients an update asks for when it is given all, and whether it has no matrix products."""
    asked = set()

    def gradient_at(params):
        asked.add("gradient_at")
        return params

    def sampled_gradient_at(params, key):
        asked.add("sampled_gradient_at")
        return params, jnp.float32(1)

    def update(gradients, state, params):
        given = {"gradient_at": gradient_at, "sampled_gradient_at": sampled_gradient_at}
        return optimizer.update(gradients, state, params, step=jnp.int32(1), **given)

    shapes = some_shapes()
    program = jax.make_jaxpr(update)(shapes, jax.eval_shape(optimizer.init, shapes), shapes)
    return asked, "dot_general" not in str(program)


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in NAMES), *CHANGED.items()], ids=str)
def test_an_optimizer_declares_what_tracing_finds(name, changes, state):
    optimizer = build(name, changes, state=state)
    assert (set(optimizer.needs), optimizer.elementwise) == trace(optimizer)


def test_those_of_optax_are_elementwise_but_for_some():
    """Every function of optax that a config can name."""
    modules = {"optax": optax, "optax.contrib": optax.contrib}
    names = [f"{name}.{function}" for name, module in modules.items() for function in dir(module)]
    traced = 0
    for name in names:
        try:
            optimizer = build(name)
        except (ConfigError, TypeError, ValueError, AttributeError):
            continue  # it cannot be an optimizer, or needs what a config cannot give
        assert (set(optimizer.needs), optimizer.elementwise) == trace(optimizer), name
        traced += 1
    assert traced > 40


def test_a_run_s_optimizer_joins_its_groups_declarations():
    groups = ("blocks/.*/kernel optimizer=muon",)
    assert not build("adamw", groups=groups).elementwise
    assert not build("muon", groups=(".*/bias optimizer=adamw",)).elementwise
    joined = build("adamw", groups=(".*/bias optimizer=sgdm",))
    assert joined.elementwise and trace(joined) == (set(), True)
    joined = build("adamw", groups=(".* optimizer=sam+sgdm",))
    assert joined.needs == {"gradient_at"} == trace(joined)[0]


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A file of the user's that takes a gradient elsewhere; its source is the argument."""
    monkeypatch.chdir(tmp_path)

    def write(source: str):
        (tmp_path / "own.py").write_text(source)
        return functools.partial(resolve, tiny.get_config("optimizer=own.py"), 257)

    return write


def test_a_gradient_that_is_not_declared_is_an_error(own_file):
    """At once, before a device is touched, and also where the update is traced without a check."""
    config = own_file(OWN)()
    message = r"optimizer=own.py calls gradient_at but does not declare it: add NEEDS = {'gradient_at'}"
    with pytest.raises(ConfigError, match=message):
        optimizers.check(config)
    with pytest.raises(ConfigError, match=message):
        trace(build("own.py"))
    assert build("sam+own.py").needs == {"gradient_at"}  # which sam declares
    with pytest.raises(ConfigError, match=message.replace("own.py", r"cautious\+own.py", 1)):
        trace(build("cautious+own.py"))


def test_a_file_of_ones_own_declares(own_file):
    config = own_file(OWN + "\nNEEDS = {'gradient_at'}\n")()
    optimizers.check(config)
    optimizer = build("own.py")
    assert optimizer.needs == {"gradient_at"}
    assert not optimizer.elementwise  # costs memory at most, where it could have been
    params = draw(some_shapes(), 3)
    updates, _ = optimizer.update(
        params, optimizer.init(params), params, step=jnp.int32(1), gradient_at=lambda params: params
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(updates)) > 0
    assert build("schedule_free+own.py").needs == {"gradient_at"}


def test_a_gradient_that_no_step_can_give(own_file):
    config = own_file(OWN + "\nNEEDS = {'hessian_at'}\n")()
    with pytest.raises(ConfigError, match=r"own.py: NEEDS has hessian_at; a step can give gradient_at and"):
        optimizers.check(config)
