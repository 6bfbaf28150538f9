"""Parameters with an optimizer, a rate and a decay of their own: against each optimizer alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from optimizer_cases import RATES, by_path, draw, draw_gradients, run, some_shapes

from trainit import optimizers
from trainit.config import ConfigError, defaults, flatten, resolve
from trainit.parallel.layout import state_shardings
from trainit.parallel.mesh import make_mesh
from trainit.parallel.trees import path_name

PEAK = 0.5


def build(name: str, groups=(), **changes):
    """Alone or with groups; RATES are those of the peak."""
    config = optimizers.choices()[name]()
    config.update({"learning_rate": PEAK} | changes)
    context = optimizers.Context(
        schedule=lambda step: jnp.asarray(RATES, jnp.float32)[step] * config.learning_rate / PEAK,
        steps=len(RATES),
        parameters=some_shapes(),
        weight_decay=config.weight_decay,
        clip_norm=40.0,
        key=jax.random.key(0),
    )
    return optimizers.build(FrozenConfigDict(config), context, groups)


def test_each_group_has_the_updates_of_its_optimizer():
    """Muon for the blocks' matrices, another rate and no decay for the embedding, AdamW for the rest."""
    groups = (
        "blocks/.*/kernel optimizer=muon learning_rate=0.2 momentum=0.7 ns_precision=float32",
        ".*(embedding|kernel) learning_rate=0.1 weight_decay=0",  # the head's kernel too, not the blocks'
        "head/.* beta1=0.5",
    )
    parameters, gradients = draw(some_shapes(), 41), draw_gradients(some_shapes())
    got = run(build("adamw", groups, weight_decay=0.3), parameters, gradients)
    alone = {
        "muon": build("muon", learning_rate=0.2, momentum=0.7, ns_precision="float32"),
        "embedding": build("adamw", learning_rate=0.1, weight_decay=0.0),
        "head/bias": build("adamw", beta1=0.5, weight_decay=0.3),
        "rest": build("adamw", weight_decay=0.3),
    }
    alone = {name: run(optimizer, parameters, gradients) for name, optimizer in alone.items()}
    for number, update in enumerate(map(by_path, got)):
        for path, value in update.items():
            if path.startswith("blocks/") and path.endswith("kernel"):
                name = "muon"
            elif path.endswith(("embedding", "kernel")):
                name = "embedding"
            else:
                name = "head/bias" if path == "head/bias" else "rest"
            want = by_path(alone[name][number])[path]
            np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=path)


OF_ANOTHER_FIELD = """
import optax
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"learning_rate": 0.5, "weight_decay": 0.3, "late_weight_decay": 0.0})
def make(config, context):
    return context.descend(optax.identity())
"""


def test_a_group_of_vectors_decays_if_its_line_says_so(tmp_path):
    """Without gradients, all that plain descent does is to decay."""
    parameters = draw(some_shapes(), 41)
    none = jax.tree.map(jnp.zeros_like, parameters)
    (tmp_path / "own.py").write_text(OF_ANOTHER_FIELD)
    other = f"optimizer={tmp_path}/own.py late_weight_decay=0.1"
    for settings, factor in (("weight_decay=0.1", 0.1), ("momentum=0", 0.0), (other, 0.0)):
        optimizer = build("sgdm", (f".*/(bias|scale) {settings}",), momentum=0.0, weight_decay=0.3)
        update = by_path(optimizer.update(none, optimizer.init(parameters), parameters, step=1)[0])
        for path, value in by_path(parameters).items():
            decay = factor if path.endswith(("bias", "scale")) else 0.3
            np.testing.assert_allclose(update[path], -RATES[1] * decay * value, rtol=1e-6, err_msg=path)


def test_state_is_laid_out_as_the_parameters():
    optimizer = build("adamw", ("head/.* optimizer=sgdm",))
    state = jax.eval_shape(optimizer.init, some_shapes())
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    layouts = state_shardings(state, some_shapes(), mesh)
    names = [
        path_name(path)
        for path, layout in jax.tree.leaves_with_path(layouts)
        if layout.spec and any(layout.spec)
    ]
    assert sum(name.endswith("head/kernel") for name in names) == 1
    assert sum(name.endswith("query/kernel") for name in names) == 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("head/.*",), "'head/.*' must be a pattern and settings"),
        (("head/.* optimizer=adamv",), "unknown optimizer 'adamv': there are ada_ftrl, adafactor, "),
        (("head/.* momentum=0.5",), "adamw has no field 'momentum', but beta1, beta2, eps"),
        (("head/.* beta1=1.5",), r"'head/.* beta1=1.5': optimizer.beta1=1.5 must lie in \[0, 1\)"),
        (("head/.* beta1=high",), "beta1=high cannot be set"),
        (("head/.* weight_decay=-1",), "optimizer.weight_decay=-1.0 must not be below 0"),
        (("(head beta1=0.5",), "is no regular expression"),
        (("tail/.* beta1=0.5",), "no parameter is left for 'tail/.*'; paths are blocks/attention/"),
        (("head/.* beta1=0.5", "head/bias beta1=0.4"), "no parameter is left for 'head/bias'"),
    ],
)
def test_bad_groups_are_one_line(groups, message):
    with pytest.raises(ConfigError, match=message) as error:
        build("adamw", groups)
    assert "\n" not in str(error.value)


def test_groups_survive_json():
    config = defaults()
    config.optimizer = optimizers.choices()["adamw"]()
    config.parameter_groups = ("head/.* beta1=0.5", "blocks/.* weight_decay=0")
    resolved = resolve(config, 257)
    assert flatten(json.loads(json.dumps(resolved.to_dict()))) == flatten(resolved)
