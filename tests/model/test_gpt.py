"""The GPT against an independent forward pass in NumPy, and what must hold of any of its variants."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainit.config
from trainit import optimizers
from trainit.checkpoints.convert import families
from trainit.model.attention import plain
from trainit.model.dropout import dropout
from trainit.model.gpt import GPT
from trainit.parallel.layout import PARAMETERS, logical_axes, parameter_kind
from trainit.parallel.mesh import choose_attention

MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "positions": "rope",
    "use_bias": False,
    "qk_norm": True,
}
VARIANTS = {
    "gpt2": {},
    "head_bias": {"head_bias": True},
    "one_block": {"num_blocks": 1},
    "narrow_mlp": {"mlp_dim": 24},
    "rope": {"positions": "rope"},
    "rope_theta": {"positions": "rope", "rope_theta": 50.0},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"activation": "swiglu"},
    "relu2": {"activation": "relu2"},
    "qk_norm": {"qk_norm": True},
    "two_kv_heads": {"num_kv_heads": 2},
    "one_kv_head": {"num_kv_heads": 1},
    "tied": {"tied_embeddings": True},
    "pythia": {
        **{"positions": "rope", "rotary_fraction": 0.5, "parallel_residual": True},
        **{"activation": "gelu_exact", "norm_epsilon": 1e-3},
    },
    "rope_scaling": {
        **{"positions": "rope", "rope_interleaved": True, "rope_scaling.factor": 4.0, "rope_theta": 100.0},
        **{"rope_scaling.original_context": 8, "rope_scaling.low_frequency_factor": 0.5},
        "rope_scaling.high_frequency_factor": 1.0,
    },
    "head_dim": {
        "head_dim": 6,
        "num_kv_heads": 2,
        "activation": "geglu",
        "use_bias": False,
        "qkv_bias": True,
    },
    "window": {"window": 5, "attention_scale": 0.5},
    "window_layers": {
        **{"window": 3, "window_layers": "::2", "attention_softcap": 0.3, "remat": "dots"},
        "num_blocks": 3,
    },
    "olmo2": MODERN | {"norm_placement": "after", "qk_norm_over_heads": True, "num_kv_heads": 2},
    "norms_everywhere": {"norm_placement": "both", "norm_unit_offset": True, "embedding_scale": 0.0},
    "softcap": {"logit_softcap": 3.0},
    "no_bias": {"use_bias": False},
    "no_bias_but_head": {"use_bias": False, "head_bias": True},
    "modern": MODERN,
    "qk_norm_rope": {"qk_norm": True, "positions": "rope", "num_kv_heads": 2},
    "modern_biases": MODERN | {"use_bias": True, "num_kv_heads": 2, "head_bias": True},
    "everything": MODERN | {"num_kv_heads": 2, "tied_embeddings": True, "logit_softcap": 5.0},
    "everything_relu2": MODERN | {"num_kv_heads": 1, "activation": "relu2", "logit_softcap": 5.0},
}
SMALL = {"dim": 32, "num_heads": 4, "num_blocks": 2, "context_length": 16, "vocab_size": 128}
DROPOUTS = ("gpt_dropout", "attn_dropout", "attn_linear_dropout", "transformer_dropout")


def model_config(**changes):
    config = trainit.config.defaults()
    config.model.update_from_flattened_dict(SMALL | changes)
    config.optimizer = optimizers.choices()["adamw"]()
    return trainit.config.resolve(config, 100).model


def by_path(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def random_parameters(model: GPT, seed: int) -> dict:
    """Every parameter random, so that no bias or scale is hidden by a 0 or 1.

    Embeddings, queries and keys are small enough for the epsilon of the norms that follow them to show
    where there is one.
    """
    rng = np.random.default_rng(seed)
    shapes = model.shapes
    normalized = any("query_norm" in path for path in by_path(shapes))

    def draw(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        values = rng.standard_normal(leaf.shape)
        if path.endswith("scale"):
            values = 1 + 0.3 * values
        elif path.endswith("embedding"):
            values *= 0.05
        elif path.endswith("kernel"):
            values *= 0.25
        else:
            values *= 0.5
        if normalized and ("/query/" in path or "/key/" in path):
            values *= 0.02
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(draw, shapes)


def random_tokens(shape, seed: int, vocab_size: int = SMALL["vocab_size"]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, shape), jnp.int32)


def numpy_norm(x, p, kind, c):
    """Over the last axis; p: {"scale": ..., "bias": ... or absent}."""
    if kind == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_epsilon)
    else:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
    return y * (p["scale"] + c.norm_unit_offset if "scale" in p else 1.0) + p.get("bias", 0.0)


def numpy_frequencies(count, c):
    """RoPE's angles from one position to the next, those of low frequency divided, one by one."""
    s, scaled = c.rope_scaling, []
    for frequency in c.rope_theta ** (-np.arange(count) / count):
        wavelength = 2 * np.pi / frequency
        longest = s.original_context / s.low_frequency_factor
        shortest = s.original_context / s.high_frequency_factor
        part = 1 / s.factor if wavelength > longest else 1.0
        if shortest <= wavelength <= longest:
            smooth = s.original_context / wavelength - s.low_frequency_factor
            smooth /= s.high_frequency_factor - s.low_frequency_factor
            part = (1 - smooth) / s.factor + smooth
        scaled.append(part * frequency)
    return np.array(scaled)


