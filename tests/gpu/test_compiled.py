"""The step as XLA compiles it for GPUs, with JAX's CUDA plugin, without a GPU.

Memory, kernels, exchanges, flags. Needs the extra `plan`; for .ci/run.
"""

import functools
import os

import pytest
import tiny

from trainit import config as config_lib
from trainit import optimizers
from trainit.cluster.xla_flags import SETTINGS
from trainit.config import MESH_AXES, Config
from trainit.experiments.plan import gpu
from trainit.experiments.plan.plan import Plan, plan
from trainit.experiments.plan.schedule import Schedule
from trainit.experiments.plan.targets import TARGETS

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
GIB = 2**30


def gpt2(mesh: dict, rows: int) -> Config:
    """GPT-2 124M, with its head tied to the embedding, as a run has it by default."""
    config = config_lib.defaults()
    config.optimizer, config.batch_size = optimizers.choices()["adamw"](), rows
    config.model = config_lib.MODELS["gpt2"]()
    config.model.tied_embeddings = True
    config.mesh.update(**dict.fromkeys(MESH_AXES, 1) | mesh)
    return config_lib.resolve(config, 50304)


@functools.cache
def one_h100() -> Plan:
    return plan(gpt2({}, 16), 1, "H100", 0.6, "GPU", ENVIRONMENT)


@functools.cache
def two_hosts() -> Plan:
    return plan(gpt2({"data": 2, "fsdp": 8}, 256), 16, "H100", 0.6, "GPU", ENVIRONMENT)


@pytest.mark.evidence("GPT-2 124M's step, compiled for an H100, takes no more memory or kernels than before")
def test_memory_and_kernels_do_not_rise():
    """Two percent above 5.48 GiB and 965, with an untied head; lower them when the step gets better."""
    found = one_h100()
    assert found.program.assigned / GIB <= 5.6
    assert found.schedule.total.runs <= 985
    assert found.program.attention == "cudnn"


def test_documents_keep_the_fast_kernel():
    """At most two percent more time than without documents, and hardly more kernels."""
    config = gpt2({}, 16)
    model = {**config.model.to_dict(), "document_mask": True, "end_of_text": 50256}
    found = plan(Config({**config.to_dict(), "model": model}), 1, "H100", 0.6, "GPU", ENVIRONMENT)
    assert found.program.attention == "cudnn" and "fmhaScaleBiasSoftmaxBackward" in found.program.scheduled
    assert found.schedule.seconds < 1.02 * one_h100().schedule.seconds
    assert found.schedule.total.runs <= one_h100().schedule.total.runs + 10


def test_operations_are_those_of_the_model():
    """Six for each weight and token, 7 causal products of attention; none twice, but chunks are padded."""
    tokens, layers, dim, vocabulary, length = 16 * 1024, 12, 768, 50304, 1024
    weights = 6 * tokens * (layers * 12 * dim**2 + dim * vocabulary)
    attention = 7 * layers * tokens * length * dim
    assert one_h100().schedule.total.flops == pytest.approx(weights + attention, rel=0.01)


def test_memory_is_that_of_the_state_and_more():
    """12 bytes of a parameter, split eight ways except for vectors; the rest grows by what is under way.

    That is kernels which are whole, and gradients before and after their sum.
    """
    assert one_h100().state == pytest.approx(12 * one_h100().parameters, rel=1e-4)
    assert two_hosts().state == pytest.approx(12 * two_hosts().parameters / 8, rel=0.01)
    under_way = two_hosts().temporaries - one_h100().temporaries
    assert one_h100().temporaries > 0 and under_way < 12 * one_h100().parameters


def by_kind(collectives) -> dict:
    sums = {}
    for one in collectives:
        if one.size > 1024:
            sums[one.kind, one.axes] = sums.get((one.kind, one.axes), 0.0) + one.bytes
    return sums


@pytest.mark.evidence("what the step compiled for H100s exchanges equals the formula, by kind and axes")
def test_exchanges_equal_the_formula():
    found = two_hosts()
    compiled, planned = by_kind(found.compiled), by_kind(found.predicted)
    assert compiled == pytest.approx(planned, rel=1e-3)
    # In the schedule they are joined, and no others have been added; those of scalars are apart.
    kinds = {what for what in found.schedule.busy if not what.endswith("of scalars")}
    assert kinds == {f"{kind} over {' × '.join(axes)}" for kind, axes in planned}
    assert sum(found.schedule.exposed.values()) < sum(found.schedule.busy.values())


@pytest.mark.evidence("the CUDA plugin knows all flags of XLA that Trainit sets")
def test_no_flag_is_unknown():
    """Of ours, on any device: all are given at once, and one more that does not exist."""
    config = tiny.get_config()
    config.mesh.update(**dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "tensor": 2})
    config.model.update(remat="dots", attn_dropout=0.0)
    config.update(precision="bfloat16", device_batch_size=0)
    config = config_lib.resolve(config, 1024)
    ours = {setting.name: f"{setting.name}={setting.value}" for setting in SETTINGS if "--" in setting.name}
    flags = " ".join([*ours.values(), "--xla_gpu_no_such_flag=true"])
    program = gpu.compile_for(config, 4, "B200", ENVIRONMENT | {"XLA_FLAGS": flags})
    assert program.unknown == ["--xla_gpu_no_such_flag=true"]
    schedule = Schedule(program.scheduled, {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}, TARGETS["B200"])
    assert schedule.seconds > 0 and any("tensor" in what for what in schedule.busy)


def test_what_the_cards_cannot_do_is_said():
    config = gpt2({"data": 12}, 12)
    with pytest.raises(config_lib.ConfigError, match="--devices=12: machines have 8 GPUs"):
        gpu.compile_for(config, 12, "H100", ENVIRONMENT)
