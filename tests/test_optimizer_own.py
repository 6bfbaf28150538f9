"""Optimizers in files of the user's: what their updates are given, and what is reported when they fail."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from optimizer_cases import build, draw, some_shapes

from trainit import optimizers
from trainit.config import ConfigError, resolve
from trainit.model.gpt import GPT
from trainit.parallel.trees import path_name

FILE = """
import jax, jax.numpy as jnp, optax
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"learning_rate": 0.5, "weight_decay": 0.0})

def make(config, context):
    def init(params):
        return {"mean": jax.tree.map(jnp.zeros_like, params), "count": jnp.int32(0)}

    def update(gradients, state, params, step):
        return jax.tree.map(lambda g: g * (3 + step), gradients), state

    return RETURNED
"""
DESCEND = "context.descend(optax.GradientTransformation(init, update))"
ALONE = "optax.GradientTransformation(init, update)"
CHAIN = f"context.chain(context.clip(), {ALONE}, optax.scale(-2.0))"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes own.py from FILE with changes, pairs of old and new text, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(*changes: tuple[str, str]) -> str:
        source = FILE
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / "own.py").write_text(source)
        return source

    return write


def check(**changes):
    config = tiny.get_config("optimizer=own.py")
    config.update(changes)
    optimizers.check(resolve(config, 257))


@pytest.mark.parametrize(
    ("returned", "name", "factor"),
    [
        (DESCEND, "own.py", -0.1 * 7),
        (ALONE, "own.py", 7),
        (CHAIN, "own.py", -2 * 7),
        (CHAIN, "sam+own.py", -2 * 7),
    ],
)
def test_an_update_that_names_the_step_is_given_it(returned, name, factor, own):
    """At step 4, FILE multiplies by 3 + 4 and the rate is 0.1; the gradient is the same everywhere."""
    own(("RETURNED", returned))
    optimizer = build(name, {})
    params, gradients = draw(some_shapes(), 1), draw(some_shapes(), 2)
    further = {"gradient_at": lambda params: gradients}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params, step=jnp.int32(4), **further)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, factor * g, rtol=1e-5), updates, gradients)


def test_groups_give_the_step_too(own):
    own(("RETURNED", DESCEND))
    check(parameter_groups=("head/.* learning_rate=0.1", ".*/bias optimizer=sgdm"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # The sum of a bias (heads, size) and two ones fails first; parameters are taken in sorted order.
        ("g * (3 + step)", "g + jnp.ones(5)", "ValueError: Incompatible shapes for broadcasting: .*"),
        ("g * (3 + step)", "jnp.dot(g, jnp.ones(5))", "TypeError: dot_general requires contracting .*"),
        ("g * (3 + step)", "g.reshape(3, -1)", "TypeError: cannot reshape array of shape .*"),
        (
            "lambda g: g * (3 + step), gradients",
            "lambda g, m: g @ m[0, 0, 0, 0, 0], gradients, state['mean']",
            ".*",
        ),
    ],
)
@pytest.mark.parametrize("name", ["own.py", "cautious+own.py"])
def test_an_error_of_jax_names_file_line_and_parameter(old, new, message, name, own):
    source = own(("RETURNED", DESCEND), (old, new))
    line = next(number for number, text in enumerate(source.splitlines(), 1) if new in text)
    config = resolve(tiny.get_config(f"optimizer={name}"), 257)
    with pytest.raises(ConfigError) as raised:
        optimizers.check(config)
    text = str(raised.value)
    first = r"blocks/attention/key/bias"
    assert re.fullmatch(
        rf"optimizer=own.py raises {message} \(line {line}\) at the parameter {first}", text
    ), text
    assert len(text) < 700 and "\n" not in text


def test_the_parameter_is_that_of_the_failing_leaf(own):
    """A function of the file that a loop calls fails for some parameters, not for the first one."""
    loop = """
        leaves, structure = jax.tree.flatten(gradients)
        return structure.unflatten([one(g) for g in leaves]), state
"""
    one = "def one(g):\n    return g if g.shape[0] != 257 and g.ndim != 2 else g @ jnp.ones(3)\n\ndef make("
    own(
        ("RETURNED", ALONE),
        ("def make(", one),
        ("        return jax.tree.map(lambda g: g * (3 + step), gradients), state", loop),
    )
    params = GPT(resolve(tiny.get_config(), 257).model).shapes
    leaves = [(path_name(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)]
    expected = next(name for name, shape in leaves if shape[0] == 257 or len(shape) == 2)
    assert expected != leaves[0][0]
    with pytest.raises(ConfigError) as raised:
        check()
    assert str(raised.value).endswith(f"(line 9) at the parameter {expected}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "g * (3 + step)",
            "g[:1]",
            r"returns update/blocks/attention/key/bias as float32\[1, .*, which was float32\[2, ",
        ),
        (
            ", gradients), state",
            ", gradients), state | {'count': 1.0}",
            r"returns state/count as float32\[\], which was int32\[\]",
        ),
        (
            ", gradients), state",
            ", gradients), {'count': state['count']}",
            r"state/mean/blocks/attention/key/bias as nothing, which was float32",
        ),
        (", gradients), state", ", gradients)", "raises "),
        ("return ALONE", "ALONE", "make returns a NoneType, not an optax transformation"),
        (
            "def init(params):",
            "def init(params):\n        1 / 0",
            r"raises ZeroDivisionError: division by zero \(line 10\)$",
        ),
        (
            "def make(config, context):",
            "def make(config, context):\n    config.beta",
            r"raises AttributeError: .*beta.* \(line 9\)$",
        ),
    ],
    ids=str,
)
def test_what_an_update_may_not_return(old, new, message, own):
    own((old.replace("ALONE", "RETURNED"), new.replace("ALONE", "RETURNED")), ("RETURNED", ALONE))
    with pytest.raises(ConfigError, match=r"^optimizer=own\.py") as raised:
        check()
    assert re.search(message, str(raised.value))


def test_updates_may_have_another_type(own):
    """Optax casts them to that of the parameters."""
    own(("RETURNED", ALONE), ("g * (3 + step)", "g.astype(jnp.bfloat16)"))
    check()