def numpy_rotate(x_LK, c):
    """RoPE as a complex rotation of the pairs (i, i + R/2), or (2i, 2i + 1), of the first R numbers."""
    L, count = len(x_LK), int(x_LK.shape[1] * c.rotary_fraction) // 2
    first, second = np.arange(count), np.arange(count) + count
    if c.rope_interleaved:
        first, second = 2 * first, 2 * first + 1
    z = x_LK[:, first] + 1j * x_LK[:, second]
    z = z * np.exp(1j * np.outer(np.arange(L), numpy_frequencies(count, c)))
    y_LK = x_LK.copy()
    y_LK[:, first], y_LK[:, second] = z.real, z.imag
    return y_LK


def numpy_gelu(h, exact=False):
    if exact:
        return h * np.vectorize(lambda x: 0.5 + 0.5 * math.erf(x / math.sqrt(2)))(h)
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


def numpy_attention(x_LD, p, c, layer):
    """One sequence through one layer's attention, head by head."""
    has_window = c.window and (c.window_layers == ":" or layer % 2 == 0)
    L, out = len(x_LD), np.zeros_like(x_LD)
    for head in range(c.num_heads):
        kv_head = head // (c.num_heads // c.num_kv_heads)

        def project(name, index):
            bias = p[name]["bias"][index] if c.use_bias or c.qkv_bias else 0.0
            return x_LD @ p[name]["kernel"][:, index] + bias

        def over_heads(name, index, heads):
            whole = np.concatenate([project(name, h) for h in range(heads)], axis=-1)
            return np.split(numpy_norm(whole, p[f"{name}_norm"], "rmsnorm", c), heads, axis=-1)[index]

        q, k, v = project("query", head), project("key", kv_head), project("value", kv_head)
        if c.qk_norm_over_heads:
            q = over_heads("query", head, c.num_heads)
            k = over_heads("key", kv_head, c.num_kv_heads)
        elif c.qk_norm:
            q = numpy_norm(q, p.get("query_norm", {}), "rmsnorm", c)
            k = numpy_norm(k, p.get("key_norm", {}), "rmsnorm", c)
        if c.positions == "rope":
            q, k = numpy_rotate(q, c), numpy_rotate(k, c)
        for i in range(L):
            seen = slice(max(0, i + 1 - c.window) if has_window else 0, i + 1)
            scores = k[seen] @ q[i] * (c.attention_scale or 1 / np.sqrt(q.shape[1]))
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            weights = np.exp(scores)
            out[i] += (weights / weights.sum()) @ v[seen] @ p["out"]["kernel"][head]
    return out + (p["out"]["bias"] if c.use_bias else 0.0)


def numpy_mlp(x_LD, p, c):
    def linear(x, name):
        return x @ p[name]["kernel"] + (p[name]["bias"] if c.use_bias else 0.0)

    h = linear(x_LD, "up")
    if c.activation.startswith("gelu"):
        h = numpy_gelu(h, c.activation == "gelu_exact")
    elif c.activation == "relu2":
        h = np.maximum(h, 0) ** 2
    else:
        gate = linear(x_LD, "gate")
        h = (numpy_gelu(gate) if c.activation == "geglu" else gate / (1 + np.exp(-gate))) * h
    return linear(h, "down")


