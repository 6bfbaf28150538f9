"""Configs: groups, filling, checks that name fields and values, meshes, durations."""

import copy
import math
import operator
import pickle
import re

import numpy as np
import pytest

from trainit import config as config_lib
from trainit import optimizers
from trainit.config import (
    Config,
    ConfigDict,
    ConfigError,
    check_fields,
    choose,
    defaults,
    field,
    flatten,
    layers_with_window,
    of_this_version,
    resolve,
    walk,
)
from trainit.config.schema import DURATION
from trainit.parallel.mesh import abstract_mesh, mesh_sizes, shape_on


def make(arg="", **changes):
    config = defaults()
    config.optimizer = optimizers.choices()["adamw"]()
    choose(config, arg, optimizer=optimizers.choices())
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def test_groups_replace_whole_parts():
    config = make("model=gpt2_medium,optimizer=sgdm,schedule=cosine,dataset=demo")
    assert (config.model.dim, config.model.num_heads, config.model.num_blocks) == (1024, 16, 24)
    assert config.optimizer.name == "sgdm"
    assert "beta1" not in config.optimizer
    assert config.schedule.name == "cosine"
    assert config.dataset.path == "demo"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("modle=gpt2", "unknown group 'modle=gpt2'.*dataset, diagnostics, model, optimizer, schedule"),
        ("model", "unknown group 'model': write GROUP=CHOICE"),
        ("model=gpt9", "unknown model 'gpt9': there are gemma2_2b, gemma2_9b, gpt2, "),
        ("optimizer=adamv", "unknown optimizer 'adamv': there are ada_ftrl, adafactor, "),
    ],
)
def test_unknown_groups_and_choices_list_what_there_is(arg, message):
    with pytest.raises(ConfigError, match=message):
        make(arg)


def test_resolve_fills_what_follows():
    config = resolve(make(), 50257)
    assert config.model.vocab_size == 50304
    assert config.model.mlp_dim == 3072
    assert config.model.num_kv_heads == 12
    assert config.model.head_dim == 64
    swiglu = resolve(make(model__activation="swiglu"), 50257)
    assert swiglu.model.mlp_dim == 2048  # 8/3 * 768, a multiple of 64
    assert resolve(make(model__vocab_size=60000), 50257).model.vocab_size == 60000
    with pytest.raises(AttributeError):
        config.steps = 3


def test_a_config_of_an_earlier_version_has_the_fields_since():
    config = resolve(make(), 50257).to_dict()
    since = {"head_dim", "norm_epsilon", "parallel_residual", "rope_interleaved", "rotary_fraction"}
    since |= {"rope_scaling", "qkv_bias", "init_std", "window", "window_layers", "attention_scale"}
    since |= {"attention_softcap", "norm_placement", "norm_unit_offset", "qk_norm_over_heads"}
    since |= {"embedding_scale"}
    model = {name: value for name, value in config["model"].items() if name not in since}
    assert len(model) == len(config["model"]) - len(since)
    assert of_this_version({**config, "model": model}) == config
    del config["spikes"]
    del config["diagnostics"]["histograms"]
    later = of_this_version(config)
    assert (later["spikes"], later["diagnostics"]["histograms"]) == (defaults().spikes.to_dict(), "")


