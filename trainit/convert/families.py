"""Which model of `transformers` a config is, and where each of its parameters lies there.

The numbers are those of the checkpoint: nothing is computed, kernels are only turned and put side by side.
Shapes and meanings are those of the classes' code there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainit.config import Config, ConfigError, flatten, layers_with_window
from trainit.parallel.layout import matrix_shape, parameter_kind

QKV = ("query", "key", "value")
Arrays = Mapping[str, np.ndarray]  # by Trainit's paths


@dataclass(frozen=True)
class Family:
    """A model class of `transformers`, and the models of Trainit that it can express."""

    name: str  # `model_type` there
    architecture: str
    fields: Mapping[str, object]  # of a config's model, with the values that they must have, or conditions
    config: Callable[[Config], dict]  # what config.json has in addition to `_common`
    names: Mapping[str, str]  # of parameters, without the last part of the path; {} stands for the layer
    fused: str = ""  # "heads" or "columns": how query, key and value share an array; "": they do not
    transposed: bool = True  # kernels are (outputs, inputs)

    @property
    def needed(self) -> dict[str, object]:
        """`fields`, with those that it has like most families."""
        return {**_PLAIN, **self.fields}

    def unmet(self, model: Config) -> list[str]:
        """The fields by which a model is none of this family, as text."""
        unmet = []
        for name, value in flatten(model).items():
            want = self.needed.get(name, value)
            if not (want(model) if callable(want) else value == want):
                unmet.append(f"{name}={value!r}")
        return unmet


def _any(m: Config) -> bool:
    return True


def _one_of(name: str, *values: object) -> Callable[[Config], bool]:
    return lambda m: m[name] in values


# What a family has unless it says otherwise. Sizes, norm_epsilon and tied_embeddings are free in all.
_PLAIN: Mapping[str, object] = {
    **{"use_bias": False, "qkv_bias": False, "head_bias": False, "qk_norm": False, "logit_softcap": 0.0},
    **{"parallel_residual": False, "rope_interleaved": False, "rotary_fraction": 1.0},
    **{"rope_scaling.factor": 1.0, "window": 0, "attention_softcap": 0.0},
    "attention_scale": lambda m: m.attention_scale in (0, m.head_dim**-0.5),
    "num_kv_heads": lambda m: m.num_kv_heads == m.num_heads,
    "head_dim": lambda m: m.head_dim * m.num_heads == m.dim,
}
_MODERN: Mapping[str, object] = {
    **{"positions": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    **{"rope_scaling.factor": _any, "num_kv_heads": _any},
}
_OWN_HEAD_DIM = {"head_dim": lambda m: m.dim % m.num_heads == 0}  # checked there, needed or not
# Names there.
GELU = {"gelu": "gelu_new", "gelu_exact": "gelu"}
ROPE_SCALING = {
    **{"factor": "factor", "original_context": "original_max_position_embeddings"},
    **{"low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor"},
}
_LAYER = "model.layers.{}."
_LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "blocks/attention_norm": _LAYER + "input_layernorm",
    "blocks/mlp_norm": _LAYER + "post_attention_layernorm",
    **{f"blocks/attention/{part}": f"{_LAYER}self_attn.{part[0]}_proj" for part in QKV},
    "blocks/attention/out": _LAYER + "self_attn.o_proj",
    "blocks/attention/query_norm": _LAYER + "self_attn.q_norm",
    "blocks/attention/key_norm": _LAYER + "self_attn.k_norm",
    **{f"blocks/mlp/{part}": f"{_LAYER}mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def _rope(m: Config, **more: float) -> dict:
    """transformers 5 reads rope_parameters; 4.57 and other programs read the old fields alone."""
    scaled = {"rope_type": "llama3", **{ROPE_SCALING[name]: value for name, value in m.rope_scaling.items()}}
    is_scaled = m.rope_scaling.factor != 1
    parameters = {"rope_theta": m.rope_theta, **(scaled if is_scaled else {"rope_type": "default"}), **more}
    old = {"rope_scaling": scaled} if is_scaled else {}
    return {"rope_theta": m.rope_theta, **old, "rope_parameters": parameters}


def _sizes(m: Config) -> dict:
    return {
        "hidden_size": m.dim,
        "intermediate_size": m.mlp_dim,
        "num_hidden_layers": m.num_blocks,
        "num_attention_heads": m.num_heads,
        "max_position_embeddings": m.context_length,
    }


def _llama(m: Config) -> dict:
    heads = {"num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim}
    about = {"rms_norm_eps": m.norm_epsilon, "hidden_act": "silu"}
    return _sizes(m) | heads | about | {"attention_bias": m.use_bias, "mlp_bias": m.use_bias} | _rope(m)


def _mistral(m: Config) -> dict:
    return _llama(m) | {"sliding_window": m.window}


def _qwen(m: Config) -> dict:
    has_window = layers_with_window(m)
    kinds = {True: "sliding_attention", False: "full_attention"}
    return _llama(m) | {
        "use_sliding_window": any(has_window),
        "sliding_window": m.window or None,
        "max_window_layers": [*has_window, True].index(True),  # versions without layer_types read it
        "layer_types": [kinds[has] for has in has_window],
    }


def _gpt_neox(m: Config) -> dict:
    about = {"layer_norm_eps": m.norm_epsilon, "hidden_act": GELU[m.activation], "attention_bias": True}
    about |= {"use_parallel_residual": m.parallel_residual}
    old = {"rotary_emb_base": m.rope_theta, "rotary_pct": m.rotary_fraction}
    return _sizes(m) | about | old | _rope(m, partial_rotary_factor=m.rotary_fraction)


def _gpt2(m: Config) -> dict:
    return {
        **{"n_embd": m.dim, "n_inner": m.mlp_dim, "n_layer": m.num_blocks, "n_head": m.num_heads},
        **{"n_positions": m.context_length, "layer_norm_epsilon": m.norm_epsilon},
        **{
            "activation_function": GELU[m.activation],
            "embd_pdrop": m.gpt_dropout,
            "attn_pdrop": m.attn_dropout,
        },
        "resid_pdrop": m.transformer_dropout,
    }


FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            **{"positions": "learned", "norm": "layernorm", "use_bias": True},
            "activation": _one_of("activation", *GELU),
        },
        _gpt2,
        {
            "token_embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
            "blocks/attention_norm": "transformer.h.{}.ln_1",
            "blocks/mlp_norm": "transformer.h.{}.ln_2",
            **{f"blocks/attention/{part}": "transformer.h.{}.attn.c_attn" for part in QKV},
            "blocks/attention/out": "transformer.h.{}.attn.c_proj",
            "blocks/mlp/up": "transformer.h.{}.mlp.c_fc",
            "blocks/mlp/down": "transformer.h.{}.mlp.c_proj",
        },
        fused="columns",
        transposed=False,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            **{"positions": "rope", "norm": "layernorm", "use_bias": True},
            "activation": _one_of("activation", *GELU),
            **{"parallel_residual": _any, "rotary_fraction": _any},
        },
        _gpt_neox,
        {
            "token_embedding": "gpt_neox.embed_in",
            "final_norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
            "blocks/attention_norm": "gpt_neox.layers.{}.input_layernorm",
            "blocks/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
            **{f"blocks/attention/{part}": "gpt_neox.layers.{}.attention.query_key_value" for part in QKV},
            "blocks/attention/out": "gpt_neox.layers.{}.attention.dense",
            "blocks/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
            "blocks/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        },
        fused="heads",
    ),
    Family("llama", "LlamaForCausalLM", {**_MODERN, **_OWN_HEAD_DIM, "use_bias": _any}, _llama, _LLAMA_NAMES),
    Family(
        "mistral",
        "MistralForCausalLM",
        {
            **{**_MODERN, "head_dim": _any, "window": lambda m: m.window > 0},
            "window_layers": lambda m: len(set(layers_with_window(m))) == 1,
        },
        _mistral,
        _LLAMA_NAMES,
    ),
    Family("qwen2", "Qwen2ForCausalLM", {**_MODERN, "qkv_bias": True, "window": _any}, _qwen, _LLAMA_NAMES),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_MODERN, "head_dim": _any, "qk_norm": True, "window": _any},
        _qwen,
        _LLAMA_NAMES,
    ),
)


def find(model: Config) -> Family:
    """The family that a resolved config's model belongs to; ConfigError names the fields that none has."""
    nearest = min(FAMILIES, key=lambda family: len(family.unmet(model)))
    if unmet := nearest.unmet(model):
        raise ConfigError(
            f"no model class of transformers has model.{', model.'.join(unmet)} together with the rest of "
            f"this model; the nearest is {nearest.architecture}"
        )
    return nearest