def numpy_logits(parameters, tokens_BL, c):
    """GPT-2 and its modern parts, float64, one sequence at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    logits = []
    for tokens_L in np.asarray(tokens_BL):
        x = p["token_embedding"]["embedding"][tokens_L]
        if c.positions == "learned":
            x = x + p["position_embedding"]["embedding"][np.arange(len(tokens_L))]
        x = x * (c.embedding_scale or np.sqrt(c.dim))
        x = numpy_norm(x, p["embedding_norm"], c.norm, c) if c.embedding_norm else x
        for n in range(c.num_blocks):
            layer = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])

            def norm(y, name, layer=layer):
                has = name in layer or (c.norm_scale == "none" and "out" not in name)
                return numpy_norm(y, layer.get(name, {}), c.norm, c) if has else y

            y = numpy_attention(norm(x, "attention_norm"), layer["attention"], c, n)
            before, x = x, x + norm(y, "attention_out_norm")
            y = numpy_mlp(norm(before if c.parallel_residual else x, "mlp_norm"), layer["mlp"], c)
            x = x + norm(y, "mlp_out_norm")
        x = numpy_norm(x, p.get("final_norm", {}), c.norm, c)
        if c.tied_embeddings:
            y = x @ p["token_embedding"]["embedding"].T
        else:
            y = x @ p["head"]["kernel"] + (p["head"]["bias"] if c.head_bias else 0.0)
        if c.softcap_form == "rsqrt":
            y = y / np.sqrt(1 + (y / c.logit_softcap) ** 2)
        elif c.logit_softcap:
            y = c.logit_softcap * np.tanh(y / c.logit_softcap)
        logits.append(y)
    return np.stack(logits)


OF_TRACK = {  # of modded-nanoGPT's optimization track
    "rsqrt_softcap": {"logit_softcap": 3.0, "softcap_form": "rsqrt", "norm_scale": "none", "qk_norm": True},
    "embedding_norm": MODERN | {"embedding_norm": True, "norm_scale": "blocks"},
}


@pytest.mark.parametrize("changes", (VARIANTS | OF_TRACK).values(), ids=VARIANTS | OF_TRACK)
def test_logits_equal_numpy(changes):
    c = model_config(**changes)
    model = GPT(c, "float32")
    parameters = random_parameters(model, seed=1)
    tokens_BL = random_tokens((2, 13), seed=2)  # shorter than the context
    logits_BLV = jax.jit(model)(parameters, tokens_BL)
    expected_BLV = numpy_logits(parameters, tokens_BL, c)
    assert logits_BLV.dtype == jnp.float32
    assert expected_BLV.std() > 0.2
    # float32 rounds at 6e-8 of values which residual sums and squared activations bring to some tens.
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=1e-5 * np.abs(expected_BLV).max())


def test_logits_of_a_full_context_and_other_integer_types():
    c = model_config()
    model = GPT(c)
    parameters = random_parameters(model, seed=3)
    tokens_BL = random_tokens((1, c.context_length), seed=4)
    expected_BLV = numpy_logits(parameters, tokens_BL, c)
    for dtype in (jnp.int32, jnp.uint16):
        logits_BLV = model(parameters, tokens_BL.astype(dtype))
        np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=1e-5 * np.abs(expected_BLV).max())


@pytest.mark.parametrize(
    "changes",
    [{}, MODERN | {"num_kv_heads": 2}, {"logit_softcap": 3.0, **dict.fromkeys(DROPOUTS, 0.1)}],
    ids=["gpt2", "modern", "dropout"],
)
def test_causality_by_gradients(changes):
    """The logits at i depend on the inputs at j <= i, all of them, and on no other."""
    c = model_config(**changes)
    model = GPT(c)
    parameters = random_parameters(model, seed=5)
    L = 8
    rng = np.random.default_rng(6)
    tokens_L = jnp.asarray(rng.permutation(c.vocab_size)[:L], jnp.int32)  # each row used at one position
    weights_V = jnp.asarray(rng.standard_normal(c.vocab_size), jnp.float32)

    def projected(embedding_VD):
        changed = parameters | {"token_embedding": {"embedding": embedding_VD}}
        return model(changed, tokens_L[None], jax.random.key(7))[0] @ weights_V

    jacobian_LVD = jax.jit(jax.jacrev(projected))(parameters["token_embedding"]["embedding"])
    size_LL = np.abs(jacobian_LVD[:, tokens_L]).max(-1)
    np.testing.assert_array_equal(size_LL > 0, np.tri(L, dtype=bool))
    assert size_LL[np.tri(L, dtype=bool)].min() > 1e-6  # a dependence, not a rounding error


def test_causality_with_tied_embeddings():
    """There the head reaches every row, so tokens are changed instead."""
    c = model_config(**VARIANTS["everything"])
    model = jax.jit(GPT(c))
    parameters = random_parameters(GPT(c), seed=5)
    tokens_BL = random_tokens((1, 12), seed=6)
    changed_BL = tokens_BL.at[0, 5].set((tokens_BL[0, 5] + 1) % c.vocab_size)
    same_L = np.all(model(parameters, tokens_BL) == model(parameters, changed_BL), axis=-1)[0]
    np.testing.assert_array_equal(same_L, np.arange(12) < 5)


def logits_and_gradients(c, parameters, tokens_BL, key):
    model = GPT(c)

    @jax.jit
    def run(parameters):
        logits_BLV, pull = jax.vjp(lambda p: model(p, tokens_BL, key), parameters)
        weights = np.random.default_rng(8).standard_normal(logits_BLV.shape)
        return {"logits": logits_BLV, "gradient": pull(jnp.asarray(weights, jnp.float32))[0]}

    return by_path(run(parameters))


def is_without_gradient(c, path: str) -> bool:
    """Softmax ignores what a bias of the keys adds, except where a norm or a rotation follows."""
    return path.endswith("attention/key/bias") and not c.qk_norm and c.positions != "rope"


@pytest.mark.parametrize(
    "changes, others",
    [
        ({}, [(False, "none"), (True, "block"), (True, "dots"), (True, "attention"), (True, "offload")]),
        (MODERN | {"num_kv_heads": 2} | dict.fromkeys(DROPOUTS, 0.2), [(False, "block"), (False, "dots")]),
    ],
    ids=["gpt2", "modern_dropout"],
)
def test_scan_and_remat_change_nothing(changes, others):
    """With dropout too: the masks of the backward pass are those of the forward pass."""
    base = model_config(**changes)
    parameters = random_parameters(GPT(base), seed=9)
    tokens_BL = random_tokens((2, 8), seed=10)
    expected = logits_and_gradients(base, parameters, tokens_BL, jax.random.key(11))
    for scan_layers, remat in others:
        c = model_config(**changes, scan_layers=scan_layers, remat=remat)
        got = logits_and_gradients(c, parameters, tokens_BL, jax.random.key(11))
        assert got.keys() == expected.keys()
        for path, want in expected.items():
            if path.endswith("attention/key/bias"):
                # Softmax ignores what a bias adds to all scores of a query: rounding errors are left.
                assert np.abs(got[path]).max() < 1e-4 < np.abs(got[path.replace("bias", "kernel")]).max()
                continue
            assert np.abs(want).max() > 0, path
            np.testing.assert_allclose(got[path], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=path)


def test_remat_recomputes_what_it_says():
    """How often a block's activation, softmax and products appear in the gradient's program."""
    tokens_BL = random_tokens((1, 8), seed=10)

    def counts(remat):
        model = GPT(model_config(remat=remat))
        gradient = jax.grad(lambda p: model(p, tokens_BL).sum())
        shapes = model.shapes
        program = str(jax.make_jaxpr(gradient)(shapes))
        return tuple(program.count(f" {operation}") for operation in ("tanh ", "exp ", "dot_general["))

    products = counts("attention")[2] - 1  # without scores
    assert counts("attention")[:2] == (1, 2)
    # The block's own: query, key, value, scores, weighted values, out and up; down's result is not needed.
    assert counts("block") == (2, 2, products + 7)
    assert counts("none") == (2, 2, products + 1)  # scores, which no other kernel has in memory
    assert counts("dots") == counts("offload") == (2, 2, products + 2)  # scores and out


@pytest.mark.parametrize("remat", ["none", "block"])
def test_only_unrolled_layers_have_barriers(remat):
    """In a loop, XLA's compiler for GPUs could not double some bodies with barriers: 7B on 8 H100s failed."""

    def has_barrier(scan_layers) -> bool:
        model = GPT(model_config(remat=remat, scan_layers=scan_layers))
        shapes = model.shapes
        gradient = jax.grad(lambda p: model(p, random_tokens((1, 8), seed=10)).sum())
        return "optimization_barrier" in jax.jit(gradient).lower(shapes).as_text()

    assert has_barrier(False) and not has_barrier(True)


