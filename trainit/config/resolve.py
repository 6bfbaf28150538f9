"""Fills and checks a config across its fields, shrinks it for --debug, and freezes it."""

import math
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from trainit.config.durations import batch_sizes
from trainit.config.fields import GATED, TRACKERS, VOCABULARY_MULTIPLE, Config, defaults, model
from trainit.config.groups import SCHEDULES
from trainit.config.schema import ConfigDict, ConfigError, as_tuple, check_fields, flatten, names, require

# What plain values in an optimizer's file are, by patterns of their names; optax's are only these two.
OPTIMIZER_FIELDS = {
    "learning_rate": {"help": "peak of the schedule", "types": (float,), "at_least": 0},
    "weight_decay": {"help": "weight decay", "types": (float,), "at_least": 0},
}
USUAL_FIELDS = OPTIMIZER_FIELDS | {
    r"(.*_)?(beta\d?|b\d|momentum)": {"at_least": 0, "below": 1},
    r"(.*_)?eps": {"above": 0},
}


def shrink(config: ConfigDict, keep: Collection[str]) -> ConfigDict:
    """Shrinks a run in place, for --debug: a laptop does it in a minute. Fields named in `keep` stay."""
    # Sizes that 1, 2, 3, 4, 6, 8, 12, 16 and 24 devices can share, and steps with everything in them.
    run = {"steps": 10, "batch_size": 48, "device_batch_size": 3, "cpu_devices": 8}  # two micro-steps
    sizes = {"dim": 96, "num_heads": 4, "num_blocks": 2, "mlp_dim": 0, "vocab_size": 0, "head_dim": 0}
    sizes["num_kv_heads"] = 2 if config.model.num_kv_heads else 0
    sizes["context_length"] = min(config.model.context_length, 64)
    sizes["window"] = min(config.model.window, 32)
    layers = ":" if config.model.window_layers == ":" else "::2"
    groups = {
        "model": {**sizes, "window_layers": layers},
        "eval": {"every_steps": 5, "sequences": 32},
        "checkpoint": {"save_steps": 5, "load_path": ""},
        "log": {"every_steps": 1},
        "diagnostics": {"every_steps": min(config.diagnostics.every_steps, 5)},
        "trackers": (),
        "profile": {"steps": ""},
        **({} if "trackers" in keep else {"wandb": {"project": ""}}),
        "mesh": {axis: 2 for axis, size in config.mesh.items() if size > 2},  # what is split stays split
    }
    # Durations in steps become parts of the run.
    small = flatten(run | groups)
    for name in {"warmup", "constant", "decay", "rewarm"} & set(config.schedule):
        if "%" not in str(config.schedule[name]):
            small[f"schedule.{name}"] = "10%"
    for name in {"boundaries", "rewarm_at"} & set(config.schedule):
        parts = len(as_tuple(config.schedule[name]))
        last = parts if name == "boundaries" else parts + 1
        small[f"schedule.{name}"] = tuple(f"{100 * i // last}%" for i in range(1, parts + 1))
    config.update_from_flattened_dict({k: v for k, v in small.items() if k not in keep})
    return config


def resolve(config: ConfigDict, tokenizer_vocab_size: int, end_of_text: int = -1) -> Config:
    """A frozen copy, with what follows from other fields, after all checks that need no device.

    `end_of_text` is the id with which the tokenizer ends documents; -1: it has none. ConfigErrors name the
    fields and the numbers on both sides.
    """
    config = config.copy_and_resolve_references()
    # Each field by itself, then what several fields decide together.
    check_fields(config, config)
    lacking = "the config has no optimizer: config.optimizer = optimizers.choices()['adamw']()"
    require(len(config.optimizer) > 0, lacking)
    is_number = config.logits_mib == "auto" or not isinstance(config.logits_mib, str)
    require(is_number, f"logits_mib={config.logits_mib!r} must be a number of MiB, or auto")
    _resolve_model(config.model, tokenizer_vocab_size, end_of_text)
    check_mesh(config.mesh, config)
    _check_schedule(config)
    _check_dataset(config)
    _check_checkpoint(config.checkpoint)
    _check_diagnostics(config.diagnostics)
    _resolve_trackers(config)
    return Config(config)


def _check_dataset(config: ConfigDict) -> None:
    if "streams" in (d := config.dataset):
        _check_batches(config, "dataset.streams", d.streams)
        for key, plain in (("mixture", ""), ("order", "shuffled"), ("whole_batches", False)):
            message = f"dataset.{key}={d[key]!r} needs a prepared dataset; leave it at {plain!r}"
            require(d[key] == plain, message)
    require(not (d.whole_batches and d.mixture), "dataset.whole_batches=True is not for a dataset.mixture")


def _check_checkpoint(c: ConfigDict) -> None:
    saves = as_tuple(c.save_steps)
    minimum = 0 if isinstance(c.save_steps, int) else 1
    require(
        bool(saves) and all(type(n) is int and n >= minimum for n in saves),
        f"checkpoint.save_steps={c.save_steps!r} must be a number of steps, or several separated by commas",
    )
    for key, unset in (("load_step", -1), ("overwrite_optimizer", False)):
        message = f"checkpoint.{key}={c[key]} needs checkpoint.load_path, which is empty"
        require(c.load_path or c[key] == unset, message)


