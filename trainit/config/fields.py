"""Every field of a config with its unit and bounds, and the choices of whole groups."""

import re
from collections.abc import Callable, Iterable, Mapping

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
    c.batch_schedule = ""  # other batch sizes from given steps on: "20%: 256; 2e9 tokens: 512"; empty: none
    c.device_batch_size = 16  # sequences per device in a micro-step at most; 0: no bound
    c.logits_mib = 256.0  # MiB of float32 logits that a device has in memory at once; 0: no bound
    c.z_loss = 0.0  # weight of log(softmax's denominator)^2 in what is minimized; 0: none
    c.clip_norm = 10.0  # global l2 norm of the gradient at most; 0: no clipping
    c.stall_seconds = 300.0  # without a step in so long, or in 20 usual step times, end the run; 0: never
    c.max_skipped = 15  # non-finite steps in a row that stop the run; > 0
    c.precision = "bfloat16"  # of matrix products and activations: bfloat16, float16, float32
    c.precision_of = ConfigDict()  # of parts, as above, or float8 in matrix products; empty: as above
    c.precision_of.attention = ""  # its four products with kernels and, but for float8, its scores
    c.precision_of.mlp = ""  # its two or three products
    c.precision_of.head = ""  # not float8
    c.platform = ""  # cpu, cuda, rocm, tpu; empty: the best there is
    c.cpu_devices = 1  # virtual devices where there is no accelerator; > 0
    c.mesh = ConfigDict()  # devices along each axis; > 0, and one of them may be -1: what is left
    c.mesh.data = 1  # replicas
    c.mesh.fsdp = -1  # parameters and optimizer state are split
    c.mesh.tensor = 1  # heads, MLP width, vocabulary, and the residual's length are split
    c.mesh.context = 1  # sequence length is split; 1 is all that works yet
    c.model = model()
    c.optimizer_files = ""  # hash of the optimizers' files outside the package; filled when the run starts
    c.optimizer_state = "float32"  # what its arrays are kept in between steps: float32, bfloat16, int8
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
    c.diagnostics = DIAGNOSTICS["none"]()
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
    m.context_length = 1024  # tokens of a sequence; multiple of mesh.tensor, which splits the residual by it
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
    m.document_mask = False  # attention stays within a document, where positions start anew
    m.end_of_text = -1  # id that ends a document, for document_mask; -1: the tokenizer's
    m.logit_softcap = 0.0  # logits pass through cap * tanh(logits / cap); 0: none
    m.gpt_dropout = 0.0  # on the sum of embeddings; 0 <= p < 1, as the three below
    m.attn_dropout = 0.0  # on attention weights
    m.attn_linear_dropout = 0.0  # on attention's output
    m.transformer_dropout = 0.0  # on the MLP's output
    m.attention = "auto"  # plain, blockwise (memory linear in length), cudnn; auto: cudnn or else blockwise
    # remat: none; attention: all scores; dots: all but matrix products; block: all but its input; offload:
    # as dots, and the products wait in the host's memory
    m.remat = "none"  # what the backward pass computes once more instead of keeping it
    m.scan_layers = True  # one compiled block in a loop; False: unrolled
    m.update(changes)
    return m


def dataset(path: str) -> ConfigDict:
    d = ConfigDict()
    d.path = path  # a prepared dataset, or tokens of others; "demo": presidents' messages, made on first use
    d.validation_path = ""  # where others' tokens to validate on lie; empty: beside those to train on
    d.tokenizer = ""  # of others' tokens: bytes, gpt2, gpt2:FOLDER, sentencepiece:FILE, tokenizers:FILE
    d.mixture = ""  # "Github 0.3, data/web 0.7; 50%: ...": subsets, folders with weights; empty: all of path
    d.order = "shuffled"  # each epoch anew; blocks: neighbours stay near; sequential: as it lies on the disk
    d.block_tokens = 1 << 24  # tokens of a block, for order=blocks: what a file system reads well; > 0
    d.workers = 0  # worker processes of the loader; 0: a thread of this process
    d.prefetch = 2  # batches that are read ahead; > 0
    return d


def jsonl(path: str = "pile/train", validation_path: str = "pile/val.jsonl.zst") -> ConfigDict:
    d = dataset(path)  # not prepared: .jsonl, .jsonl.zst and .jsonl.gz; a file, a glob, or a whole folder
    d.validation_path = validation_path  # likewise; eval.sequences from its beginning are held in memory
    d.tokenizer = "gpt2"  # bytes, gpt2, gpt2:FOLDER, sentencepiece:FILE, tokenizers:FILE
    d.text_field = "text"  # dotted path of the text in a line's JSON
    d.subset_field = "meta.pile_set_name"  # dotted path of the subset by which validation is told apart
    d.streams = 16  # parts of the data, each read by one worker; a divisor of all batch sizes
    d.window = 256  # sequences of a stream that are shuffled among themselves; > 0
    d.workers = 2  # worker processes of each process of the job, as above
    return d


def diagnostics(every_steps: int = 1, **changes) -> ConfigDict:
    """Statistics of the trajectory; by default all but the costly ones that need a choice."""
    d = ConfigDict()
    d.every_steps = every_steps  # steps between measurements; 0: none, and a step without their cost
    d.norms = True  # l1, l2, max of parameters, gradients and updates, and the updates' ratio to parameters
    d.norms_by = ("kind",)  # and also by kind, layer, parameter
    d.last_gradient = True  # keeps a gradient: products and cosines with the one before
    d.past_gradients = True  # keeps a sum of gradients: the same with all before
    d.last_parameters = True  # keeps parameters: products and cosines with how they have moved
    d.last_loss = True  # a forward pass: how much the loss of this batch has changed by the last update
    d.spectra = ""  # pattern over whole paths of matrices: spectral norm, effective rank, by SVD; "": none
    d.noise_scale = False  # gradient noise scale; needs two micro-steps
    d.update(changes)
    return d