def expected_shapes(c) -> dict:
    D, H, J, K = c.dim, c.num_heads, c.num_kv_heads, c.head_dim
    F, V, N = c.mlp_dim, c.vocab_size, c.num_blocks
    linears = {
        "blocks/attention/query": ((N, D, H, K), (N, H, K)),
        "blocks/attention/key": ((N, D, J, K), (N, J, K)),
        "blocks/attention/value": ((N, D, J, K), (N, J, K)),
        "blocks/attention/out": ((N, H, K, D), (N, D)),
        "blocks/mlp/up": ((N, D, F), (N, F)),
        "blocks/mlp/down": ((N, F, D), (N, D)),
    }
    if c.activation in ("swiglu", "geglu"):
        linears["blocks/mlp/gate"] = ((N, D, F), (N, F))
    shapes = {"token_embedding/embedding": (V, D)}
    if c.positions == "learned":
        shapes["position_embedding/embedding"] = (c.context_length, D)
    if not c.tied_embeddings:
        shapes["head/kernel"] = (D, V)
    if c.head_bias:
        shapes["head/bias"] = (V,)
    for path, (kernel, bias) in linears.items():
        shapes[f"{path}/kernel"] = kernel
        if c.use_bias or (c.qkv_bias and path.endswith(("query", "key", "value"))):
            shapes[f"{path}/bias"] = bias
    norms = {"final_norm": ()}
    for part in ("attention", "mlp"):
        norms |= {f"blocks/{part}_norm": (N,)} if c.norm_placement != "after" else {}
        norms |= {f"blocks/{part}_out_norm": (N,)} if c.norm_placement != "before" else {}
    for path, leading in norms.items():
        shapes[f"{path}/scale"] = (*leading, D)
        if c.use_bias and c.norm == "layernorm":
            shapes[f"{path}/bias"] = (*leading, D)
    if c.qk_norm:
        shapes["blocks/attention/query_norm/scale"] = (N, K * (H if c.qk_norm_over_heads else 1))
        shapes["blocks/attention/key_norm/scale"] = (N, K * (J if c.qk_norm_over_heads else 1))
    return shapes


