"""Attention's kernels against float64, forward and gradient; what blockwise saves, from compiled programs."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from first_steps import losses_and_norms
from test_gpt import model_config, random_parameters, random_tokens

from trainit import config as config_lib
from trainit.config import MESH_AXES
from trainit.model import attention
from trainit.model.gpt import GPT
from trainit.model.kernels import kernel_on
from trainit.parallel import sequence
from trainit.parallel.collectives import Parallel
from trainit.parallel.mesh import make_mesh

BLOCK = 4
LENGTHS = {"one": 1, "a_block": 4, "one_more": 5, "stages": 31, "blocks_in_stages": 70}


NONE = attention.Form()
FORMS = {
    "window": attention.Form(window=6),
    "narrow": attention.Form(window=2, softcap=0.5),
    "wide": attention.Form(window=40, scale=0.8),
    "softcap": attention.Form(softcap=1.5, scale=0.3),
}


def draw(B, L, H, J, K, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, L, H, K), (B, L, J, K), (B, L, J, K), (B, L, H, K)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def documents_of(B, L):
    """Numbers that rise at random places."""
    return np.cumsum(np.random.default_rng(1).random((B, L)) < 0.15, axis=1).astype(np.int32)


def exact(q, k, v, g, document, form=NONE):
    """Output and gradients of sum(output * g), float64, one query after another, derived by hand."""
    q, k, v, g = (np.asarray(array, np.float64) for array in (q, k, v, g))
    (B, L, H, K), J = q.shape, k.shape[2]
    y, dq, dk, dv = (np.zeros_like(array) for array in (q, q, k, v))
    for b, i, h in np.ndindex(B, L, H):
        j = h // (H // J)
        seen = np.arange(max(i + 1 - form.window, 0) if form.window else 0, i + 1)
        if document is not None:
            seen = seen[document[b, seen] == document[b, i]]
        scale = form.scale or 1 / np.sqrt(K)
        scores, slope = k[b, seen, j] @ q[b, i, h] * scale, scale
        if form.softcap:
            slope = scale / np.cosh(scores / form.softcap) ** 2
            scores = form.softcap * np.tanh(scores / form.softcap)
        weights = np.exp(scores)
        weights /= weights.sum()
        y[b, i, h] = weights @ v[b, seen, j]
        dv[b, seen, j] += weights[:, None] * g[b, i, h]
        d_weights = v[b, seen, j] @ g[b, i, h]
        d_scores = weights * (d_weights - weights @ d_weights) * slope
        dq[b, i, h] = d_scores @ k[b, seen, j]
        dk[b, seen, j] += d_scores[:, None] * q[b, i, h]
    return y, dq, dk, dv


@pytest.mark.evidence(
    "attention in blocks and plain against float64, forward and gradient, with documents, shared key "
    "heads and dropout"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "documents"])
@pytest.mark.parametrize("L", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kernel", [attention.plain, partial(attention.blockwise, block=BLOCK)])
def test_kernels_equal_float64(kernel, L, masked, dtype):
    *qkv, g = draw(2, L, 4, 2, 8, dtype)
    document = documents_of(2, L) if masked else None

    @jax.jit
    def run(q, k, v):
        y, pull = jax.vjp(lambda *qkv: kernel(*qkv, document_BL=document), q, k, v)
        return y, *pull(g)

    got, want = run(*qkv), exact(*qkv, g, document)
    for name, mine, right in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert mine.dtype == jnp.dtype(dtype)
        # bfloat16 rounds weights, outputs and gradients to 8 bits; each is a sum of few.
        tolerance = (1e-5 if dtype == "float32" else 3e-2) * np.abs(right).max() + 1e-7
        np.testing.assert_allclose(np.asarray(mine, np.float64), right, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.evidence(
    "windows, soft caps and scales of attention, in blocks and plain, against float64, forward and gradient, "
    "with documents"
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "documents"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_equal_float64(form, masked):
    """Of 70 queries in blocks of 4, the last of which is padded."""
    *qkv, g = draw(2, 70, 4, 2, 8)
    document, kernels = documents_of(2, 70) if masked else None, {}
    kernels = {"plain": attention.plain, "blockwise": partial(attention.blockwise, block=BLOCK)}
    want = exact(*qkv, g, document, form)
    for name, kernel in kernels.items():

        @jax.jit
        def run(q, k, v, kernel=kernel):
            y, pull = jax.vjp(lambda *qkv: kernel(*qkv, document_BL=document, form=form), q, k, v)
            return y, *pull(g)

        for mine, right in zip(run(*qkv), want, strict=True):
            np.testing.assert_allclose(mine, right, rtol=0, atol=1e-5 * np.abs(right).max(), err_msg=name)


def test_cudnn_is_asked_for_attention_within_documents(monkeypatch):
    """JAX's function, which computes here by XLA what it asks cuDNN for on a GPU, against float64."""
    *qkv, g = draw(2, 12, 4, 2, 8)
    document = documents_of(2, 12)
    by_xla = partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **k: by_xla(*a, **k | {"implementation": "xla"})
    )
    y, pull = jax.vjp(partial(attention.cudnn, document_BL=document, form=attention.Form(scale=0.3)), *qkv)
    want = exact(*qkv, g, document, attention.Form(scale=0.3))
    for mine, right in zip((y, *pull(g)), want, strict=True):
        np.testing.assert_allclose(mine, right, rtol=0, atol=1e-5 * np.abs(right).max())


