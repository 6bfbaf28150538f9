"""What describes a run: every field with its unit and bounds, choices of whole groups, checks.

A config file in `configs/` has `get_config(arg)`: it starts from `defaults()`, sets what its
experiment is about, and ends with `choose(config, arg, ...)`, which picks whole groups by name
(`:model=gpt2_medium,schedule=cosine`). `resolve` fills what follows from other fields, checks
everything across fields and freezes the result. All of it happens before a device is touched.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import FieldReference

MESH_AXES = ("data", "fsdp", "tensor", "context")  # the last ones vary fastest: they stay inside a node
VOCABULARY_MULTIPLE = 128  # the vocabulary is padded to it: matrix units like it, and so do tensor shards


Config = FrozenConfigDict  # a resolved config, or a part of one


class ConfigError(ValueError):
    """A config or a usage that cannot work. The message is one line: what, the values, what to do."""


def _any(value) -> FieldReference:
    """A field that takes values of several types, such as a duration ("10%" or 500)."""
    return FieldReference(value, field_type=object)


def defaults() -> ConfigDict:
    """Every field but the optimizer's own, which its file declares."""
    c = ConfigDict()
    c.seed = 42  # of parameters, dropout and data order; >= 0
    c.steps = 50_000  # optimizer steps of the whole run; > 0
    c.max_minutes = 0.0  # save and exit 75 so many minutes after the process began; 0: no limit
    c.batch_size = 128  # sequences per optimizer step over the whole job; multiple of data * fsdp
    c.device_batch_size = 16  # sequences per device in a micro-step at most; 0: no bound
    c.clip_norm = 10.0  # global l2 norm of the gradient at most; 0: no clipping
    c.stall_seconds = 300.0  # without a step in so long, or in 20 usual step times, end the run; 0: never
    c.max_skipped = 15  # non-finite steps in a row that stop the run; > 0
    c.precision = "bfloat16"  # of matrix products and activations: bfloat16, float32
    c.platform = ""  # cpu, cuda, rocm, tpu; empty: the best there is
    c.cpu_devices = 1  # virtual devices where there is no accelerator; > 0
    c.mesh = ConfigDict()  # devices along each axis; > 0, and one of them may be -1: what is left
    c.mesh.data = 1  # replicas
    c.mesh.fsdp = -1  # parameters and optimizer state are split
    c.mesh.tensor = 1  # heads, MLP width and vocabulary are split
    c.mesh.context = 1  # sequence length is split; 1 is all that works yet
    c.model = model()
    c.parameter_groups = ()  # lines "PATTERN FIELD=VALUE ...": optimizer settings by parameters' paths
    c.schedule = SCHEDULES["linear"]()
    c.dataset = dataset("data/pile")
    c.eval = ConfigDict()
    c.eval.every_steps = 1000  # steps; 0: only at the end
    c.eval.sequences = 1024  # validation sequences, evenly spaced, always the same; 0: all
    c.log = ConfigDict()
    c.log.every_steps = 1  # steps between lines of metrics.jsonl; > 0
    c.checkpoint = ConfigDict()
    c.checkpoint.save_steps = _any(1000)  # N: every N steps; (N, M, ...): at these; 0: only the last
    c.checkpoint.keep = 3  # newest checkpoints that stay; 0: all
    c.checkpoint.load_path = ""  # another run's folder to start from, while this one has no checkpoint
    c.checkpoint.load_step = -1  # which of its checkpoints; -1: the newest
    c.checkpoint.overwrite_config = False  # let this config rule where it differs from the checkpoint's
    c.checkpoint.overwrite_optimizer = False  # of load_path take the parameters and data position only
    c.wandb = ConfigDict()
    c.wandb.project = ""  # empty: no W&B
    c.wandb.name = ""  # of the run; empty: the run folder's
    return c