@pytest.mark.parametrize(
    "changes",
    [{"head_bias": True}, MODERN | {"num_kv_heads": 4, "use_bias": True}],
    ids=["gpt2", "modern_biases"],
)
def test_init(changes):
    c = model_config(**{"dim": 64, "num_heads": 8, "num_blocks": 3, "vocab_size": 512} | changes)
    model = GPT(c)
    init = jax.jit(model.init)
    parameters, again, other = (by_path(init(jax.random.key(seed))) for seed in (12, 12, 13))
    assert {path: leaf.shape for path, leaf in parameters.items()} == expected_shapes(c)
    assert {leaf.dtype for leaf in parameters.values()} == {jnp.dtype("float32")}
    assert model.shapes == jax.eval_shape(model.init, jax.random.key(0))
    drawn = []
    for path, leaf in parameters.items():
        np.testing.assert_array_equal(leaf, again[path], err_msg=path)
        if path.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0, err_msg=path)
            continue
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1, err_msg=path)
            continue
        assert not np.any(leaf == other[path]), path
        residual = path in ("blocks/attention/out/kernel", "blocks/mlp/down/kernel")
        std = 0.02 / np.sqrt(2 * c.num_blocks) if residual else 0.02
        layers = np.asarray(leaf if path.startswith("blocks/") else leaf[None], np.float64)
        for values in layers.reshape(len(layers), -1):  # five standard errors of mean and deviation
            assert abs(values.mean()) < 5 * std / np.sqrt(values.size), path
            assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * values.size), path
            drawn.append(values[:1000] / std)
    # No two layers and no two parameters share their draws.
    correlations = np.corrcoef(np.stack([values[: min(map(len, drawn))] for values in drawn]))
    assert np.abs(correlations - np.eye(len(drawn))).max() < 0.25


