"""The config of a model of Trainit, from the config.json of `transformers`."""

from collections.abc import Callable, Mapping
from typing import Any

from trainit.checkpoints.convert import config_parts, families
from trainit.checkpoints.convert.families import Family
from trainit.config import ConfigError, check_fields, require
from trainit.config import model as model_config

# What may differ from what Trainit would write: it changes no logits.
_FREE = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"}
_FREE |= {
    "tie_word_embeddings",
    "initializer_range",
    "sliding_window",
    "max_window_layers",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
}
# What must be off where Trainit would not write it.
_OFF = {"use_sliding_window", "sliding_window", "rope_scaling", "add_cross_attention", "is_encoder_decoder"}
_OFF |= {"scale_attn_by_inverse_layer_idx", "attention_bias", "mlp_bias", "use_parallel_residual"}
_OFF |= {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "clip_qkv",
    "use_bidirectional_attention",
    "quantization_config",
}
_SAME = {"gelu_pytorch_tanh": "gelu_new"}
_ACTIVATIONS = {there: here for here, there in config_parts.GELU.items()}
_ACTIVATIONS |= {other: _ACTIVATIONS[name] for other, name in _SAME.items()}


def _gpt2(a: Mapping) -> dict[str, Any]:
    sizes = {"dim": a["n_embd"], "num_heads": a["n_head"], "num_blocks": a["n_layer"]}
    sizes |= {"context_length": a["n_positions"], "mlp_dim": a.get("n_inner") or 4 * a["n_embd"]}
    sizes |= {"num_kv_heads": a["n_head"], "head_dim": a["n_embd"] // a["n_head"]}
    activation = _ACTIVATIONS.get(a["activation_function"], "gelu")
    return sizes | {"norm_epsilon": a["layer_norm_epsilon"], "activation": activation}


def _sizes(a: Mapping) -> dict[str, Any]:
    heads, rope = a["num_attention_heads"], _rope(a)
    scaling = {}
    if rope.get("rope_type") == "llama3":
        there = config_parts.ROPE_SCALING.items()
        scaling = {f"rope_scaling.{ours}": rope[theirs] for ours, theirs in there}
    return {
        "dim": a["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": a.get("num_key_value_heads") or heads,
        "head_dim": a.get("head_dim") or a["hidden_size"] // heads,
        "num_blocks": a["num_hidden_layers"],
        "context_length": a["max_position_embeddings"],
        "mlp_dim": a["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta", 10_000.0)),
        "norm_epsilon": a["rms_norm_eps"] if "rms_norm_eps" in a else a["layer_norm_eps"],
        **scaling,
    }


def _rope(a: Mapping) -> Mapping:
    """RoPE's parameters, from either form of them."""
    old = {"rope_theta": a.get("rope_theta") or a.get("rotary_emb_base")}
    old = {key: value for key, value in old.items() if value} | (a.get("rope_scaling") or {})
    return old | (a.get("rope_parameters") or {})


def _gpt_neox(a: Mapping) -> dict[str, Any]:
    return _sizes(a) | {
        "rotary_fraction": _rope(a).get("partial_rotary_factor", a.get("rotary_pct", 0.25)),
        "parallel_residual": a.get("use_parallel_residual", True),
        "activation": _ACTIVATIONS.get(a["hidden_act"], "gelu"),
    }


def _llama(a: Mapping) -> dict[str, Any]:
    return _sizes(a) | {"use_bias": bool(a.get("attention_bias"))}


def _with_windows(a: Mapping) -> dict[str, Any]:
    """The fields of a family with windows, in the layers that layer_types names, or in the last ones."""
    window = a.get("sliding_window") if a.get("use_sliding_window", True) else None
    count = a["num_hidden_layers"]
    kinds = a.get("layer_types") or ["sliding_attention"] * count
    first = 0 if a.get("layer_types") else a.get("max_window_layers", 0)
    chosen = [i for i in range(first, count) if kinds[i] == "sliding_attention"]
    if not window or not chosen:
        return _sizes(a)
    slices = {":": slice(0, None), "::2": slice(0, None, 2), f"{chosen[0]}:": slice(chosen[0], None)}
    short = [text for text, of in slices.items() if [*range(count)[of]] == chosen]
    return _sizes(a) | {"window": window, "window_layers": [*short, ",".join(map(str, chosen))][0]}


def _gemma2(a: Mapping) -> dict[str, Any]:
    kinds = [f"{('sliding', 'full')[i % 2]}_attention" for i in range(a["num_hidden_layers"])]
    return _with_windows({**a, "layer_types": a.get("layer_types") or kinds}) | {
        "attention_scale": a["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": a["attn_logit_softcapping"] or 0.0,
        "logit_softcap": a["final_logit_softcapping"] or 0.0,
        "embedding_scale": a["hidden_size"] ** 0.5,
    }


READERS: dict[str, Callable[[Mapping], dict[str, Any]]]
READERS = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "llama": _llama, "qwen2": _with_windows}
READERS |= {"qwen3": _with_windows, "mistral": _with_windows, "olmo2": _sizes, "gemma2": _gemma2}


def read(about: Mapping[str, Any], tied: bool, where: str) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the fields of its model. `tied`: there is no array of the head.

    Raises ConfigError, which begins with `where`, if Trainit has no such model.
    """
    kind = about.get("model_type")
    known = [family for family in families.FAMILIES if family.name == kind and kind in READERS]
    require(bool(known), f"{where}: model_type={kind!r} is not known; there are {', '.join(sorted(READERS))}")
    try:
        fields = READERS[str(kind)](about)
        vocab_size = about["vocab_size"]
    except KeyError as error:
        raise ConfigError(f"{where} lacks {error.args[0]}") from None
    fields |= {"vocab_size": vocab_size, "tied_embeddings": about.get("tie_word_embeddings", tied)}
    family = known[0]
    fields = {name: value for name, value in family.needed.items() if not callable(value)} | fields

    # Would Trainit write the same about such a model?
    try:
        model = model_config()
        model.update_from_flattened_dict(fields)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    check_fields(model, model, "model.", f"{where}: ")
    written = families.config_json(family, model, vocab_size, 0, "")
    _compare(about, written, where)
    return family, fields


def _compare(there: Mapping, here: Mapping, where: str) -> None:
    """Raises ConfigError for the first value that Trainit would write otherwise, or not at all."""
    for key, value in there.items():
        if isinstance(value, Mapping) and isinstance(here.get(key), Mapping):
            _compare(value, here[key], f"{where}: {key}")
        elif key in here and key not in _FREE:
            same, ours = (_SAME.get(v, v) if isinstance(v, str) else v for v in (value, here[key]))
            require(
                same in (ours, None),
                f"{where}: {key}={value!r} is not known together with the rest; Trainit knows {here[key]!r}",
            )
        elif key in _OFF and key not in here:
            require(not value, f"{where}: {key}={value!r} is not known")
        elif key == "layer_types":
            require(set(value or ()) <= {"full_attention"}, f"{where}: {key} has other than full_attention")