def model(**changes) -> ConfigDict:
    """GPT-2 124M (Radford et al. 2019) with the head untied, but for the given changes."""
    m = ConfigDict()
    m.dim = 768  # width of the residual stream; multiple of num_heads and mesh.fsdp
    m.num_heads = 12  # query heads; multiple of mesh.tensor
    m.num_kv_heads = 0  # key and value heads, a divisor of num_heads; 0: num_heads
    m.num_blocks = 12  # layers; > 0
    m.context_length = 1024  # tokens of a sequence; > 0
    m.mlp_dim = 0  # hidden width of the MLP; 0: 4 * dim (swiglu: 8/3 * dim, up to a multiple of 64)
    m.vocab_size = 0  # rows of the embedding; 0: the tokenizer's, up to a multiple of 128
    m.norm = "layernorm"  # layernorm, rmsnorm
    m.activation = "gelu"  # gelu (tanh form), swiglu, relu2
    m.positions = "learned"  # learned, rope
    m.rope_theta = 10_000.0  # base wavelength of RoPE in radians; > 0
    m.use_bias = True  # biases of the blocks' linear maps and of LayerNorm
    m.head_bias = False  # bias of the output head
    m.qk_norm = False  # RMSNorm on each head's queries and keys
    m.tied_embeddings = False  # the head is the token embedding
    m.logit_softcap = 0.0  # logits pass through cap * tanh(logits / cap); 0: none
    m.gpt_dropout = 0.0  # on the sum of embeddings; 0 <= p < 1, as the three below
    m.attn_dropout = 0.0  # on attention weights
    m.attn_linear_dropout = 0.0  # on attention's output
    m.transformer_dropout = 0.0  # on the MLP's output
    m.attention = "auto"  # plain, cudnn; auto: cudnn on a GPU where it applies, else plain
    m.remat = "none"  # none, block: recompute each block in the backward pass
    m.scan_layers = True  # one compiled block in a loop; False: unrolled
    m.update(changes)
    return m


def dataset(path: str) -> ConfigDict:
    d = ConfigDict()
    d.path = path  # folder of a prepared dataset; "demo": presidents' messages, prepared on first use
    d.workers = 0  # worker processes of the loader; 0: a thread of this process
    d.prefetch = 2  # batches that are read ahead; > 0
    return d


def _schedule(name: str, **fields) -> Callable[[], ConfigDict]:
    return lambda: ConfigDict(
        {"name": name, **{k: v if isinstance(v, float) else _any(v) for k, v in fields.items()}}
    )


MODELS = {
    "gpt2": model,
    "gpt2_medium": lambda: model(dim=1024, num_heads=16, num_blocks=24),
    "gpt2_large": lambda: model(dim=1280, num_heads=20, num_blocks=36),
    "gpt2_xl": lambda: model(dim=1600, num_heads=25, num_blocks=48),
    "modern": lambda: model(
        norm="rmsnorm", activation="swiglu", positions="rope", use_bias=False, qk_norm=True
    ),
}
# Durations are in steps (500), percent of all steps ("10%") or tokens ("2e9 tokens").
SCHEDULES = {
    "constant": _schedule("constant", warmup="10%"),
    "linear": _schedule("linear", warmup="10%", constant=0, final=0.0),  # then constant, then down to final
    "cosine": _schedule("cosine", warmup="10%", final=0.0),  # final: fraction of the peak at the end
    "trapezoid": _schedule("trapezoid", warmup="10%", decay="20%", final=0.0),
    # Straight lines between (boundary, value); boundaries are durations, values fractions of the peak.
    "piecewise_linear": _schedule(
        "piecewise_linear", warmup=0, boundaries=("0%", "50%", "100%"), values=(0.0, 1.0, 0.0)
    ),
}
DATASETS = {"pile": lambda: dataset("data/pile"), "demo": lambda: dataset("demo")}
GROUPS = {"model": MODELS, "schedule": SCHEDULES, "dataset": DATASETS}

ONE_OF = {
    "precision": ("bfloat16", "float32"),
    "platform": ("", "cpu", "cuda", "rocm", "tpu"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "swiglu", "relu2"),
    "model.positions": ("learned", "rope"),
    "model.attention": ("auto", "plain", "cudnn"),
    "model.remat": ("none", "block"),
    "schedule.name": tuple(SCHEDULES),
}
POSITIVE = """steps batch_size max_skipped cpu_devices model.dim model.num_heads model.num_blocks
    model.context_length model.rope_theta log.every_steps dataset.prefetch""".split()
NOT_NEGATIVE = """seed max_minutes stall_seconds device_batch_size clip_norm model.num_kv_heads model.mlp_dim
    model.vocab_size model.logit_softcap dataset.workers eval.every_steps eval.sequences
    checkpoint.keep schedule.final optimizer.learning_rate optimizer.weight_decay""".split()