def test_dropout_without_rate_or_key_is_the_identity():
    x = jnp.arange(12.0).reshape(1, 3, 4)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)[None], 0), x)
    np.testing.assert_array_equal(dropout(x, 0.5, None, 0), x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(rate):
    n = 40_000
    x = jnp.asarray(np.random.default_rng(13).uniform(1, 2, (1, n // 100, 100)), jnp.float32)
    y = np.asarray(dropout(x, rate, jax.random.key(14)[None], 3))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)
    error = np.sqrt(rate / (1 - rate) * np.mean(np.square(x)) / n)
    assert abs(y.mean() - np.mean(x)) < 5 * error


def test_dropout_sites_and_keys_are_independent():
    x, keys = jnp.ones((2, 100, 100)), jax.random.split(jax.random.key(0))
    masks = np.concatenate([dropout(x, 0.5, keys, site) / 2 for site in (0, 1, 2)])
    correlations = np.corrcoef(masks.reshape(6, -1))
    assert np.abs(correlations - np.eye(6)).max() < 0.05
    # Of a mask, no two rows and no two columns are alike.
    for lines in (masks[0], masks[0].T):
        assert np.abs(np.corrcoef(lines) - np.eye(100)).max() < 0.6
    half = dropout(x.astype(jnp.bfloat16), 0.5, keys, 0)
    assert half.dtype == jnp.bfloat16


def test_a_key_without_dropout_changes_nothing():
    model = GPT(model_config())
    parameters = random_parameters(model, seed=16)
    tokens_BL = random_tokens((2, 8), seed=15)
    run = jax.jit(model)
    np.testing.assert_array_equal(run(parameters, tokens_BL, jax.random.key(1)), run(parameters, tokens_BL))


@pytest.mark.parametrize("field", DROPOUTS)
def test_each_dropout_follows_its_key(field):
    c = model_config(**{field: 0.3})
    model = GPT(c)
    parameters = random_parameters(model, seed=16)
    tokens_BL = random_tokens((2, 8), seed=15)
    run = jax.jit(model)
    whole = run(parameters, tokens_BL)
    expected = numpy_logits(parameters, tokens_BL, c)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    first, again, other = (run(parameters, tokens_BL, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - whole).max() > 0.1


def test_every_dropout_site_draws_its_own_mask():
    """Five sites write ones to a residual stream of zeros: what arrives is binomial(5, 1/2)."""
    c = model_config(
        dim=128,
        norm="rmsnorm",
        positions="rope",
        gpt_dropout=0.5,
        attn_linear_dropout=0.5,
        transformer_dropout=0.5,
    )
    model = GPT(c)
    shapes = model.shapes
    parameters = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    parameters["token_embedding"]["embedding"] += 1
    parameters["blocks"]["attention"]["out"]["bias"] += 1
    parameters["blocks"]["mlp"]["down"]["bias"] += 1
    parameters["final_norm"]["scale"] += 1
    parameters["head"]["kernel"] = jnp.eye(c.dim)
    tokens_BL = random_tokens((8, 16), seed=17)
    logits_BLV = np.asarray(jax.jit(model)(parameters, tokens_BL, jax.random.key(18)))
    # Each position is divided by its root mean square. Some channel is kept at one site only and some
    # at all five (of 128 channels about four each), so the largest says what the unit is.
    kept = 5 * logits_BLV / logits_BLV.max(-1, keepdims=True)
    sound = np.isclose(kept, np.round(kept), atol=1e-3).all(-1)  # all but where no channel has all five
    assert sound.mean() > 0.9
    counts = np.bincount(np.round(kept[sound]).astype(int).ravel(), minlength=6)
    expected = np.array([1, 5, 10, 10, 5, 1]) / 32
    assert np.abs(counts / counts.sum() - expected).max() < 0.02


def test_attention_dropout_acts_on_the_weights():
    rng = np.random.default_rng(19)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 4, heads, 6)), jnp.float32) for heads in (4, 2, 2))
    keys = jax.random.split(jax.random.key(20), (1000, 1, 4))
    dropped = np.asarray(jax.jit(jax.vmap(lambda key: plain(q, k, v, key_BH=key, rate=0.4)))(keys))
    whole = np.asarray(plain(q, k, v))
    # The first position attends to itself alone: its one weight is dropped or scaled up.
    first = dropped[:, 0, 0]  # draws, heads, head size
    value = np.repeat(np.asarray(v)[0, 0], 2, axis=0)
    kept = np.abs(first).max(-1) > 0
    np.testing.assert_allclose(first, kept[..., None] * value / 0.6, rtol=1e-5)
    error = dropped.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(dropped.mean(0) - whole) < 5 * error)


