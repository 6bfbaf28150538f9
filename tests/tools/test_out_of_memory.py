"""What a run reports when memory has run out, against what XLA and NumPy know of the program."""

import math
import re

import jax
import numpy as np
import pytest
import tiny
from jax.errors import JaxRuntimeError

from trainit.config import resolve
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.parallel.trees import device_bytes
from trainit.tools import out_of_memory
from trainit.train import step

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.fixture(scope="module")
def program():
    config = tiny.get_config()
    config.model.vocab_size = 4096  # the largest arrays are of the head
    config = resolve(config, 257)
    mesh = make_mesh(SIZES)
    steps = step.build(config, shape_on(config, mesh))
    batch = {"tokens": np.zeros((2, 8, 33), np.uint16), "lengths": np.full((2, 8), 32, np.int32)}
    layout = batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=layout) for k, v in batch.items()}
    return config, steps.abstract_state, steps.train.lower(steps.abstract_state, batch).compile()


def test_temporaries_fill_the_memory_that_xla_assigns(program):
    """No two of them overlap, each is there by its name, and together they are all that XLA assigns."""
    _, _, train = program
    found, total = out_of_memory.temporaries(train), train.memory_analysis().temp_size_in_bytes
    taken = np.zeros(total, bool)
    for each in found:
        assert not taken[each.offset : each.offset + each.size].any()
        taken[each.offset : each.offset + each.size] = True
    assert [each.size for each in found] == sorted((each.size for each in found), reverse=True)
    assert taken.mean() > 0.9
    text = train.as_text()
    assert all(f"%{each.instruction} = " in text for each in found)
    assert any("(head)" in each.scope for each in found[:8])


@pytest.mark.evidence("out of memory, a run reports which arrays and temporaries fill it, and what to change")
def test_one_screen(program, monkeypatch, caplog):
    config, state, train = program
    monkeypatch.setattr(out_of_memory, "PROGRAMS", {"train": train})
    out_of_memory.explain(JaxRuntimeError("INTERNAL: something else"), config)
    assert not caplog.text
    out_of_memory.explain(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), config)
    (message,) = caplog.messages
    lines = message.splitlines()
    assert len(lines) <= 24

    held, params = re.search(r"([\d.e-]+)  held: .*params ([\d.e-]+)", message).groups()
    memory = train.memory_analysis()
    assert held == f"{memory.argument_size_in_bytes / 2**30:.3g}"
    assert params == f"{device_bytes(state.params) / 2**30:.3g}"
    assert f"{memory.temp_size_in_bytes / 2**30:.3g}  temporaries of program train" in message
    # Each is called by its path and its share of the array on a device.
    arrays = re.findall(r"([\d.e-]+)  (\S+/\S+)  (\w+)\[([\d,]+)\]$", message, re.MULTILINE)
    assert len(arrays) == 5
    assert ("params/head/kernel", "float32", "16,2048") in [array[1:] for array in arrays]
    for size, _, kind, dims in arrays:
        assert size == f"{np.dtype(kind).itemsize * math.prod(map(int, dims.split(','))) / 2**30:.3g}"
    assert re.search(r"change: logits_mib=256.0 .*; device_batch_size=2 .*; mesh.fsdp=2", lines[-1])


def test_what_helps_most_comes_first():
    config = resolve(tiny.get_config(), 257)

    def first(*about) -> str:
        return out_of_memory.remedies(config, *about)[0].split("=")[0]

    assert first(9, 1, "head") == "mesh.fsdp"
    assert first(1, 9, "head") == "logits_mib"
    assert first(1, 9, "mlp") == "device_batch_size"