def config_json(family: Family, model: Config, vocab_size: int, end_of_text: int, dtype: str) -> dict:
    """The content of config.json."""
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
        **family.config(model),
    }


def array_name(family: Family, path: str) -> str:
    """The name there of the array that holds a parameter; {} stands for the layer."""
    module, _, leaf = path.rpartition("/")
    return f"{family.names[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def own_part(family: Family, path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A view of one layer's parameter, of this shape, in an array there: the way back from `tensors`.

    Raises ValueError if it does not have that size.
    """
    module = path.rpartition("/")[0]
    if module == "position_embedding":  # a shorter context has its first rows
        return array[: shape[0]].reshape(shape)
    if module == "token_embedding":
        return array.reshape(shape)
    matrix = array.T if family.transposed or module == "head" else array
    part = module.rpartition("/")[2]
    if not family.fused or part not in QKV:
        if matrix.ndim != 1 and matrix.shape != matrix_shape(path, shape):
            raise ValueError
        return matrix.reshape(shape)
    number, size = QKV.index(part), shape[-1]
    if family.fused == "heads":  # (..., H * 3 * K)
        return matrix.reshape(*shape[:-2], shape[-2], 3, size)[..., number, :]
    return matrix.reshape(*shape[:-2], 3, *shape[-2:])[..., number, :, :]


def groups(paths: list[str], family: Family) -> list[list[str]]:
    """Trainit's paths, those that share an array together: what has to be in memory at once."""
    found: dict[str, list[str]] = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        found.setdefault(f"{family.names[module]} {leaf}", []).append(path)
    return list(found.values())