DISTINCT = {  # no two axes of one parameter have the same size
    "dim": 48,
    "num_heads": 6,
    "num_kv_heads": 3,
    "num_blocks": 5,
    "context_length": 16,
    "mlp_dim": 80,
    "vocab_size": 128,
}


@pytest.mark.parametrize("name", trainit.config.MODELS)
def test_every_parameter_of_every_model_choice_has_its_row(name):
    config = trainit.config.defaults()
    config.model = trainit.config.MODELS[name]()
    config.optimizer = optimizers.choices()["adamw"]()
    c = trainit.config.resolve(config, 50257).model
    parameters = by_path(GPT(c).shapes)
    assert {path: leaf.shape for path, leaf in parameters.items()} == expected_shapes(c)
    for path, leaf in parameters.items():
        assert len(logical_axes(path)) == leaf.ndim, path


# Rows of the embedding, parameters as the models' authors give them, and the model class of transformers.
OPEN_MODELS = {
    "llama2_7b": (32_000, 6_738_415_616, "llama"),
    "pythia_160m": (50_304, 162_322_944, "gpt_neox"),
    "pythia_1b": (50_304, 1_011_781_632, "gpt_neox"),
    "pythia_12b": (50_688, 11_846_072_320, "gpt_neox"),
    "llama3_1b": (128_256, 1_235_814_400, "llama"),
    "llama3_8b": (128_256, 8_030_261_248, "llama"),
    "llama3_70b": (128_256, 70_553_706_496, "llama"),
    "mistral_7b": (32_000, 7_241_732_096, "mistral"),
    "qwen2_7b": (152_064, 7_615_616_512, "qwen2"),
    "qwen3_600m": (151_936, 596_049_920, "qwen3"),
    "qwen3_8b": (151_936, 8_190_735_360, "qwen3"),
    "olmo2_1b": (100_352, 1_484_916_736, "olmo2"),
    "olmo2_7b": (100_352, 7_298_617_344, "olmo2"),
    "gemma2_2b": (256_000, 2_614_341_888, "gemma2"),
    "gemma2_9b": (256_000, 9_241_705_984, "gemma2"),
}


@pytest.mark.parametrize("name", OPEN_MODELS)
def test_a_choice_has_as_many_parameters_as_the_model_that_it_is_named_after(name):
    rows, count, family = OPEN_MODELS[name]
    config = trainit.config.defaults()
    config.model = trainit.config.MODELS[name]()
    config.model.vocab_size = rows
    config.optimizer = optimizers.choices()["adamw"]()
    c = trainit.config.resolve(config, rows).model
    shapes = by_path(GPT(c).shapes).values()
    assert sum(math.prod(leaf.shape) for leaf in shapes) == count
    assert families.find(c).name == family


@functools.cache
def of_distinct_sizes(name: str):
    """A variant's config and its parameters' shapes by path."""
    c = model_config(**(DISTINCT | VARIANTS[name]))
    return c, by_path(GPT(c).shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_logical_axes_name_the_right_dimensions(name):
    c, shapes = of_distinct_sizes(name)
    sizes = {
        "vocab": c.vocab_size,
        "embed": c.dim,
        "norm": c.dim,
        "position": c.context_length,
        "layers": c.num_blocks,
        "heads": c.num_heads,
        "kv_heads": c.num_kv_heads,
        "head_size": c.head_dim,
        "qk_norm": c.head_dim,
        "mlp": c.mlp_dim,
    }
    for path, leaf in shapes.items():
        if c.qk_norm_over_heads:
            sizes["qk_norm"] = c.head_dim * (c.num_heads if "query" in path else c.num_kv_heads)
        assert tuple(sizes[axis] for axis in logical_axes(path)) == leaf.shape, path
        if path.endswith(("bias", "scale")):
            expected = "vector"
        elif path.endswith("embedding"):
            expected = "embedding"
        else:
            expected = "head" if path == "head/kernel" else "matrix"
        assert parameter_kind(path) == expected, path


def test_table_has_no_row_without_parameters_and_refuses_others():
    paths = {path for name in VARIANTS for path in of_distinct_sizes(name)[1]}
    used = {
        next(row for row, (pattern, *_) in enumerate(PARAMETERS) if re.fullmatch(pattern, p)) for p in paths
    }
    assert used == set(range(len(PARAMETERS)))
    for path in ("blocks/mlp/up", "blocks/mlp/up/kernel/more", "head/scale"):
        with pytest.raises(KeyError, match=path):
            parameter_kind(path)


@pytest.mark.parametrize("name", ["gpt2", "tied", "everything"])
def test_bfloat16_logits_are_near_float32_ones(name):
    c = model_config(**VARIANTS[name])
    parameters = random_parameters(GPT(c), seed=21)
    tokens_BL = random_tokens((2, 16), seed=22)
    expected_BLV = numpy_logits(parameters, tokens_BL, c)
    logits_BLV = jax.jit(GPT(c, "bfloat16"))(parameters, tokens_BL)
    assert logits_BLV.dtype == jnp.float32
    error_BLV = np.abs(logits_BLV - expected_BLV)
    assert error_BLV.max() > 1e-3 * expected_BLV.std()  # it did compute in bfloat16
    assert error_BLV.max() < 0.1 * expected_BLV.std()
    assert error_BLV.mean() < 0.02 * expected_BLV.std()


def test_bfloat16_gradients_and_parameters_are_float32():
    model = GPT(model_config(**VARIANTS["modern_biases"]), "bfloat16")
    shapes = model.shapes
    tokens_BL = random_tokens((2, 16), seed=22)
    gradient = jax.eval_shape(jax.grad(lambda p: model(p, tokens_BL).sum()), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, gradient))} == {jnp.dtype("float32")}