SPLITS = {
    "ring of 4": ("ring", {"context": 4}, 24, "none", False),
    "ring of 8, window": ("ring", {"context": 8}, 48, "window", True),
    "ring of 2, over tensor": ("ring", {"data": 2, "tensor": 2, "context": 2}, 12, "softcap", True),
    "gathered by 4, narrow": ("gather", {"context": 4}, 24, "narrow", True),
    "gathered by 2, padded": ("gather", {"tensor": 2, "context": 2}, 4 * attention.BLOCK + 48, "none", True),
}


@pytest.mark.evidence(
    "attention whose keys are gathered or travel in a ring against float64, forward and gradient, with "
    "windows, documents and shared key heads; with dropout against plain attention"
)
@pytest.mark.parametrize("name, sizes, L, form, masked", SPLITS.values(), ids=SPLITS)
def test_split_sequences_equal_float64(name, sizes, L, form, masked):
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    parallel = Parallel(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))
    *qkv, g = draw(2, L, 4, 2, 8)
    document, form = documents_of(2, L) if masked else None, {"none": NONE, **FORMS}[form]
    keys, kernel = jax.random.split(jax.random.key(3), (2, 4)), kernel_on(name, "cpu", parallel)

    def split(q, k, v, keys, rate):
        return sequence.restore(
            parallel, kernel(*sequence.arrange(parallel, (q, k, v, document)), keys, rate=rate, form=form)
        )

    def whole(q, k, v, keys, rate):
        return attention.plain(q, k, v, document, keys, rate, form)

    def run(attend, *dropout):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, *dropout), *qkv)
        return y, *pull(g)

    for dropout, want in (
        ((None, 0.0), exact(*qkv, g, document, form) if L < 100 else run(whole, None, 0.0)),
        ((keys, 0.4), run(whole, keys, 0.4)),
    ):
        for mine, right in zip(jax.jit(run, static_argnums=(0, 2))(split, *dropout), want, strict=True):
            np.testing.assert_allclose(mine, right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_a_window_spares_what_it_hides():
    """Whether a pair of chunks is computed is decided on the device, by conditionals of the program."""
    parallel = Parallel(make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 8}))
    *qkv, _ = draw(1, 64, 2, 2, 8)
    for form in (NONE, attention.Form(window=4)):
        attend = partial(kernel_on("ring", "cpu", parallel), rate=0.0, form=form)
        text = str(jax.make_jaxpr(attend)(*qkv, None, None))
        assert (" cond[" in text) == (form.window > 0)


