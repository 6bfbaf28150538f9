"""Which model of `transformers` a config is, and where each of its parameters lies there.

The numbers are those of the checkpoint: nothing is computed, kernels are only turned and put side by side.
Shapes and meanings are those of the classes' code there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainit.checkpoints.convert import config_parts
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
    **{"norm_placement": "before", "norm_unit_offset": False, "qk_norm_over_heads": False},
    **{"embedding_scale": 1.0, "embedding_norm": False, "norm_scale": "all"},
    "softcap_form": lambda m: not m.logit_softcap or m.softcap_form == "tanh",
    "attention_scale": lambda m: m.attention_scale in (0, m.head_dim**-0.5),
    "num_kv_heads": lambda m: m.num_kv_heads == m.num_heads,
    "head_dim": lambda m: m.head_dim * m.num_heads == m.dim,
}
_MODERN: Mapping[str, object] = {
    **{"positions": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    **{"rope_scaling.factor": _any, "num_kv_heads": _any},
}
_OWN_HEAD_DIM = {"head_dim": lambda m: m.dim % m.num_heads == 0}  # checked there, needed or not
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
_OUT_NORMS = {
    "blocks/attention_out_norm": _LAYER + "post_attention_layernorm",
    "blocks/mlp_out_norm": _LAYER + "post_feedforward_layernorm",
}


FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            **{"positions": "learned", "norm": "layernorm", "use_bias": True},
            "activation": _one_of("activation", *config_parts.GELU),
        },
        config_parts.gpt2,
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
            "activation": _one_of("activation", *config_parts.GELU),
            **{"parallel_residual": _any, "rotary_fraction": _any},
        },
        config_parts.gpt_neox,
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
    Family(
        "llama",
        "LlamaForCausalLM",
        {**_MODERN, **_OWN_HEAD_DIM, "use_bias": _any},
        config_parts.llama,
        _LLAMA_NAMES,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {
            **{**_MODERN, "head_dim": _any, "window": lambda m: m.window > 0},
            "window_layers": lambda m: len(set(layers_with_window(m))) == 1,
        },
        config_parts.mistral,
        _LLAMA_NAMES,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        {**_MODERN, "qkv_bias": True, "window": _any},
        config_parts.qwen,
        _LLAMA_NAMES,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_MODERN, "head_dim": _any, "qk_norm": True, "window": _any},
        config_parts.qwen,
        _LLAMA_NAMES,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        {**_MODERN, "norm_placement": "after", "qk_norm": True, "qk_norm_over_heads": True},
        config_parts.llama,
        {**_LLAMA_NAMES, **_OUT_NORMS},
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **{**_MODERN, **_OWN_HEAD_DIM, "activation": "geglu", "norm_placement": "both"},
            **{"norm_unit_offset": True, "window": _any, "attention_softcap": _any, "logit_softcap": _any},
            "embedding_scale": lambda m: math.isclose(m.embedding_scale, math.sqrt(m.dim)),
            "attention_scale": lambda m: math.isclose(
                config_parts.inverse_square(m), round(config_parts.inverse_square(m))
            ),
        },
        config_parts.gemma2,
        {**_LLAMA_NAMES, **_OUT_NORMS, "blocks/mlp_norm": _LAYER + "pre_feedforward_layernorm"},
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
        found.setdefault(array_name(family, path), []).append(path)
    return list(found.values())


def tensors(family: Family, arrays: Arrays, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of one of the `groups` under their names there; those of blocks are cut into layers."""
    path = next(iter(arrays))
    module, name = path.rpartition("/")[0], array_name(family, path)
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