@pytest.mark.parametrize(
    ("text", "layers"),
    [(":", [0, 1, 2, 3, 4]), ("::2", [0, 2, 4]), ("3:", [3, 4]), ("0, -1", [0, 4]), ("1:3,4", [1, 2, 4])],
)
def test_layers_with_window(text, layers):
    model = resolve(make(model__num_blocks=5, model__window=3, model__window_layers=text), 50257).model
    assert [i for i, has in enumerate(layers_with_window(model)) if has] == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0 must lie in \(0, 2147483648\)"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 4294967296\)"),
        ({"precision": "float8"}, "precision='float8' is none of 'bfloat16', 'float16', 'float32'"),
        ({"precision_of.head": "float8"}, "precision_of.head='float8' is none of '', 'bfloat16'"),
        ({"optimizer_state": "int4"}, "optimizer_state='int4' is none of 'bfloat16', 'float32', 'int8'"),
        ({"batch_size": 12, "mesh.fsdp": 8}, r"batch_size=12 is not a multiple of mesh.data\*mesh.fsdp=8"),
        ({"mesh.data": -1}, "mesh.data and mesh.fsdp are -1"),
        ({"mesh.tensor": 0}, "mesh.tensor=0 must be above 0"),
        (
            {"mesh.tensor": 2, "model.context_length": 33},
            "model.context_length=33 is not a multiple of mesh.tensor=2",
        ),
        ({"mesh.tensor": 5}, "model.num_heads=12 is not a multiple of mesh.tensor=5"),
        (
            {"mesh.tensor": 2, "model.num_kv_heads": 1},
            "model.num_kv_heads=1 is not a multiple of mesh.tensor=2",
        ),
        ({"mesh.fsdp": 5, "batch_size": 5}, "model.dim=768 is not a multiple of mesh.fsdp=5"),
        (
            {"mesh.context": 3},
            r"length=1024 is not a multiple of mesh.context\*lcm\(2, mesh.tensor\)=6",
        ),
        (
            {"mesh.context": 768, "mesh.tensor": 4},
            r"context_length=1024 is not a multiple of mesh.context\*lcm\(2, mesh.tensor\)=3072",
        ),
        (
            {"mesh.context": 2, "model.attention": "plain"},
            "attention=plain needs whole sequences, and mesh.context=2",
        ),
        ({"model.num_heads": 7}, "model.dim=768 is not a multiple of model.num_heads=7"),
        ({"model.num_kv_heads": 5}, "model.num_heads=12 is not a multiple of model.num_kv_heads=5"),
        ({"model.vocab_size": 100}, "model.vocab_size=100 is smaller than the tokenizer's 50257"),
        ({"model.attn_dropout": 1.0}, r"model.attn_dropout=1.0 must lie in \[0, 1\)"),
        ({"model.dim": 36, "model.positions": "rope"}, "pairs.*not rotary_fraction=1 of .* 3"),
        ({"model.positions": "rope", "model.rotary_fraction": 0.02}, "rotary_fraction=0.02 of .* size 64"),
        (
            {"model.rope_scaling.low_frequency_factor": 4.0},
            r"rope_scaling.low_frequency_factor=4 must be below high_frequency_factor=4",
        ),
        ({"model.window_layers": "::2, x"}, "window_layers='::2, x': 'x' is no layer below num_blocks=12"),
        ({"model.window_layers": "12"}, "'12' is no layer below num_blocks=12, and no slice"),
        ({"model.window_layers": "::0"}, "'::0' is no layer"),
        ({"model.window": 9, "model.window_layers": "12:"}, "window=9 needs a layer: .*='12:' has none"),
        ({"model.attention": "cudnn", "model.attention_softcap": 9.0}, "cannot do model.attention_softcap=9"),
        ({"model.attention": "cudnn", "model.attn_dropout": 0.1}, "cudnn cannot do model.attn_dropout=0.1"),
        ({"model.tied_embeddings": True, "model.head_bias": True}, "exclude each other"),
        ({"model.softcap_form": "rsqrt"}, "softcap_form=rsqrt needs model.logit_softcap, which is 0"),
        ({"model.init": "zero_outputs", "model.init_std": 0.01}, "init_std=0.01 is for model.init=gpt2, not"),
        ({"model.init": "zero_outputs", "model.tied_embeddings": True}, "head of zeros; .* has no head"),
        ({"schedule.warmup": 60_000}, "last 60000 steps, more than steps=50000"),
        ({"schedule.warmup": "ten"}, "schedule.warmup='ten' is not a duration"),
        ({"schedule.warmup": "1.5"}, "schedule.warmup='1.5' is not a whole number"),
        ({"schedule.warmup": "1e999 tokens"}, "schedule.warmup='1e999 tokens' is too long"),
        (
            {"schedule.name": "trapezoid"},
            "schedule.name=trapezoid has the fields decay.*FILE:schedule=trapezoid",
        ),
        ({"optimizer.learning_rate": math.inf}, "optimizer.learning_rate=inf must be finite"),
        ({"logits_mib": math.inf}, "logits_mib=inf must be finite"),
        ({"z_loss": math.inf}, "z_loss=inf must be finite"),
        ({"model.logit_softcap": math.inf}, "model.logit_softcap=inf must be finite"),
        ({"cpu_devices": 1_000_000}, r"cpu_devices=1000000 must lie in \(0, 4096\]"),
        ({"checkpoint.load_step": -2}, "checkpoint.load_step=-2 must not be below -1"),
        ({"steps": 99999999999}, r"steps=99999999999 must lie in \(0, 2147483648\)"),
        ({"seed": 2**32}, r"seed=4294967296 must lie in \[0, 4294967296\)"),
        ({"optimizer.beta1": 1.0}, r"optimizer.beta1=1.0 must lie in \[0, 1\)"),
        ({"optimizer.eps": 0.0}, "optimizer.eps=0.0 must be above 0"),
        ({"schedule.final": -1.0}, "schedule.final=-1.0 must not be below 0"),
        ({"checkpoint.save_steps": ()}, r"save_steps=\(\)"),
        ({"checkpoint.save_steps": True}, "save_steps=True"),
        ({"checkpoint.load_step": 7}, "checkpoint.load_step=7 needs checkpoint.load_path"),
        ({"checkpoint.overwrite_optimizer": True}, "overwrite_optimizer=True needs checkpoint.load_path"),
        ({"checkpoint.save_steps": (10, -1)}, r"save_steps=\(10, -1\)"),
        ({"checkpoint.save_steps": "often"}, "save_steps='often'"),
    ],
)
def test_errors_name_fields_and_values(changes, message):
    config = make()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as error:
        resolve(config, 50257)
    assert "\n" not in str(error.value)