def compiled(kernel, L):
    *qkv, g = draw(1, L, 2, 2, 16)
    gradient = jax.grad(lambda q, k, v: jnp.sum(kernel(q, k, v) * g), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*qkv).compile()


@pytest.mark.evidence("blockwise attention's memory is linear in the length, from compiled programs")
def test_blockwise_is_linear_in_memory_and_spares_products():
    sizes = {
        kernel: [compiled(kernel, L).memory_analysis().temp_size_in_bytes for L in (1024, 4096)]
        for kernel in (attention.plain, attention.blockwise)
    }
    assert sizes[attention.plain][1] > 2 * 4 * 4096**2  # two heads' scores
    assert sizes[attention.blockwise][1] < 5 * sizes[attention.blockwise][0]
    assert sizes[attention.blockwise][1] < sizes[attention.plain][1] / 10
    # Of 8 stages, each looks at the keys up to its own end: 36 of 64 parts; scores are made twice.
    flops = [compiled(kernel, 1024).cost_analysis()["flops"] for kernel in sizes]
    assert flops[1] < 0.72 * flops[0]
    # With a window of one block, a stage looks at its own part and the one before.
    windowed = partial(attention.blockwise, form=attention.Form(window=attention.BLOCK))
    assert compiled(windowed, 1024).cost_analysis()["flops"] < 0.3 * flops[0]


def test_blockwise_drops_in_every_block_and_alike_in_the_gradient():
    """Weights are drawn separately for every position, row and head; the gradient has the same draw."""
    q, k, v, g = draw(2, 24, 4, 2, 8)
    keys = jax.random.split(jax.random.key(3), (2, 4))

    @jax.jit
    def run(q, k, v):
        return attention.blockwise(q, k, v, key_BH=keys, rate=0.5, block=BLOCK)

    ones = run(q, k, jnp.ones_like(v))[..., 0]  # sums of the weights that stay, doubled
    assert abs(float(ones.mean()) - 1) < 0.1
    assert np.all(np.std(np.asarray(ones), axis=(0, 2)) > 0.05)
    assert len(np.unique(np.asarray(ones[:, 4:]).round(5))) > 0.95 * ones[:, 4:].size
    # The output is linear in the values, and in queries and keys it is smooth: central differences.
    gradients = jax.grad(lambda *qkv: jnp.sum(run(*qkv) * g), argnums=(0, 1, 2))(q, k, v)
    for argument, gradient in enumerate(gradients):
        direction = jnp.asarray(np.random.default_rng(argument).standard_normal(gradient.shape), jnp.float32)
        moved = [
            float(
                jnp.sum(
                    run(*[x + s * direction if i == argument else x for i, x in enumerate((q, k, v))]) * g
                )
            )
            for s in (1e-2, -1e-2)
        ]
        slope = float(jnp.sum(gradient * direction))
        assert abs((moved[0] - moved[1]) / 2e-2 - slope) < 5e-3 * max(1.0, abs(slope)), argument


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"document_mask": True, "end_of_text": 3},
        {"window": 50, "window_layers": "1:", "attention_softcap": 2.0, "remat": "dots"},
    ],
    ids=["all", "documents", "window"],
)
def test_a_model_is_the_same_with_either_kernel(changes):
    c = model_config(**changes, num_kv_heads=2, context_length=attention.BLOCK + 32)
    parameters = random_parameters(GPT(c), seed=5)
    tokens_BL = random_tokens((2, c.context_length), seed=6)
    logits = [
        GPT(c, attend=kernel)(parameters, tokens_BL) for kernel in (attention.plain, attention.blockwise)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5 * np.abs(logits[0]).max())


