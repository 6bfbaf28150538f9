"""float8 against NumPy, on several meshes; what each part of a model multiplies."""

import functools
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from test_matmul import MESHES, parallel

from trainit import config as config_lib
from trainit.model.gpt import GPT
from trainit.model.precision import PartPrecision, part_precisions
from trainit.parallel import float8
from trainit.parallel.layout import batch_sharding
from trainit.parallel.matmul import column_parallel, row_parallel
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step

B, L, D, F = 8, 16, 24, 32
SPLIT = pytest.mark.parametrize(
    "sizes", MESHES[:3], ids=lambda sizes: " ".join(map(str, sizes.items())) or "one"
)
FORWARD, BACKWARD = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def draw(shape, seed: int, dtype, scale: float) -> np.ndarray:
    """Numbers of the type times a power of two, its largest among them; rows from large to tiny ones."""
    rng = np.random.default_rng(seed)
    most = float(ml_dtypes.finfo(dtype).max)
    rows = (*shape[:2], *[1] * (len(shape) - 2)) if len(shape) > 2 else (1, 1)
    numbers = rng.uniform(-most, most, shape) * 10.0 ** rng.uniform(-6, 0, rows)
    numbers = numbers.astype(dtype).astype(np.float64)
    numbers[(0,) * len(shape)] = most
    return numbers * scale


@functools.partial(jax.jit, static_argnums=0)
def both(p, x, up, down, d_up, d_down):
    """Both products of an MLP by themselves, and their gradients."""
    (h,), back = jax.vjp(lambda x, k: column_parallel(p, x, (k, None), float8=True), x, up)
    y, back_down = jax.vjp(lambda h, k: row_parallel(p, h, k, None, float8=True), d_up, down)
    return h, *back((d_up,)), y, *back_down(d_down)


def numpy_both(x, up, down, d_up, d_down):
    d_kernels = np.einsum("bld,blf->df", x, d_up), np.einsum("blf,bld->fd", d_up, d_down)
    return x @ up, d_up @ up.T, d_kernels[0], d_up @ down, d_down @ down.T, d_kernels[1]


@SPLIT
def test_float8_is_exact_for_what_its_types_can_tell(sizes):
    """Forward in e4m3, gradients that come back in e5m2, which goes further down, whatever their sizes."""
    x, up = draw((B, L, D), 1, FORWARD, 2.0**-30), draw((D, F), 2, FORWARD, 2.0**3)
    d_up = draw((B, L, F), 3, BACKWARD, 2.0**20)
    p = parallel(sizes)
    (h,), back = jax.vjp(
        lambda x, k: column_parallel(p, x, (k, None), float8=True), jnp.float32(x), jnp.float32(up)
    )
    dx, d_kernel = back((jnp.float32(d_up),))
    for found, expected in ((h, x @ up), (dx, d_up @ up.T)):  # each position by itself
        assert (np.abs(found - expected).max(2) <= 1e-5 * np.abs(expected).max(2)).all()
    expected = np.einsum("bld,blf->df", x, d_up)
    assert np.abs(d_kernel - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.evidence("products in float8 against NumPy, the same on five meshes")
def test_float8_is_near_the_product_and_the_same_on_any_mesh():
    """Each device has its own scales, powers of two: another one changes nothing but the tiniest numbers."""
    rng = np.random.default_rng(0)
    shapes = (B, L, D), (D, F), (F, D), (B, L, F), (B, L, D)
    arrays = [
        np.float32(scale * rng.standard_normal(s))
        for s, scale in zip(shapes, (1e-6, 1, 9, 1e5, 1), strict=True)
    ]
    one, *others = (both(parallel(sizes), *arrays) for sizes in MESHES)
    expected = numpy_both(*(array.astype(np.float64) for array in arrays))
    for number, wanted in enumerate(expected):
        most = np.abs(wanted).max()
        assert 2e-3 * most < np.abs(one[number] - wanted).max() < 0.1 * most
        for other in others:
            np.testing.assert_allclose(other[number], one[number], rtol=0, atol=1e-5 * most)


def test_only_kernels_that_are_split_share_a_scale():
    """What devices exchange for it: one maximum for each use of a kernel, and none for activations."""
    shapes = (B, L, D), (D, F), (F, D), (B, L, F), (B, L, D)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for sizes, maxima in ((MESHES[1], 4), ({"tensor": 8}, 0), ({"data": 8}, 0)):
        program = jax.make_jaxpr(functools.partial(both, parallel(sizes)))(*arrays)
        assert str(program).count("pmax[") == maxima


def test_float8_of_nothing_and_of_what_is_not_finite():
    """Zeros stay zeros; what is infinite is seen by whoever looks for it."""
    for dtype in (float8.FORWARD, float8.BACKWARD):
        values, scale = float8.factor(jnp.zeros((2, 3)), dtype)
        assert (values.astype(jnp.float32) == 0).all() and scale == 1
        for bad in (jnp.inf, -jnp.inf, jnp.nan):
            a, b = (
                float8.factor(jnp.ones((2, 3)).at[0, 1].set(bad), dtype),
                float8.factor(jnp.ones((3, 2)), dtype),
            )
            assert not jnp.isfinite(float8.dot(a, b, ((1,), (0,)), jnp.float32)).all()


def device(kind: str, platform: str, capability: str = "") -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, platform=platform, compute_capability=capability)