def test_bfloat16_keeps_norms_and_softmax_in_float32():
    """rsqrt is only in norms, exp only in softmax."""
    model = GPT(model_config(**VARIANTS["modern_biases"]), "bfloat16")
    shapes = model.shapes
    program = str(jax.make_jaxpr(model)(shapes, random_tokens((2, 16), seed=22)))
    types = {
        operation: set(re.findall(rf":(\w+)\[[^\]]*\] = {operation}\b", program))
        for operation in ("rsqrt", "exp", "logistic")
    }
    assert types == {"rsqrt": {"f32"}, "exp": {"f32"}, "logistic": {"bf16"}}


@pytest.mark.parametrize(
    "asked, platform, precision, attn_dropout, expected",
    [
        ("auto", "cpu", "float32", 0.0, "blockwise"),
        ("auto", "cpu", "bfloat16", 0.0, "blockwise"),
        ("auto", "tpu", "bfloat16", 0.0, "blockwise"),
        ("auto", "cuda", "bfloat16", 0.0, "cudnn"),
        ("auto", "gpu", "bfloat16", 0.0, "blockwise"),  # not NVIDIA's
        ("auto", "cuda", "float32", 0.0, "blockwise"),
        ("auto", "cuda", "bfloat16", 0.1, "blockwise"),
        ("plain", "cuda", "bfloat16", 0.0, "plain"),
        ("blockwise", "cuda", "bfloat16", 0.0, "blockwise"),
        ("cudnn", "cuda", "bfloat16", 0.0, "cudnn"),
    ],
)
def test_choose_attention(asked, platform, precision, attn_dropout, expected):
    c = model_config(dim=64, num_heads=1, attention=asked, attn_dropout=attn_dropout)
    assert choose_attention(c, platform, precision) == expected


def test_cudnn_has_windows_and_no_soft_cap():
    c = {"dim": 64, "num_heads": 1}
    windowed = model_config(**c, window=8, window_layers="::2", attention_scale=0.1)
    assert choose_attention(windowed, "cuda", "bfloat16") == "cudnn"
    assert choose_attention(model_config(**c, attention_softcap=9.0), "cuda", "bfloat16") == "blockwise"


@pytest.mark.parametrize(
    ("dim", "expected"), [(36, "blockwise"), (72, "cudnn"), (128, "cudnn"), (192, "blockwise")]
)
def test_cudnn_needs_a_head_size_that_it_has(dim, expected):
    assert choose_attention(model_config(dim=dim, num_heads=1), "cuda", "bfloat16") == expected


@pytest.mark.parametrize("platform, precision", [("cpu", "bfloat16"), ("cuda", "float32")])
def test_choose_attention_refuses_cudnn_where_it_cannot_run(platform, precision):
    c = model_config(dim=64, num_heads=1, attention="cudnn")
    with pytest.raises(ValueError, match=f"cudnn.*platform={platform}.*precision={precision}"):
        choose_attention(c, platform, precision)