DROPOUTS = ("gpt_dropout", "attn_dropout", "attn_linear_dropout", "transformer_dropout")


def choose(config: ConfigDict, arg: str, **groups: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """Replaces whole groups of `config` by the named choices in `arg`.

    Args:
        config: changed in place and returned.
        arg: what stands behind the config file's colon, such as "model=gpt2_medium,schedule=cosine".
        **groups: groups beside model, schedule and dataset: each maps a choice to its sub-config's maker.

    Raises:
        ConfigError: an unknown group or choice; the message lists what there is.
    """
    groups = {**GROUPS, **groups}
    for part in filter(None, arg.split(",")):
        group, equals, choice = part.partition("=")
        if group not in groups or not equals:
            raise ConfigError(f"unknown group {part!r}: write GROUP=CHOICE, GROUP one of {_names(groups)}")
        if choice not in groups[group]:
            raise ConfigError(f"unknown {group} {choice!r}: there are {_names(groups[group])}")
        with config.ignore_type():
            config[group] = groups[group][choice]()
    return config


def _names(choices: Iterable[str]) -> str:
    return ", ".join(sorted(choices))


def duration(value: int | str, steps: int, tokens_per_step: int, field: str = "duration") -> int:
    """A duration in steps: 500, "500", "10%" of `steps`, or "2e9 tokens". Errors name `field`."""
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(%|tokens)?\s*", str(value))
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} is not a duration: write 500, '10%' or '2e9 tokens'") from None
    require(number < 1e18, f"{field}={value!r} is too long")
    whole = match[2] is not None or number == int(number)
    require(whole, f"{field}={value!r} is not a whole number of steps")
    return round(number * {None: 1, "%": steps / 100, "tokens": 1 / tokens_per_step}[match[2]])


def shrink(config: ConfigDict, keep: Iterable[str]) -> ConfigDict:
    """The same run, shrunk in place so that a laptop does it in a minute: `--debug`.

    Args:
        config: any config.
        keep: dotted fields that the user set by hand, which stay.
    """
    small = {
        "steps": 10,
        "batch_size": 48,  # like dim, what 1, 2, 3, 4, 6, 8, 12, 16 and 24 devices can share
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
        "wandb.project": "",
    }
    small |= {f"mesh.{axis}": 2 for axis, size in config.mesh.items() if size > 2}
    small |= {
        f"schedule.{name}": "10%"
        for name in ("warmup", "constant", "decay")
        if name in config.schedule and "%" not in str(config.schedule[name])
    }
    if "boundaries" in config.schedule:
        parts = len(_as_tuple(config.schedule.boundaries))
        small["schedule.boundaries"] = tuple(f"{100 * i // parts}%" for i in range(1, parts + 1))
    config.update_from_flattened_dict({k: v for k, v in small.items() if k not in set(keep)})
    return config


def resolve(config: ConfigDict, tokenizer_vocab_size: int) -> Config:
    """Fills what follows from other fields, checks everything that needs no device, and freezes.

    Raises:
        ConfigError: names the fields and the numbers on both sides.
    """
    config = config.copy_and_resolve_references()
    require(
        "optimizer" in config,
        "the config has no optimizer: config.optimizer = optimizers.choices()['adamw']()",
    )
    values = flatten(config)
    for field, choices in ONE_OF.items():
        require(
            values[field] in choices, f"{field}={values[field]!r} is none of {_names(map(repr, choices))}"
        )
    for field in POSITIVE:
        require(values[field] > 0, f"{field}={values[field]} must be above 0")
    for field, bound in (("steps", 2**31), ("seed", 2**32)):
        require(values[field] < bound, f"{field}={values[field]} must be below {bound}")
    check_ranges(values)
    _resolve_model(config.model, tokenizer_vocab_size)
    check_mesh(config.mesh, config)
    _check_schedule(config)
    saves = config.checkpoint.save_steps
    least = 0 if isinstance(saves, int) else 1
    require(
        _as_tuple(saves) and all(type(n) is int and n >= least for n in _as_tuple(saves)),
        f"checkpoint.save_steps={saves!r} must be a number of steps, or several separated by commas",
    )
    c = config.checkpoint
    for field, unset in (("load_step", -1), ("overwrite_optimizer", False)):
        require(
            c.load_path or c[field] == unset,
            f"checkpoint.{field}={c[field]} needs checkpoint.load_path, which is empty",
        )
    return Config(config)


