"""Products of a step: what is measured is what the step computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainit import optimizers
from trainit.config import MESH_AXES, Config, defaults, model, resolve
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.tools.benchmark import products
from trainit.train.automatic import choice
from trainit.train.reports import metrics

SIZES = dict.fromkeys(MESH_AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}


def settled(**changes) -> Config:
    config = defaults()
    config.update(batch_size=16, device_batch_size=2, logits_mib=0.1, precision="float32", **changes)
    config.mesh.update(SIZES)
    sizes = {"dim": 48, "num_heads": 4, "num_kv_heads": 2, "num_blocks": 3, "context_length": 128}
    config.model = model(**sizes, vocab_size=512, activation="swiglu", head_dim=16)
    config.optimizer = optimizers.choices()["adamw"]()
    return choice.settle(resolve(config, 500), SIZES, "cpu", 1e12)[0]


@pytest.mark.parametrize("form", products.FORMS)
def test_forms_equal_numpy(form):
    draw = np.random.default_rng(0)
    x, k, dy = (draw.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (3, 4), (5, 4)))
    expected = {"x k": x @ k, "dy kᵀ": dy @ k.T}.get(form, x.T @ dy)
    arrays = {"x": x, "k": k, "dy": dy}
    left, right = (jnp.asarray(arrays[name]) for name in products.FORMS[form][:2])
    np.testing.assert_allclose(
        products.multiply(form, left, right, "float32"), expected, rtol=1e-5, atol=1e-6
    )
    assert products.multiply(form, left, right, "bfloat16").dtype == jnp.bfloat16


def test_all_products_of_a_step_are_there():
    """On a mesh, with micro-steps and chunks of logits: all FLOPs that count, except for attention's."""
    config = settled()
    shape = shape_on(config, make_mesh(SIZES, jax.devices()))
    found = products.of_step(config, shape)
    operations = sum(3 * 2 * np.prod(p.sizes) * p.times for p in found)
    tokens, m = 16 * 128, config.model
    attention = 12 * m.num_blocks * m.context_length * m.num_heads * m.head_dim
    assert operations * 8 == pytest.approx((metrics.flops_per_token(m) - attention) * tokens)
    assert {p.name: p.sizes for p in found} == {
        "queries": (256, 48, 32),
        "keys, values": (256, 48, 16),
        "attention": (256, 32, 48),
        "MLP": (256, 48, m.mlp_dim // 2),
        "MLP, second": (256, m.mlp_dim // 2, 48),
        "head": (128, 48, 256),
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_summed_up(precision, monkeypatch):
    """At 2 TFLOP/s for the forms that the step has on CPUs, and at 4 in the others."""
    last = (256, 32, 48)

    def rate(sizes, form, dtype, result, rounds):
        turned = form == "(dyᵀ x)ᵀ"
        wrong = turned != (precision == "float32" and sizes[2] == 48) and form in products.GRADIENTS
        return 4e12 if wrong or (dtype, result) != (precision, "float32") else 2e12

    monkeypatch.setattr(products, "rate", rate)
    config = settled()
    config = Config({**config.to_dict(), "precision": precision})
    *lines, total = products.measure(config, 3)
    operations = 6 * sum(np.prod(p.sizes) * p.times for p in products.of_step(config, shape_of(config)))
    assert total.startswith(f"{1e3 * operations / 2e12:.1f} ms for a step's products")
    starred = [line for line in lines if re.match(rf"attention +{' × '.join(map(str, last))} .*\*", line)]
    assert len(starred) == 3
    gradient = "(dyᵀ x)ᵀ" if precision == "float32" else "xᵀ dy"
    assert sum(gradient in line for line in starred) == 1


def shape_of(config):
    return shape_on(config, make_mesh(SIZES, jax.devices()))


def test_a_rate_is_measured():
    assert 1e6 < products.rate((64, 32, 16), "xᵀ dy", "bfloat16", "float32", 1) < 1e16