def tensors(family: Family, arrays: Arrays, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of one of the `groups` under their names there; those of blocks are cut into layers."""
    module, _, leaf = next(iter(arrays)).rpartition("/")
    name = f"{family.names[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    if not module.startswith("blocks/"):
        return {name: _one(family, arrays, module, vocab_size)}
    count = len(next(iter(arrays.values())))
    layers = ({path: array[i] for path, array in arrays.items()} for i in range(count))
    return {name.format(i): _one(family, layer, module, vocab_size) for i, layer in enumerate(layers)}


def _one(family: Family, arrays: Arrays, module: str, vocab_size: int) -> np.ndarray:
    """One array there, of the arrays of one layer here. Rows that pad the vocabulary are cut off."""
    if module == "token_embedding":
        return arrays["token_embedding/embedding"][:vocab_size]
    if module == "head":
        return arrays["head/kernel"].T[:vocab_size]
    paths = sorted(arrays, key=lambda path: QKV.index(path.split("/")[2])) if len(arrays) > 1 else [*arrays]
    if len(paths) > 1 and family.fused == "heads":  # (D, H, K) or (H, K) each -> (D, H, 3 K) or (H, 3 K)
        joined = np.concatenate([arrays[path] for path in paths], axis=-1)
        array = joined.reshape(*joined.shape[:-2], -1)
    else:
        array = np.concatenate([_flat(path, arrays[path]) for path in paths], axis=-1)
    return array.T if family.transposed else array  # a vector is its own transpose


def _flat(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel as a matrix (inputs, outputs), anything else as a vector."""
    if parameter_kind(path) == "vector":
        return array.reshape(-1)
    return array.reshape(matrix_shape(path, array.shape))