def test_boundaries_must_rise():
    config = make("schedule=piecewise_linear")
    config.schedule.boundaries = (0, 10, 10)
    with pytest.raises(ConfigError, match="must rise"):
        resolve(config, 50257)
    config.schedule.boundaries, config.schedule["values"] = 5, "abc"
    with pytest.raises(
        ConfigError, match=r"schedule\.values='abc' must be a tuple or a whole number or a number"
    ):
        resolve(config, 50257)


def test_a_config_without_optimizer():
    with pytest.raises(ConfigError, match="has no optimizer"):
        resolve(defaults(), 50257)


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"data": 2}, 8, (2, 4, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, 8, (2, 2, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2, 1)),
        ({"fsdp": 1}, 1, (1, 1, 1, 1)),
    ],
)
def test_mesh_covers_the_devices(mesh, devices, expected):
    config = resolve(make(**{f"mesh__{axis}": size for axis, size in mesh.items()}), 50257)
    assert tuple(mesh_sizes(config, devices).values()) == expected


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"data": 3, "batch_size": 12}, 8, "data 3, fsdp -1.*covers 6 devices, but there are 8"),
        ({"data": 2, "fsdp": 2}, 8, "covers 4 devices, but there are 8"),
        ({"data": 16}, 8, "covers 16 devices, but there are 8"),
        ({"batch_size": 12}, 8, r"batch_size=12 is not a multiple of mesh.data\*mesh.fsdp=8"),
        ({"fsdp": 1, "tensor": -1}, 8, "model.num_heads=12 is not a multiple of mesh.tensor=8"),
    ],
)
def test_mesh_errors(mesh, devices, message):
    changes = {name if name == "batch_size" else f"mesh__{name}": size for name, size in mesh.items()}
    with pytest.raises(ConfigError, match=message):
        mesh_sizes(resolve(make(**changes), 50257), devices)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12, 16])
def test_debug_shrinks_any_config_to_the_devices(devices):
    """A cluster's mesh on whatever there is: the axes that fit stay."""
    config = make(
        "model=gpt2_xl,schedule=piecewise_linear",
        mesh__data=4,
        mesh__fsdp=16,
        mesh__tensor=8,
        batch_size=512,
        wandb__project="big",
    )
    config.schedule.boundaries = (0, 2000, 50_000)
    small = config_lib.shrink(config, {"steps"})
    small.steps = 20
    frozen = resolve(small, 8192)
    sizes = mesh_sizes(frozen, devices, shrink_to_fit=True)
    assert sizes["tensor"] == (2 if devices % 2 == 0 else 1)
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == devices
    assert frozen.model.dim == 96
    assert (frozen.wandb.project, frozen.trackers) == ("", ())
    assert frozen.steps == 20