def _schedule(name: str, **fields) -> Callable[[], ConfigDict]:
    fields |= {"rewarm_at": (), "rewarm": "1%"}  # where the rate begins anew at 0, and how long it then rises
    return lambda: ConfigDict(
        {"name": name, **{k: v if isinstance(v, float) else _any(v) for k, v in fields.items()}}
    )


_MODERN = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "use_bias": False}
MODELS = {
    "gpt2": model,
    "gpt2_medium": lambda: model(dim=1024, num_heads=16, num_blocks=24),
    "gpt2_large": lambda: model(dim=1280, num_heads=20, num_blocks=36),
    "gpt2_xl": lambda: model(dim=1600, num_heads=25, num_blocks=48),
    "modern": lambda: model(**_MODERN, qk_norm=True),
    # GPT-3 XL, 1.3B (Brown et al. 2020, arXiv 2005.14165, table 2.1; heads of 128).
    "gpt3_xl": lambda: model(dim=2048, num_heads=16, num_blocks=24, context_length=2048),
    # Touvron et al. 2023, arXiv 2307.09288.
    "llama2_7b": lambda: model(
        **_MODERN, dim=4096, num_heads=32, num_blocks=32, mlp_dim=11_008, context_length=4096
    ),
    "llama2_70b": lambda: model(
        **_MODERN,
        dim=8192,
        num_heads=64,
        num_kv_heads=8,
        num_blocks=80,
        mlp_dim=28_672,
        context_length=4096,
    ),
}
# Durations are in steps (500), percent of all steps ("10%") or tokens ("2e9 tokens").
SCHEDULES = {
    "constant": _schedule("constant", warmup="10%"),
    "linear": _schedule("linear", warmup="10%", constant=0, final=0.0),  # then constant, then down to final
    "cosine": _schedule(
        "cosine", warmup="10%", cycles=1, final=0.0
    ),  # final: fraction of the peak, at the end
    # Both cool down in a straight line over the last `decay`, if there are any.
    "inverse_sqrt": _schedule("inverse_sqrt", warmup="10%", decay=0, final=0.0),
    "power": _schedule("power", warmup="10%", exponent=0.5, decay=0, final=0.0),  # exponent: > 0
    "trapezoid": _schedule("trapezoid", warmup="10%", decay="20%", final=0.0),
    # Straight lines between (boundary, value); boundaries are durations, values fractions of the peak.
    "piecewise_linear": _schedule(
        "piecewise_linear", warmup=0, boundaries=("0%", "50%", "100%"), values=(0.0, 1.0, 0.0)
    ),
}
DATASETS = {"pile": lambda: dataset("data/pile"), "demo": lambda: dataset("demo"), "jsonl": jsonl}
_NO_COPIES = dict.fromkeys(("last_gradient", "past_gradients", "last_parameters", "last_loss"), False)
DIAGNOSTICS = {
    "none": lambda: diagnostics(every_steps=0),
    "norms": lambda: diagnostics(**_NO_COPIES),
    "full": diagnostics,
}
GROUPS = {"model": MODELS, "schedule": SCHEDULES, "dataset": DATASETS, "diagnostics": DIAGNOSTICS}
# Fields that say where and how a run runs, and not what it is: they may change at a resume.
FREE = re.compile(
    r"(max_minutes|stall_seconds|max_skipped|device_batch_size|logits_mib|platform|cpu_devices)$"
    r"|model\.(attention|remat|scan_layers)$"
    r"|dataset\.(path|validation_path|subset_field|tokenizer|workers|prefetch)$"  # it has a fingerprint
    r"|(mesh|eval|log|checkpoint|diagnostics|wandb)\."
)
DROPOUTS = ("gpt_dropout", "attn_dropout", "attn_linear_dropout", "transformer_dropout")


def choose(config: ConfigDict, arg: str, **groups: Mapping[str, Callable[[], ConfigDict]]) -> ConfigDict:
    """Replaces whole groups of `config` by the named choices in `arg`.

    Args:
        config: changed in place and returned.
        arg: what stands behind the config file's colon, such as "model=gpt2_medium,schedule=cosine".
        **groups: groups beside those of GROUPS: each maps a choice to its sub-config's maker.

    Raises:
        ConfigError: an unknown group or choice; the message lists what there is.
    """
    groups = {**GROUPS, **groups}
    for part in filter(None, arg.split(",")):
        group, equals, choice = part.partition("=")
        if group not in groups or not equals:
            raise ConfigError(f"unknown group {part!r}: write GROUP=CHOICE, GROUP one of {names(groups)}")
        if choice not in groups[group]:
            raise ConfigError(f"unknown {group} {choice!r}: there are {names(groups[group])}")
        with config.ignore_type():
            config[group] = groups[group][choice]()
    return config


def names(choices: Iterable[str]) -> str:
    return ", ".join(sorted(choices))


def duration(value: int | str, steps: int, of_tokens: Callable[[float], float], field: str) -> int:
    """A duration in steps: 500, "500", "10%" of `steps`, or "2e9 tokens", which `of_tokens` turns into steps.

    Errors name `field`.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(%|tokens)?\s*", str(value))
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} is not a duration: write 500, '10%' or '2e9 tokens'") from None
    require(number < 1e18, f"{field}={value!r} is too long")
    whole = match[2] is not None or number == int(number)
    require(whole, f"{field}={value!r} is not a whole number of steps")
    return round(of_tokens(number) if match[2] == "tokens" else number * (steps / 100 if match[2] else 1))


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
