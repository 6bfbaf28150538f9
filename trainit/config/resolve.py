"""Fills and checks a config across its fields, shrinks it for --debug, and freezes it."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from trainit.config.durations import batch_sizes
from trainit.config.fields import VOCABULARY_MULTIPLE, Config
from trainit.config.groups import SCHEDULES
from trainit.config.schema import ConfigDict, as_tuple, check_fields, field, flatten, names, require

# Fields that every optimizer has; for files that set them as plain values.
OPTIMIZER_FIELDS = {
    "learning_rate": field(0.0, "peak of the schedule", at_least=0),
    "weight_decay": field(0.0, "weight decay", at_least=0),
}


def shrink(config: ConfigDict, keep: Iterable[str]) -> ConfigDict:
    """Shrinks a run in place so that a laptop does it in a minute, for --debug. Returns the config.

    Args:
        config: any config.
        keep: dotted names of fields that the command line sets: they stay.
    """
    # Sizes that 1, 2, 3, 4, 6, 8, 12, 16 and 24 devices can share, and steps with everything in them.
    small = {
        "steps": 10,
        "batch_size": 48,
        "device_batch_size": 3,  # two micro-steps on eight devices
        "cpu_devices": 8,
        "model.dim": 96,
        "model.num_heads": 4,
        "model.num_kv_heads": 2 if config.model.num_kv_heads else 0,
        "model.num_blocks": 2,
        "model.context_length": min(config.model.context_length, 64),
        "model.mlp_dim": 0,
        "model.vocab_size": 0,
        "eval.every_steps": 5,
        "eval.sequences": 32,
        "checkpoint.save_steps": 5,
        "checkpoint.load_path": "",
        "log.every_steps": 1,
        "diagnostics.every_steps": min(config.diagnostics.every_steps, 5),
        "wandb.project": "",
    }
    # Axes that are split stay split, and durations in steps become parts of the run.
    small |= {f"mesh.{axis}": 2 for axis, size in config.mesh.items() if size > 2}
    small |= {
        f"schedule.{name}": "10%"
        for name in ("warmup", "constant", "decay", "rewarm")
        if name in config.schedule and "%" not in str(config.schedule[name])
    }
    for name in {"boundaries", "rewarm_at"} & set(config.schedule):
        parts = len(as_tuple(config.schedule[name]))
        last = parts if name == "boundaries" else parts + 1
        small[f"schedule.{name}"] = tuple(f"{100 * i // last}%" for i in range(1, parts + 1))
    config.update_from_flattened_dict({k: v for k, v in small.items() if k not in set(keep)})
    return config


def resolve(config: ConfigDict, tokenizer_vocab_size: int, end_of_text: int = -1) -> Config:
    """Fills what follows from other fields, checks everything that needs no device, and freezes.

    Args:
        config: stays as it is.
        tokenizer_vocab_size: ids of the tokenizer.
        end_of_text: id with which it ends documents; -1: it has none.

    Raises:
        ConfigError: names the fields and the numbers on both sides.
    """
    config = config.copy_and_resolve_references()
    require(
        len(config.optimizer) > 0,
        "the config has no optimizer: config.optimizer = optimizers.choices()['adamw']()",
    )
    # Each field by itself, then what several fields decide together.
    check_fields(config, config)
    check_ranges(flatten(config))
    _resolve_model(config.model, tokenizer_vocab_size, end_of_text)
    check_mesh(config.mesh, config)
    _check_schedule(config)
    _check_dataset(config)
    _check_checkpoint(config.checkpoint)
    _check_diagnostics(config.diagnostics)
    return Config(config)


def _check_dataset(config: ConfigDict) -> None:
    if "streams" in config.dataset:
        streams = config.dataset.streams
        _check_batches(config, streams, f"dataset.streams={streams}")
        for key, plain in (("mixture", ""), ("order", "shuffled")):
            require(
                config.dataset[key] == plain,
                f"dataset.{key}={config.dataset[key]!r} needs a prepared dataset; leave it at {plain!r}",
            )


def _check_checkpoint(c: ConfigDict) -> None:
    saves = c.save_steps
    minimum = 0 if isinstance(saves, int) else 1
    require(
        bool(as_tuple(saves)) and all(type(n) is int and n >= minimum for n in as_tuple(saves)),
        f"checkpoint.save_steps={saves!r} must be a number of steps, or several separated by commas",
    )
    for key, unset in (("load_step", -1), ("overwrite_optimizer", False)):
        require(
            c.load_path or c[key] == unset,
            f"checkpoint.{key}={c[key]} needs checkpoint.load_path, which is empty",
        )


def check_ranges(values: Mapping[str, Any], prefix: str = "") -> None:
    """Checks optimizers' plain values by the names of their fields.

    Args:
        values: {"optimizer.beta1": 0.9, ...}, some of a config's.
        prefix: what messages begin with.

    Raises:
        ConfigError: a number is outside of what its field's name allows.
    """
    if str(values.get("optimizer.name", "")).rpartition("+")[2].startswith("optax."):
        return
    for name, value in values.items():
        if re.match(r"optimizer\.([\w.]+[._])?(beta\d?|b\d|momentum)$", name):
            field(0.0, "", types=(type(value),), at_least=0, below=1).check(prefix + name, value)
        if re.match(r"optimizer\.([\w.]+[._])?eps$", name):
            field(0.0, "", types=(type(value),), above=0).check(prefix + name, value)


def _resolve_model(m: ConfigDict, tokenizer_vocab_size: int, end_of_text: int) -> None:
    """Fills and checks the sub-config `model`."""
    # What 0 and -1 stand for.
    m.num_kv_heads = m.num_kv_heads or m.num_heads
    if m.document_mask and m.end_of_text == -1:
        m.end_of_text = end_of_text
    if not m.mlp_dim:
        m.mlp_dim = 64 * -(-8 * m.dim // (3 * 64)) if m.activation == "swiglu" else 4 * m.dim
    if not m.vocab_size:
        m.vocab_size = -(-tokenizer_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    # What excludes each other.
    require(
        not m.document_mask or 0 <= m.end_of_text < tokenizer_vocab_size,
        f"model.document_mask=True needs an id that ends documents, from 0 to {tokenizer_vocab_size - 1}, "
        f"not model.end_of_text={m.end_of_text}",
    )
    require(m.dim % m.num_heads == 0, f"model.dim={m.dim} is not a multiple of model.num_heads={m.num_heads}")
    require(
        m.num_heads % m.num_kv_heads == 0,
        f"model.num_heads={m.num_heads} is not a multiple of model.num_kv_heads={m.num_kv_heads}",
    )
    require(
        m.positions != "rope" or (m.dim // m.num_heads) % 2 == 0,
        f"model.positions=rope needs an even head size, not model.dim / model.num_heads = "
        f"{m.dim // m.num_heads}",
    )
    require(
        m.attention != "cudnn" or not m.attn_dropout,
        f"model.attention=cudnn cannot do model.attn_dropout={m.attn_dropout}; take attention=auto",
    )
    require(
        m.attention != "cudnn" or not m.document_mask,
        "model.attention=cudnn cannot do model.document_mask=True; take attention=auto",
    )
    require(
        not (m.tied_embeddings and m.head_bias),
        "model.head_bias=True and model.tied_embeddings=True exclude each other",
    )
    require(
        m.vocab_size >= tokenizer_vocab_size,
        f"model.vocab_size={m.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; 0 fits it",
    )


def _check_diagnostics(d: ConfigDict) -> None:
    kinds = ("kind", "layer", "parameter")
    for name in d.norms_by:
        require(name in kinds, f"diagnostics.norms_by={d.norms_by!r}: {name!r} is none of {names(kinds)}")
    require(
        d.last_parameters or not d.last_loss,
        "diagnostics.last_loss=True needs diagnostics.last_parameters=True",
    )
    try:
        re.compile(d.spectra)
    except re.error as error:
        require(False, f"diagnostics.spectra={d.spectra!r} is no regular expression: {error}")


def _check_schedule(config: ConfigDict) -> None:
    """Checks that the schedule has the fields of its name, and that its parts fit into the run."""
    schedule, steps = config.schedule, config.steps
    require(
        schedule.name in SCHEDULES,
        f"schedule.name={schedule.name!r} is none of {names(map(repr, SCHEDULES))}",
    )
    expected = SCHEDULES[schedule.name]()
    require(
        set(schedule) == set(expected),
        f"schedule.name={schedule.name} has the fields {names(expected)}, not {names(schedule)}; choose it "
        f"as a group: --config=FILE:schedule={schedule.name}",
    )

    def length(name: str, value: Any, **where: Any) -> int:
        return sizes.duration(value, f"schedule.{name}", **where)

    # Warm-up, what follows and the cool-down.
    sizes = batch_sizes(config)
    total = warmup = length("warmup", schedule.warmup)
    total += length("constant", schedule.constant, begin=warmup) if "constant" in schedule else 0
    total += length("decay", schedule.decay, last=True) if "decay" in schedule else 0
    require(
        total <= steps,
        f"schedule={schedule.name}: warm-up and what follows last {total} steps, more than steps={steps}; "
        f"give them in percent or raise steps",
    )
    # Further warm-ups must not overlap.
    starts = [length("rewarm_at", at) for at in as_tuple(schedule.rewarm_at)]
    rises = [length("rewarm", schedule.rewarm, begin=at) for at in starts or [0]]
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
        require(
            all(type(v) in (int, float) for v in values),
            f"schedule.values={schedule['values']!r} must be numbers",
        )
        require(
            len(at) == len(values) and len(at) >= 2 and all(a < b for a, b in pairwise(at)),
            f"schedule.boundaries={schedule.boundaries} must rise and be as many as schedule.values={values}",
        )


def check_mesh(sizes: Mapping[str, int], config: ConfigDict | Config) -> None:
    """Raises ConfigError unless each axis of the mesh divides what it splits. -1 divides everything."""
    m = config.model
    for axis, size in sizes.items():
        require(size > 0 or size == -1, f"mesh.{axis}={size} must be above 0, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    require(len(free) <= 1, f"mesh.{' and mesh.'.join(free)} are -1; only one axis can be what is left")
    require(sizes["context"] == 1, f"mesh.context={sizes['context']} does not work yet; set it to 1")
    split = [("fsdp", "model.dim", m.dim)] + [
        ("tensor", f"model.{name}", m[name])
        for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "context_length")
    ]
    for axis, name, value in split:
        require(value % sizes[axis] == 0, f"{name}={value} is not a multiple of mesh.{axis}={sizes[axis]}")
    shares = abs(sizes["data"] * sizes["fsdp"])
    _check_batches(config, shares, f"mesh.data*mesh.fsdp={shares}")


def _check_batches(config: ConfigDict | Config, divisor: int, text: str) -> None:
    """Raises ConfigError unless `divisor`, which messages call `text`, divides every step's batch size."""
    for index, size in enumerate(batch_sizes(config).sizes):
        name = "batch_schedule's size " if index else "batch_size="
        require(size % divisor == 0, f"{name}{size} is not a multiple of {text}")
