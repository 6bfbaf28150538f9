"""Which model of `transformers` a config is, and where each of its parameters lies there.

The numbers are those of the checkpoint: nothing is computed, kernels are only turned and put side by side.
Shapes are from the classes GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM and Qwen3ForCausalLM.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from trainit.config import Config, ConfigError
from trainit.model.layers import NORM_EPSILON
from trainit.parallel.layout import matrix_shape, parameter_kind

QKV = ("query", "key", "value")
Arrays = Mapping[str, np.ndarray]  # by Trainit's paths


@dataclass(frozen=True)
class Family:
    """A model class of `transformers`, and the models of Trainit that it can express."""

    name: str  # `model_type` there
    architecture: str
    fields: Mapping[str, object]  # of a config's model, with the values that they must have
    same_kv_heads: bool  # whether each query head has its own key and value
    config: Callable[[Config], dict]  # what config.json has in addition to `_common`
    names: Mapping[str, str]  # of parameters, without the last part of the path; {} stands for the layer
    fused: str = ""  # "heads" or "columns": how query, key and value share an array; "": they do not
    transposed: bool = True  # kernels are (outputs, inputs)

    def unmet(self, model: Config) -> list[str]:
        """The fields by which a model is none of this family, as text."""
        different = [f"{name}={model[name]!r}" for name, value in self.fields.items() if model[name] != value]
        grouped = self.same_kv_heads and model.num_kv_heads != model.num_heads
        return different + [f"num_kv_heads={model.num_kv_heads}"] * grouped


_ROPE = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu"}
_EXPRESSED = {"head_bias": False, "logit_softcap": 0.0}
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
    # transformers 5 reads rope_parameters alone; 4.57 and other programs read the old fields alone.
    return {"rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta, **more}}


def _sizes(m: Config) -> dict:
    return {
        "hidden_size": m.dim,
        "intermediate_size": m.mlp_dim,
        "num_hidden_layers": m.num_blocks,
        "num_attention_heads": m.num_heads,
        "max_position_embeddings": m.context_length,
    }


def _llama(m: Config) -> dict:
    heads = {"num_key_value_heads": m.num_kv_heads, "head_dim": m.dim // m.num_heads}
    about = {"rms_norm_eps": NORM_EPSILON, "hidden_act": "silu", "rope_theta": m.rope_theta}
    return _sizes(m) | heads | about | {"attention_bias": m.use_bias, "mlp_bias": m.use_bias} | _rope(m)


def _gpt_neox(m: Config) -> dict:
    about = {"layer_norm_eps": NORM_EPSILON, "hidden_act": "gelu_new", "use_parallel_residual": False}
    old = {"rotary_emb_base": m.rope_theta, "rotary_pct": 1.0, "attention_bias": True}
    return _sizes(m) | about | old | _rope(m, partial_rotary_factor=1.0)


def _gpt2(m: Config) -> dict:
    return {
        **{"n_embd": m.dim, "n_inner": m.mlp_dim, "n_layer": m.num_blocks, "n_head": m.num_heads},
        **{"n_positions": m.context_length, "layer_norm_epsilon": NORM_EPSILON},
        **{"activation_function": "gelu_new", "embd_pdrop": m.gpt_dropout, "attn_pdrop": m.attn_dropout},
        "resid_pdrop": m.transformer_dropout,
    }


FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            **{"positions": "learned", "norm": "layernorm", "activation": "gelu"},
            **{"use_bias": True, "qk_norm": False, **_EXPRESSED},
        },
        True,
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
            **{"positions": "rope", "norm": "layernorm", "activation": "gelu"},
            **{"use_bias": True, "qk_norm": False, **_EXPRESSED},
        },
        True,
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
    Family(
        "llama", "LlamaForCausalLM", {**_ROPE, "qk_norm": False, **_EXPRESSED}, False, _llama, _LLAMA_NAMES
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_ROPE, "qk_norm": True, "use_bias": False, **_EXPRESSED},
        False,
        _llama,
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