def test_float8_is_refused_where_there_is_none():
    asked = {"attention": "float8", "mlp": "float8", "head": ""}
    bfloat16 = jnp.dtype("bfloat16")
    for there in (device("NVIDIA H100 80GB HBM3", "gpu", "9.0"), device("cpu", "cpu")):
        parts = part_precisions(asked, "bfloat16", there)
        assert parts["mlp"] == PartPrecision(bfloat16, True)
        assert parts["head"] == PartPrecision(bfloat16, False)
    for there in (device("NVIDIA A100-SXM4-40GB", "gpu", "8.0"), device("TPU v4", "tpu")):
        message = f"precision_of.attention=float8 and precision_of.mlp=float8: .* not {there.device_kind}"
        with pytest.raises(ValueError, match=message) as raised:
            part_precisions(asked, "bfloat16", there)
        assert "\n" not in str(raised.value)
        part_precisions(dict.fromkeys(asked, ""), "bfloat16", there)


def products(jaxpr) -> Counter:
    """The types of both factors of all products of matrices in a program."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found[tuple(str(v.aval.dtype) for v in equation.invars)] += 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            program = getattr(inner, "jaxpr", inner)
            found += products(program) if hasattr(program, "eqns") else Counter()
    return found


@pytest.mark.evidence("the types of all products, by part of the model")
@pytest.mark.parametrize(
    "own, in_float8, in_float32",
    [
        ({}, 0, 0),
        ({"attention": "float8", "mlp": "float8"}, 4 + 3, 0),
        ({"mlp": "float8", "head": "float32"}, 3, 3),
        ({"attention": "float32"}, 0, 3 * (4 + 2) + 1),  # scores, twice forward, and what they weigh
        ({"mlp": "float32"}, 0, 3 * 3),
    ],
    ids=str,
)
def test_each_part_multiplies_in_its_own_precision(own, in_float8, in_float32):
    """Products by the types of their factors, each once in the forward pass and twice for gradients."""
    config = tiny.get_config()
    config.model.update(attn_dropout=0.0, activation="swiglu", attention="plain")
    own = dict.fromkeys(("attention", "mlp", "head"), "") | own
    parts = part_precisions(own, "bfloat16", device("", "cpu"))
    model = GPT(config_lib.resolve(config, 257).model, "bfloat16", parts=parts)
    shapes = model.shapes
    tokens_BL = jnp.zeros((2, 16), jnp.int32)
    found = products(jax.make_jaxpr(jax.grad(lambda p: model(p, tokens_BL).sum()))(shapes).jaxpr)
    forward, backward = "float8_e4m3fn", "float8_e5m2"
    for pair in ((forward, forward), (backward, forward), (forward, backward)):
        assert found[pair] == in_float8
    assert found["float32", "float32"] == in_float32
    assert found["bfloat16", "bfloat16"] >= 5  # what no other part has
    assert jax.eval_shape(model.hidden, shapes, tokens_BL)[0].dtype == (own["head"] or "bfloat16")


def run(**precision_of):
    """The losses of some steps on eight devices."""
    config = tiny.get_config()
    config.precision = "bfloat16"
    config.precision_of.update(precision_of)
    config.model.update(attn_dropout=0.0, num_blocks=1)
    config = config_lib.resolve(config, 257)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    steps = step.build(config, shape_on(config, mesh))
    state, losses, rng = steps.init(), [], np.random.default_rng(4)
    for _ in range(12):
        tokens = (rng.integers(0, 4, (2, 8, 33)).cumsum(-1) % 16).astype(np.uint16)
        batch = {"tokens": tokens, "lengths": np.full((2, 8), 32, np.int32)}
        state, told = steps.train(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append(float(told["train/loss"]))
    return np.array(losses), state


def test_a_run_with_parts_in_float8_and_float16():
    """Near bfloat16's; any part in float16 scales the loss."""
    losses, state = run()
    assert losses[-1] < losses[0] - 1 and not state.loss_scale
    narrow, state = run(attention="float8", mlp="float8", head="float32")
    np.testing.assert_allclose(narrow, losses, atol=0.03)
    assert np.abs(narrow - losses).max() > 1e-4 and not state.loss_scale
    mixed, state = run(mlp="float16")
    assert state.loss_scale and int(state.skipped) <= 2
    assert mixed[-1] < losses[0] - 1
