"""RunShape: what follows from a config and its devices."""

from dataclasses import FrozenInstanceError

import jax
import pytest
import tiny

from trainit import config as config_lib
from trainit.parallel.mesh import BatchShape, abstract_mesh, make_mesh, run_shape, shape_on


def tiny_config(**changes):
    config = tiny.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config_lib.resolve(config, 257)


def test_a_run_shape_follows_from_config_and_devices():
    config = tiny_config(batch_schedule="10: 32; 20: 8", logits_mib=0.2)
    shape = run_shape(config, jax.devices())
    assert shape.mesh == make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    assert shape.sizes == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert shape.shares == 4
    assert shape.attention == "blockwise"
    assert shape.logits_chunk == 64  # 2 rows of 32 positions: 0.2 MiB hold more
    assert shape.batch_at(0) == shape.batch_at(9) == BatchShape(2, 8, 32)
    assert shape.batch_at(10) == shape.batch_at(19) == BatchShape(4, 8, 32)
    assert shape.batch_at(20) == shape.batch_of(8) == BatchShape(1, 8, 32)
    assert shape.accumulates_locally(2) and not shape.accumulates_locally(1)


def test_equal_configs_and_devices_have_one_run_shape():
    shape, again = (run_shape(tiny_config(), jax.devices()) for _ in range(2))
    assert shape == again and hash(shape) == hash(again)
    with pytest.raises(FrozenInstanceError):
        shape.attention = "plain"


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({}, {"data": 1, "fsdp": 4, "tensor": 2}),
        ({"precision_of__mlp": "float8"}, {"data": 2, "fsdp": 2, "tensor": 2}),
        (
            {"diagnostics__every_steps": 5, "diagnostics__noise_scale": True},
            {"data": 8, "fsdp": 1, "tensor": 1},
        ),
    ],
    ids=["one replica", "float8", "noise scale"],
)
def test_gradients_that_must_be_summed_in_each_micro_step(changes, sizes):
    mesh = abstract_mesh(sizes | {"context": 1})
    assert not shape_on(tiny_config(**changes), mesh).accumulates_locally(4)


def test_a_mesh_that_does_not_fit_is_refused_or_shrunk():
    config = tiny_config(mesh__tensor=4)
    with pytest.raises(config_lib.ConfigError, match=r"covers 16 devices, but there are 8"):
        run_shape(config, jax.devices())
    shrunk = run_shape(tiny_config(), jax.devices()[:1], shrink_to_fit=True)
    assert shrunk.sizes == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    assert shrunk.batch_at(0) == BatchShape(8, 2, 32)


def test_an_attention_kernel_that_the_devices_lack_is_refused():
    config = tiny_config(model__attention="cudnn", model__attn_dropout=0.0)
    with pytest.raises(config_lib.ConfigError, match=r"model\.attention=cudnn needs an NVIDIA GPU"):
        run_shape(config, jax.devices())