def check_ranges(values: Mapping, prefix: str = ""):
    """Raises ConfigError if a number is outside of what its field's name allows.

    Args:
        values: {"optimizer.beta1": 0.9, ...}, some of a config's.
        prefix: of the message.
    """
    for field, value in values.items():
        if field in NOT_NEGATIVE:
            require(value >= 0, f"{prefix}{field}={value} must not be below 0")
        if re.match(r"optimizer\.([\w.]+[._])?(beta\d?|b\d|momentum)$|model\..*dropout$", field):
            require(0 <= value < 1, f"{prefix}{field}={value} must lie in [0, 1)")
        if re.match(r"optimizer\.([\w.]+[._])?eps$", field):
            require(value > 0, f"{prefix}{field}={value} must be above 0")


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _resolve_model(m: ConfigDict, tokenizer_vocab_size: int):
    m.num_kv_heads = m.num_kv_heads or m.num_heads
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
        f"model.attention=cudnn cannot do model.attn_dropout={m.attn_dropout}; take attention=plain",
    )
    require(
        not (m.tied_embeddings and m.head_bias),
        "model.head_bias=True and model.tied_embeddings=True exclude each other",
    )
    if not m.mlp_dim:
        m.mlp_dim = 64 * -(-8 * m.dim // (3 * 64)) if m.activation == "swiglu" else 4 * m.dim
    if not m.vocab_size:
        m.vocab_size = -(-tokenizer_vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    require(
        m.vocab_size >= tokenizer_vocab_size,
        f"model.vocab_size={m.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}; 0 fits it",
    )


def _check_schedule(config: ConfigDict):
    schedule, steps = config.schedule, config.steps
    expected = SCHEDULES[schedule.name]()
    require(
        set(schedule) == set(expected),
        f"schedule.name={schedule.name} has the fields {_names(expected)}, not {_names(schedule)}; choose it "
        f"as a group: --config=FILE:schedule={schedule.name}",
    )

    def length(name, value) -> int:
        tokens_per_step = config.batch_size * config.model.context_length
        return duration(value, steps, tokens_per_step, f"schedule.{name}")

    total = sum(length(name, schedule[name]) for name in ("warmup", "constant", "decay") if name in schedule)
    require(
        total <= steps,
        f"schedule={schedule.name}: warm-up and what follows last {total} steps, more than steps={steps}; "
        f"give them in percent or raise steps",
    )
    if "boundaries" in schedule:
        at = [length("boundaries", b) for b in _as_tuple(schedule.boundaries)]
        values = _as_tuple(schedule["values"])
        require(
            all(type(v) in (int, float) for v in values),
            f"schedule.values={schedule['values']!r} must be numbers",
        )
        require(
            len(at) == len(values) and len(at) >= 2 and all(a < b for a, b in pairwise(at)),
            f"schedule.boundaries={schedule.boundaries} must rise and be as many as schedule.values={values}",
        )


def check_mesh(sizes: Mapping[str, int], config: ConfigDict | Config):
    """Raises ConfigError unless each axis of the mesh divides what it splits; -1 divides everything."""
    m = config.model
    for axis, size in sizes.items():
        require(size > 0 or size == -1, f"mesh.{axis}={size} must be above 0, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    require(len(free) <= 1, f"mesh.{' and mesh.'.join(free)} are -1; only one axis can be what is left")
    require(sizes["context"] == 1, f"mesh.context={sizes['context']} does not work yet; set it to 1")
    split = [("fsdp", "model.dim", m.dim)] + [
        ("tensor", f"model.{field}", m[field])
        for field in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
    ]
    for axis, field, value in split:
        require(value % sizes[axis] == 0, f"{field}={value} is not a multiple of mesh.{axis}={sizes[axis]}")
    shares = abs(sizes["data"] * sizes["fsdp"])
    require(
        config.batch_size % shares == 0,
        f"batch_size={config.batch_size} is not a multiple of mesh.data*mesh.fsdp={shares}",
    )


def flatten(config: Mapping, prefix: str = "") -> dict:
    """{"model.dim": 768, ...}, lists as tuples: what a config and its JSON have in common."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def require(condition: bool, message: str):
    if not condition:
        raise ConfigError(message)