def _resolve_model(m: ConfigDict, tokenizer_vocab_size: int, end_of_text: int) -> None:
    """Fills and checks the sub-config `model`."""
    # What 0 and -1 stand for.
    m.num_kv_heads = m.num_kv_heads or m.num_heads
    m.embedding_scale = m.embedding_scale or math.sqrt(m.dim)
    if not m.head_dim:
        _check_multiple("model.dim", m.dim, "model.num_heads", m.num_heads)
        m.head_dim = m.dim // m.num_heads
    if m.document_mask and m.end_of_text == -1:
        m.end_of_text = end_of_text
    if not m.mlp_dim:
        m.mlp_dim = 64 * -(-8 * m.dim // (3 * 64)) if m.activation in GATED else 4 * m.dim
    if not m.vocab_size:
        m.vocab_size = -(-tokenizer_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    # What excludes each other.
    rotary, ids, scaling = int(m.rotary_fraction * m.head_dim), tokenizer_vocab_size, m.rope_scaling
    _check_multiple("model.num_heads", m.num_heads, "model.num_kv_heads", m.num_kv_heads)
    require(
        not m.document_mask or m.end_of_text == -2 or 0 <= m.end_of_text < ids,
        f"model.document_mask=True needs an id that ends documents, from 0 to {ids - 1}, not "
        f"model.end_of_text={m.end_of_text}",
    )
    require(
        m.positions != "rope" or (rotary >= 2 and rotary % 2 == 0),
        f"model.positions=rope turns pairs of numbers, not rotary_fraction={m.rotary_fraction:g} of the head "
        f"size {m.head_dim}",
    )
    require(
        scaling.low_frequency_factor < scaling.high_frequency_factor,
        f"model.rope_scaling.low_frequency_factor={scaling.low_frequency_factor:g} must be below "
        f"high_frequency_factor={scaling.high_frequency_factor:g}",
    )
    has_window = layers_with_window(m)
    require(
        not m.window or any(has_window),
        f"model.window={m.window} needs a layer: model.window_layers={m.window_layers!r} has none of "
        f"num_blocks={m.num_blocks}",
    )
    for name in ("attn_dropout", "attention_softcap"):
        message = f"model.attention=cudnn cannot do model.{name}={m[name]}; take attention=auto"
        require(m.attention != "cudnn" or not m[name], message)
    require(
        m.softcap_form == "tanh" or m.logit_softcap > 0,
        f"model.softcap_form={m.softcap_form} needs model.logit_softcap, which is 0",
    )
    if m.init == "zero_outputs":
        usual = model().init_std
        message = f"model.init_std={m.init_std} is for model.init=gpt2, not {m.init}; leave it at {usual}"
        require(m.init_std == usual, message)
        message = f"model.init={m.init} begins with a head of zeros; model.tied_embeddings=True has no head"
        require(not m.tied_embeddings, message)
    if m.tied_embeddings and m.head_bias:
        raise ConfigError("model.head_bias=True and model.tied_embeddings=True exclude each other")
    if m.vocab_size < ids:
        raise ConfigError(f"model.vocab_size={m.vocab_size} is smaller than the tokenizer's {ids}; 0 fits it")


def layers_with_window(m: Mapping[str, Any]) -> list[bool]:
    """Whether each layer of a model has its window. ConfigError: window_layers is no list of slices."""
    layers, chosen = range(m["num_blocks"]), set()
    for part in m["window_layers"].split(","):
        try:
            if ":" in part:
                chosen |= {*layers[slice(*(int(end) if end.strip() else None for end in part.split(":")))]}
            else:
                chosen.add(layers[int(part)])
        except (ValueError, TypeError, IndexError):
            raise ConfigError(
                f"model.window_layers={m['window_layers']!r}: {part.strip()!r} is no layer below "
                f"num_blocks={m['num_blocks']}, and no slice such as '::2'"
            ) from None
    return [bool(m["window"]) and layer in chosen for layer in layers]


def of_this_version(config: dict) -> dict:
    """A saved config with fields newer than it, of its model, spikes and statistics; they do nothing."""
    if "model" not in config:
        return config
    saved = config["model"]
    usual = model(head_dim=saved["dim"] // saved["num_heads"]).to_dict()
    config = {"spikes": defaults().spikes.to_dict(), "diagnostics": {}, **config, "model": {**usual, **saved}}
    return {**config, "diagnostics": {**defaults().diagnostics.to_dict(), **config["diagnostics"]}}


def _check_diagnostics(d: ConfigDict) -> None:
    kinds = ("kind", "layer", "parameter")
    for name in d.norms_by:
        require(name in kinds, f"diagnostics.norms_by={d.norms_by!r}: {name!r} is none of {names(kinds)}")
    if d.last_loss and not d.last_parameters:
        raise ConfigError("diagnostics.last_loss=True needs diagnostics.last_parameters=True")
    for name in ("spectra", "histograms"):
        try:
            re.compile(d[name])
        except re.error as error:
            raise ConfigError(f"diagnostics.{name}={d[name]!r} is no regular expression: {error}") from None


def _resolve_trackers(config: ConfigDict) -> None:
    """Fills and checks the names of trackers."""
    given = [name.strip() for text in as_tuple(config.trackers) for name in str(text).split(",")]
    config.trackers = tuple(filter(None, given)) or ("wandb",) * bool(config.wandb.project)
    for name in config.trackers:
        require(name in TRACKERS, f"trackers={config.trackers}: {name!r} is none of {names(TRACKERS)}")
    message = f"trackers={config.trackers} need wandb.project, which is empty"
    require("wandb" not in config.trackers or bool(config.wandb.project), message)


def _check_schedule(config: ConfigDict) -> None:
    """Checks that the schedule has its own fields, and that its parts fit into the run."""
    schedule, sizes = config.schedule, batch_sizes(config)
    require(schedule.name in SCHEDULES, f"{schedule.name=} is none of {names(map(repr, SCHEDULES))}")
    expected = SCHEDULES[schedule.name]()
    require(
        set(schedule) == set(expected),
        f"schedule.name={schedule.name} has the fields {names(expected)}, not {names(schedule)}; choose it "
        f"as a group: --config=FILE:schedule={schedule.name}",
    )

    def length(name: str, value: Any = None, **where: Any) -> int:
        value = schedule.get(name, 0) if value is None else value
        return sizes.duration(value, f"schedule.{name}", **where)

    # Warm-up, what follows and the cool-down.
    warmup = length("warmup")
    total = warmup + length("constant", begin=warmup) + length("decay", last=True)
    require(
        total <= config.steps,
        f"schedule={schedule.name}: warm-up and what follows last {total} steps, more than "
        f"steps={config.steps}; give them in percent or raise steps",
    )
    # Further warm-ups must not overlap.
    starts = [length("rewarm_at", at) for at in as_tuple(schedule.rewarm_at)]
    rises = [length("rewarm", begin=at) for at in starts or [0]]
    room = all(b - a >= rise for (a, b), rise in zip(pairwise(starts), rises, strict=False))
    require(
        not starts or (min(rises) > 0 and starts[0] > 0 and room),
        f"schedule.rewarm_at={schedule.rewarm_at} must be above 0 and rise by at least "
        f"rewarm={schedule.rewarm!r}, that is {max(rises)} steps, which must be above 0",
    )
    # The points of a piecewise schedule.
    if "boundaries" in schedule:
        at = [length("boundaries", b) for b in as_tuple(schedule.boundaries)]
        values = as_tuple(schedule["values"])
        if not all(type(v) in (int, float) for v in values):
            raise ConfigError(f"schedule.values={schedule['values']!r} must be numbers")
        require(
            len(at) == len(values) >= 2 and all(a < b for a, b in pairwise(at)),
            f"schedule.boundaries={schedule.boundaries} must rise and be as many as schedule.values={values}",
        )


def check_mesh(sizes: Mapping[str, int], config: ConfigDict | Config) -> None:
    """Raises ConfigError unless each axis of the mesh divides what it splits. -1 divides everything."""
    for axis, size in sizes.items():
        require(size > 0 or size == -1, f"mesh.{axis}={size} must be above 0, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    require(len(free) <= 1, f"mesh.{' and mesh.'.join(free)} are -1; only one axis can be what is left")
    _check_multiple("model.dim", config.model.dim, "mesh.fsdp", sizes["fsdp"])
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "context_length"):
        _check_multiple(f"model.{name}", config.model[name], "mesh.tensor", sizes["tensor"])
    if (context := sizes["context"]) > 1:
        length, multiple = config.model.context_length, length_multiple(sizes)
        _check_multiple("model.context_length", length, "mesh.context*lcm(2, mesh.tensor)", multiple)
        require(
            config.model.attention not in ("plain", "cudnn"),
            f"model.attention={config.model.attention} needs whole sequences, and mesh.context={context} "
            f"splits them; take auto, gather or ring",
        )
    _check_batches(config, "mesh.data*mesh.fsdp", abs(sizes["data"] * sizes["fsdp"]))


def length_multiple(sizes: Mapping[str, int]) -> int:
    """What divides the length of all sequences on a mesh: two chunks on each device along context."""
    context, tensor = abs(sizes["context"]), abs(sizes["tensor"])
    return tensor if context == 1 else context * math.lcm(2, tensor)


def _check_batches(config: ConfigDict | Config, of: str, divisor: int) -> None:
    first, *later = batch_sizes(config).sizes
    _check_multiple("batch_size", first, of, divisor)
    for size in later:
        require(size % divisor == 0, f"batch_schedule's size {size} is not a multiple of {of}={divisor}")


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    require(value % divisor == 0, f"{name}={value} is not a multiple of {of}={divisor}")