FAMILIES = {
    **{"norm": "rmsnorm", "activation": "geglu", "positions": "rope", "use_bias": False, "qkv_bias": True},
    **{"norm_placement": "both", "norm_unit_offset": True, "qk_norm": True, "qk_norm_over_heads": True},
    **{"window": 50, "window_layers": "::2", "attention_softcap": 3.0, "attention_scale": 0.4},
    **{"head_dim": 12, "rotary_fraction": 0.5, "rope_scaling.factor": 4.0, "embedding_scale": 0.0},
    **{"attn_dropout": 0.0, "remat": "dots", "parallel_residual": True},
    **{"embedding_norm": True, "logit_softcap": 5.0, "softcap_form": "rsqrt", "init": "zero_outputs"},
}


@pytest.mark.evidence("models with the parts of all families train on a mesh as on one device")
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ({"data": 1, "fsdp": 4, "tensor": 2}, FAMILIES),
        ({"data": 2, "fsdp": 1, "tensor": 1, "context": 4}, {"attention": "ring"}),
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, {**FAMILIES, "attention": "ring"}),
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, {**FAMILIES, "attention": "gather"}),
    ],
    ids=["dropout", "families", "ring", "families in a ring", "families gathered"],
)
def test_blockwise_over_a_mesh_is_that_of_one_device(sizes, changes):
    """Two steps with documents and shared key heads, on 8 devices and on one: the same losses."""

    def losses(sizes):
        config = tiny.get_config()
        config.update(batch_size=8, device_batch_size=0)
        config.model.update(num_kv_heads=2, context_length=attention.BLOCK + 32)
        config.model.update(document_mask=True, end_of_text=3)
        config.model.update_from_flattened_dict(changes)
        return losses_and_norms(config_lib.resolve(config, 100), sizes, 100, 2)

    one = losses({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
    many = losses({"context": 1, **sizes})
    np.testing.assert_allclose(many, one, rtol=2e-5)


def test_remat_keeps_what_cudnn_computed(monkeypatch):
    """The gradient's program has cuDNN's forward pass once; norms and activations are computed again."""
    versions = SimpleNamespace(cudnn_get_version=lambda: 91002)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", versions)

    def counts(remat: str) -> tuple[int, int]:
        c = model_config(remat=remat, head_dim=8)
        model = GPT(c, "bfloat16", attention.cudnn)
        shapes = model.shapes
        tokens_BL = jnp.zeros((2, 16), jnp.int32)
        program = str(jax.make_jaxpr(jax.grad(lambda p: model(p, tokens_BL).sum()))(shapes))
        return program.count(attention.CUDNN_FORWARD + "["), program.count("logistic ")

    assert counts("none") == counts("dots") == (1, 2)
    assert counts("block") == (2, 2)


@pytest.mark.parametrize("name, context", [("blockwise", 1), ("gather", 2), ("ring", 4)])
@pytest.mark.parametrize(
    "fields",
    [
        {"attn_dropout": 0.1, "gpt_dropout": 0.1},
        {"document_mask": True, "end_of_text": 5, "positions": "rope"},
        {"attention_softcap": 3.0, "window": 50, "activation": "swiglu", "qk_norm": True},
    ],
    ids=["dropout", "documents", "window"],
)
def test_unrolled_layers_can_compute_norms_again(name, context, fields):
    """The gradient is only traced: `jax.checkpoint` of JAX 0.10 fails where it brings arrays of constants."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {"tensor": 2, "context": context}
    parallel = Parallel(make_mesh(sizes, jax.devices()[: 2 * context]))
    c = model_config(remat="none", scan_layers=False, context_length=2 * attention.BLOCK, **fields)
    model = GPT(c, "bfloat16", kernel_on(name, "gpu", parallel), parallel)
    shapes = model.shapes
    tokens_BL = jnp.zeros((2, c.context_length), jnp.int32)

    def total(params: dict) -> jax.Array:
        return model.hidden(params, tokens_BL, jax.random.key(1))[0].astype(jnp.float32).sum()

    assert "differentiated=True" in str(jax.make_jaxpr(jax.grad(total))(shapes))