def test_micro_steps_are_the_fewest_that_fit():
    def micro_steps(config, sizes: dict[str, int]) -> int:
        return shape_on(config, abstract_mesh({"tensor": 1, "context": 1, **sizes})).batch_at(0).micro_steps

    named = {"logits_mib": 64.0, "model__remat": "none", "model__scan_layers": True}
    config = resolve(make(batch_size=96, device_batch_size=5, **named), 50257)
    assert micro_steps(config, {"data": 2, "fsdp": 4}) == 3  # 12 a device: 3 times 4
    assert micro_steps(config, {"data": 1, "fsdp": 96}) == 1
    unbound = resolve(make(batch_size=96, device_batch_size=0, **named), 50257)
    assert micro_steps(unbound, {"data": 1, "fsdp": 1}) == 1


def test_pile_gpt_is_the_benchmark():
    """Its figures."""
    import runpy

    from processes import ROOT

    config = resolve(runpy.run_path(str(ROOT / "configs/pile_gpt.py"))["get_config"](), 50257)
    m = config.model
    assert (m.dim, m.num_heads, m.num_blocks, m.context_length) == (768, 12, 12, 1024)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-3)
    assert (config.optimizer.weight_decay, config.clip_norm) == (0.1, 10.0)
    assert config.schedule.name == "linear"
    assert config.steps == 50_000
    assert config_lib.batch_sizes(config).duration(config.schedule.warmup) == 5_000
    assert [m[field] for field in config_lib.DROPOUTS] == [0, 0, 0, 0]
    assert not m.tied_embeddings
    assert not m.head_bias
    assert m.vocab_size == 50304


def test_batch_sizes_of_every_step():
    """Against a list of them."""
    config = resolve(make(batch_size=8, steps=20, batch_schedule="25%: 16; 12: 32"), 50257)
    sizes = config_lib.batch_sizes(config)
    listed = [8] * 5 + [16] * 7 + [32] * 8
    assert [sizes.at(step) for step in range(20)] == listed
    assert [sizes.rows(steps) for steps in range(21)] == [sum(listed[:n]) for n in range(21)]
    for step in range(21):
        left = [size for size, count in sizes.stages(step, 20) for _ in range(count)]
        assert left == listed[step:]
    assert config_lib.batch_sizes(resolve(make(batch_size=8), 50257)).stages(3, 5) == [(8, 2)]


