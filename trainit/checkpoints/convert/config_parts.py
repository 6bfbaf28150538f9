"""What config.json has for each family of `transformers`, in addition to what all have."""

from trainit.config import Config, layers_with_window

# Names there.
GELU = {"gelu": "gelu_new", "gelu_exact": "gelu"}
ROPE_SCALING = {
    **{"factor": "factor", "original_context": "original_max_position_embeddings"},
    **{"low_frequency_factor": "low_freq_factor", "high_frequency_factor": "high_freq_factor"},
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


def llama(m: Config) -> dict:
    heads = {"num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim}
    about = {"rms_norm_eps": m.norm_epsilon, "hidden_act": "silu"}
    return _sizes(m) | heads | about | {"attention_bias": m.use_bias, "mlp_bias": m.use_bias} | _rope(m)


def mistral(m: Config) -> dict:
    return llama(m) | {"sliding_window": m.window}


def _windows(m: Config) -> dict:
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        "sliding_window": m.window or None,
        "layer_types": [kinds[has] for has in layers_with_window(m)],
    }


def qwen(m: Config) -> dict:
    has_window = layers_with_window(m)
    first = [*has_window, True].index(True)  # versions without layer_types read it
    return llama(m) | _windows(m) | {"use_sliding_window": any(has_window), "max_window_layers": first}


def gemma2(m: Config) -> dict:
    return {
        **llama(m),
        **_windows(m),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh"),
        "sliding_window": m.window or m.context_length,  # needed there, used or not
        "query_pre_attn_scalar": round(inverse_square(m)),
        "attn_logit_softcapping": m.attention_softcap or None,
        "final_logit_softcapping": m.logit_softcap or None,
    }


def inverse_square(m: Config) -> float:
    """The number there whose inverse root is attention's scale."""
    return m.attention_scale**-2 if m.attention_scale else m.head_dim


def gpt_neox(m: Config) -> dict:
    about = {"layer_norm_eps": m.norm_epsilon, "hidden_act": GELU[m.activation], "attention_bias": True}
    about |= {"use_parallel_residual": m.parallel_residual}
    old = {"rotary_emb_base": m.rope_theta, "rotary_pct": m.rotary_fraction}
    return _sizes(m) | about | old | _rope(m, partial_rotary_factor=m.rotary_fraction)


def gpt2(m: Config) -> dict:
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