def test_durations_in_tokens_are_as_long_as_it_takes_to_see_them():
    """Against sums over a list of steps; those of the batch schedule count what is before them."""
    length = 1024
    text = f"{8 * 5 * length} tokens: 16; 12: 32; {990 * length} tokens: 4"
    config = resolve(make(batch_size=8, steps=60, batch_schedule=text), 50257)
    sizes = config_lib.batch_sizes(config)
    listed = np.array([8] * 5 + [16] * 7 + [32] * 26 + [4] * 22)  # 40 + 112 + 26.2 * 32 rows are 990
    assert [sizes.at(step) for step in range(60)] == listed.tolist()
    seen = np.concatenate([[0], np.cumsum(listed)]) * length
    for tokens in np.random.default_rng(0).integers(0, seen[-1], 50):
        for begin in (0, 3, 11, 30):
            end = np.interp(seen[begin] + tokens, seen, np.arange(61))
            if seen[begin] + tokens <= seen[-1]:
                assert abs(sizes.duration(f"{tokens} tokens", begin=begin) - (end - begin)) <= 0.5
        last = 60 - np.interp(seen[-1] - tokens, seen, np.arange(61))
        assert abs(sizes.duration(f"{tokens} tokens", last=True) - last) <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_schedule": "16"}, r"batch_schedule='16': '16' is no 'WHEN: SIZE'"),
        ({"batch_schedule": "10%: 0"}, r"is no 'WHEN: SIZE'"),
        (
            {"batch_schedule": "10%: 16; 5%: 32"},
            r"begins at the steps \[10, 5\], which must be above 0 and rise",
        ),
        (
            {"batch_schedule": "10%: 12", "mesh.fsdp": 8},
            r"batch_schedule's size 12 is not a multiple of mesh",
        ),
        ({"batch_schedule": "ten: 16"}, r"batch_schedule='ten' is not a duration"),
        (
            {"batch_schedule": "1e4 tokens: 16; 1 tokens: 32"},
            r"begins at the steps \[1, 0\], which must be above 0 and rise",
        ),
        (  # 10 steps of 8 rows, then 16
            {"batch_schedule": "10: 16", "schedule.warmup": f"{(80 + 91 * 16) * 1024} tokens"},
            r"warm-up and what follows last 101 steps, more than steps=100",
        ),
    ],
)
def test_batch_schedules_that_cannot_be(changes, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        resolve(make(batch_size=8, steps=100, **changes), 50257)


def own() -> ConfigDict:
    config = ConfigDict()
    config.rate = field(0.5, "of learning", at_least=0, below=1)
    config.when = field("10%", "a duration", types=DURATION)
    config.part = field(ConfigDict(), "a group")
    config.part.kind = field("a", "what it is", one_of=("a", "b"))
    config.part.sizes = field((1, 2), "of it", above=0)
    return config


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), ConfigDict, "copy"])
def test_a_copy_knows_the_fields(kept):
    config = own()
    again = config.copy_and_resolve_references() if kept == "copy" else kept(config)
    again.rate = 0.25
    again.update({"when": 7, "part": {"kind": "b"}})
    assert flatten(again) == {"rate": 0.25, "when": 7, "part.kind": "b", "part.sizes": (1, 2)}
    assert [(name, known.bounds) for name, _, known in walk(again)] == [
        ("rate", "in [0, 1)"),
        ("when", ""),
        ("part.kind", "one of 'a', 'b'"),
        ("part.sizes", "above 0"),
    ]
    check_fields(again, again)
    check_fields(Config(again), again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.0}, r"own.rate=1.0 must lie in \[0, 1\)"),
        ({"rate": math.nan}, r"own.rate=nan must lie in \[0, 1\)"),
        ({"when": (1,)}, r"own.when=\(1,\) must be a duration"),
        ({"when": True}, r"own.when=True must be a duration"),
        ({"part.kind": "c"}, "own.part.kind='c' is none of 'a', 'b'"),
        ({"part.sizes": (1, 0)}, r"own.part.sizes=\(1, 0\) must be above 0"),
        ({"part.kinds": "c"}, r"unknown field config.own.part.kinds; did you mean config.own.part.kind\?"),
        ({"x": 1}, "unknown field config.own.x; config.own has part, rate, when"),
    ],
)
def test_fields_check_types_bounds_and_names(changes, message):
    config = own()
    config.update_from_flattened_dict(changes)
    for checked in (config, Config(config)):
        with pytest.raises(ConfigError, match=message) as error:
            check_fields(checked, own(), "own.")
        assert "\n" not in str(error.value)


NAMES = [name for name, *_ in walk(make())]
GROUPS_OF_FIELDS = sorted({name.rpartition(".")[0] for name in NAMES} - {""})


@pytest.mark.parametrize("name", NAMES + GROUPS_OF_FIELDS)
def test_none_is_refused_wherever_a_file_sets_it(name):
    config = make()
    group, _, key = name.rpartition(".")
    (operator.attrgetter(group)(config) if group else config)[key] = None
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)}=None (must be|is none of) "):
        resolve(config, 50257)


def test_a_group_that_lacks_fields():
    config = own()
    config.part = {"kind": "b"}
    with pytest.raises(ConfigError, match="part lacks the fields sizes"):
        check_fields(config, config)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("checkpoint.save_step", "did you mean config.checkpoint.save_steps?"),
        ("weight_decay", "did you mean config.optimizer.weight_decay?"),
        ("step", "did you mean config.steps?"),
        ("model.dropout", "did you mean config.model.gpt_dropout?"),
        ("optimizer.beta", "did you mean config.optimizer.beta2?"),
        ("schedule.warm_up", "did you mean config.schedule.warmup?"),
        ("meshes.data", "did you mean config.mesh?"),
    ],
)
def test_unknown_fields_of_a_config_name_the_nearest(name, nearest):
    """Whatever a config file sets."""
    config = make()
    config.update_from_flattened_dict(
        {name: 0.3} if not name.startswith("meshes") else {"meshes": {"data": 1}}
    )
    with pytest.raises(ConfigError, match=f"unknown field config.{name.partition('.data')[0]}; ") as error:
        resolve(config, 50257)
    assert nearest in str(error.value)
