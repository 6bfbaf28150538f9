"""The cross-entropy's sums and gradients against NumPy in float64; what it holds in memory and exchanges."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from trainit.config import MESH_AXES
from trainit.model import cross_entropy as module
from trainit.model.cross_entropy import CrossEntropy
from trainit.model.layers import Head, SoftCap
from trainit.parallel.collectives import Parallel
from trainit.parallel.layout import partition_spec
from trainit.parallel.mesh import chunk_size, make_mesh

B, L, V = 3, 7, 19
MESHES = ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"fsdp": 8}, {"tensor": 8})


def one_mesh(**sizes):
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    return make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])


def numpy_sums(logits_BLV, targets_BL, mask_BL, z_loss=0.0):
    """Sums and the gradient of what is minimized with respect to the logits, position by position."""
    sums, gradient = {"loss": 0.0, "correct": 0, "count": 0}, np.zeros(logits_BLV.shape)
    sums |= {"z_loss": 0.0} if z_loss else {}
    for position in np.ndindex(*targets_BL.shape):
        if not mask_BL[position]:
            continue
        logits_V, target = np.asarray(logits_BLV[position], np.float64), targets_BL[position]
        log_total = logits_V.max() + np.log(np.exp(logits_V - logits_V.max()).sum())
        sums["loss"] += log_total - logits_V[target]
        sums["correct"] += int(np.argmax(logits_V) == target)
        sums["count"] += 1
        gradient[position] = np.exp(logits_V - log_total)
        if z_loss:
            sums["z_loss"] += z_loss * log_total**2
            gradient[position] += z_loss * 2 * log_total * np.exp(logits_V - log_total)
        gradient[position][target] -= 1
    return sums, gradient


def draw(seed: int, scale: float = 1.0, offset: float = 0.0):
    """Logits, targets that are often the highest logit, and a mask with one row empty and one full."""
    rng = np.random.default_rng(seed)
    logits_BLV = (offset + scale * rng.standard_normal((B, L, V))).astype(np.float32)
    guess_BL = rng.random((B, L)) < 0.4
    targets_BL = np.where(guess_BL, logits_BLV.argmax(-1), rng.integers(0, V, (B, L)))
    mask_BL = rng.random((B, L)) < 0.6
    mask_BL[0], mask_BL[1] = False, True
    return logits_BLV, targets_BL, mask_BL


@jax.jit
def minimized(logits_BLV, targets_BL, mask_BL):
    """Of logits, which a head that is the identity leaves as they are."""
    head = Head(jnp.eye(logits_BLV.shape[-1]), None)
    return CrossEntropy(Parallel(one_mesh())).sums(head, logits_BLV, targets_BL, mask_BL)


def cross_entropy(logits_BLV, targets_BL, mask_BL):
    return minimized(logits_BLV, targets_BL, mask_BL)[1]


@jax.jit
def by_logits(logits_BLV, targets_BL, mask_BL):
    return jax.grad(minimized, has_aux=True)(logits_BLV, targets_BL, mask_BL)[0]


def check(sums, expected, rtol=2e-6):
    assert sums.keys() == expected.keys()
    for name, value in sums.items():
        assert value.shape == () and value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, expected[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize(
    "scale, offset",
    [(1, 0), (5, 0), (1e4, 0), (1, 1e4), (1, -1e4), (1e-3, 0)],
    ids=["usual", "sharp", "huge", "high", "low", "flat"],
)
def test_sums_and_gradient_equal_numpy(scale, offset):
    logits_BLV, targets_BL, mask_BL = draw(1, scale, offset)
    expected, expected_gradient = numpy_sums(logits_BLV, targets_BL, mask_BL)
    assert 0 < expected["correct"] < expected["count"] < B * L
    check(cross_entropy(logits_BLV, targets_BL, mask_BL), expected)
    gradient = by_logits(logits_BLV, targets_BL, mask_BL)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask_BL], 0)


def test_nothing_that_counts():
    logits_BLV, targets_BL, _ = draw(2, scale=1e4)
    mask_BL = np.zeros((B, L), bool)
    check(cross_entropy(logits_BLV, targets_BL, mask_BL), {"loss": 0, "correct": 0, "count": 0})
    np.testing.assert_array_equal(by_logits(logits_BLV, targets_BL, mask_BL), 0)


def test_masked_positions_do_not_matter():
    logits_BLV, targets_BL, mask_BL = draw(3)
    expected = cross_entropy(logits_BLV, targets_BL, mask_BL)
    other_logits_BLV, other_targets_BL, _ = draw(4, scale=100)
    sums = cross_entropy(
        np.where(mask_BL[..., None], logits_BLV, other_logits_BLV),
        np.where(mask_BL, targets_BL, other_targets_BL),
        mask_BL,
    )
    check(sums, expected, rtol=0)


def test_parts_add_up():
    logits_BLV, targets_BL, mask_BL = draw(5)
    whole = cross_entropy(logits_BLV, targets_BL, mask_BL)
    parts = [
        cross_entropy(logits_BLV[i : i + 1], targets_BL[i : i + 1], mask_BL[i : i + 1]) for i in range(B)
    ]
    check(jax.tree.map(lambda *terms: sum(terms), *parts), whole)


def test_surely_right_and_surely_wrong():
    """The target's probability is 1, then about exp(-1e4)."""
    logits_BLV = np.zeros((1, 2, V), np.float32)
    logits_BLV[..., 4] = 1e4
    sums = cross_entropy(logits_BLV, np.array([[4, 3]]), np.ones((1, 2), bool))
    check(sums, {"loss": 1e4, "correct": 1, "count": 2})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_states_are_computed_in_float32(dtype):
    logits_BLV, targets_BL, mask_BL = draw(6)
    narrow_BLV = jnp.asarray(logits_BLV, dtype)
    targets_BL = np.where(mask_BL, np.asarray(narrow_BLV, np.float32).argmax(-1), targets_BL)
    targets_BL[1] = (targets_BL[1] + 1) % V  # else all would be right
    expected, expected_gradient = numpy_sums(np.asarray(narrow_BLV, np.float32), targets_BL, mask_BL)
    check(cross_entropy(narrow_BLV, targets_BL.astype(np.uint16), mask_BL), expected)
    gradient = by_logits(narrow_BLV, targets_BL, mask_BL)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected_gradient, rtol=0.01, atol=1e-5)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "rsqrt softcap": {"softcap": 2.0, "form": "rsqrt"},
    "z_loss": {"z_loss": 0.1},
    "everything": {"bias": True, "softcap": 2.0, "z_loss": 0.1},
    "bfloat16": {"bias": True, "softcap": 2.0, "z_loss": 0.1, "dtype": jnp.bfloat16},
}


@functools.cache
def case(bias=False, softcap=0.0, z_loss=0.0, dtype=jnp.float32, form="tanh"):
    """Arrays of a loss whose positions are no whole number of chunks, and all that it should give."""
    rows, length, dim, vocab = 8, 72, 16, 384
    rng = np.random.default_rng(7)
    x = np.asarray(jnp.asarray(rng.standard_normal((rows, length, dim)), dtype), np.float64)
    kernel_DV = rng.standard_normal((dim, vocab)).astype(np.float32) / 2
    bias_V = rng.standard_normal(vocab).astype(np.float32) if bias else None
    used_DV = np.asarray(jnp.asarray(kernel_DV, dtype), np.float64)
    logits = x @ used_DV + (bias_V if bias else 0.0)
    wide = 1 + (logits / softcap) ** 2 if form == "rsqrt" else None
    slope = wide**-1.5 if form == "rsqrt" else 1.0
    if form == "rsqrt":
        logits = logits / np.sqrt(wide)
    elif softcap:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    targets = np.where(
        rng.random((rows, length)) < 0.3, logits.argmax(-1), rng.integers(0, vocab, (rows, length))
    )
    mask = rng.random((rows, length)) < 0.7
    mask[1] = False
    sums, d = numpy_sums(logits, targets, mask, z_loss)
    d = d * slope
    gradients = {"kernel": np.einsum("bld,blv->dv", x, d), "x": d @ used_DV.T}
    gradients |= {"bias": d.sum((0, 1))} if bias else {}
    head = Head(jnp.asarray(kernel_DV), jnp.asarray(bias_V) if bias else None, SoftCap(softcap, form))
    return (head, jnp.asarray(x, dtype), targets, mask), sums, gradients


CASES = [("everything", sizes) for sizes in MESHES[2:]]
CASES += [(name, sizes) for name in HEADS for sizes in MESHES[:2]]


def mesh_name(sizes) -> str:
    return " ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one"


@pytest.mark.evidence("the loss in chunks against float64, on five meshes, with its gradients")
@pytest.mark.parametrize("name, sizes", CASES, ids=lambda v: v if isinstance(v, str) else mesh_name(v))
def test_chunks_on_a_mesh_equal_numpy(name, sizes):
    """Sums and gradients by head and states, the factor before them 3."""
    arguments, expected, expected_gradients = case(**HEADS[name])
    loss = CrossEntropy(Parallel(one_mesh(**sizes)), logits_mib=0.01, z_loss=HEADS[name].get("z_loss", 0.0))

    def tripled(head, x_BLD):
        objective, sums = loss.sums(head, x_BLD, *arguments[2:])
        return 3 * objective, (objective, sums)

    (d_head, dx_BLD), (objective, sums) = jax.jit(jax.grad(tripled, argnums=(0, 1), has_aux=True))(
        *arguments[:2]
    )
    check(sums, expected)
    np.testing.assert_allclose(objective, expected["loss"] + expected.get("z_loss", 0.0), rtol=2e-6)
    assert dx_BLD.dtype == arguments[1].dtype and d_head.kernel_DV.dtype == jnp.float32
    found = {"kernel": d_head.kernel_DV, "x": dx_BLD.astype(jnp.float32), "bias": d_head.bias_V}
    # In bfloat16 by 2^-9 three times: the logits' gradient, the states' and its triple.
    rounding = 3 * 2**-9 if dx_BLD.dtype == jnp.bfloat16 else 2e-6
    for name, wanted in expected_gradients.items():
        np.testing.assert_allclose(found[name], 3 * wanted, rtol=0, atol=rounding * 3 * np.abs(wanted).max())
    check(jax.jit(loss.sums)(*arguments)[1], expected)  # without gradients it takes another way


@pytest.mark.parametrize("sizes", MESHES[:2], ids=mesh_name)
def test_maximum_and_sum_in_one_pass(sizes, monkeypatch):
    """As GPUs compute it: the logits are read by one reduction, not by two; exp of some would overflow."""
    monkeypatch.setattr(module, "on_cpu", lambda mesh: False)
    (head, x_BLD, targets_BL, mask_BL), _, _ = case()
    logits = 20 * (np.asarray(x_BLD, np.float64) @ np.asarray(head.kernel_DV, np.float64))
    expected, d = numpy_sums(logits, targets_BL, mask_BL)
    head = Head(20 * head.kernel_DV, None)
    loss = CrossEntropy(Parallel(one_mesh(**sizes)), logits_mib=0.01)
    by_x = jax.grad(lambda x: loss.sums(head, x, targets_BL, mask_BL), has_aux=True)
    program = str(jax.make_jaxpr(by_x)(x_BLD))
    assert program.count(" reduce[") == 1 and "reduce_max" not in program
    gradient, sums = jax.jit(by_x)(x_BLD)
    check(sums, expected, rtol=1e-5)
    wanted = d @ np.asarray(head.kernel_DV, np.float64).T
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


def test_the_slope_of_one_pass():
    """Forwards, as Hessian-vector products need it, against NumPy: the largest counts as a constant."""
    rng = np.random.default_rng(3)
    logits, direction = np.float32(5 * rng.standard_normal((2, 3, 7)))
    (top, total), (_, slope) = jax.jvp(module._top_and_total, (logits,), (direction,))
    terms = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    np.testing.assert_array_equal(top, logits.max(1))
    np.testing.assert_allclose(total, terms.sum(1), rtol=1e-6)
    np.testing.assert_allclose(slope, (terms * direction).sum(1), rtol=1e-5)


@pytest.mark.parametrize("sizes", MESHES[:2], ids=mesh_name)
def test_a_scale_keeps_small_float16_gradients(sizes):
    """Targets that the model is sure of: the others' gradients are near 1e-7, those of states near 1e-8.

    Against the same in float64; without the scale, much is lost.
    """
    (head, x_BLD, targets_BL, mask_BL), _, _ = case()
    x_BLD = jnp.asarray(x_BLD, jnp.float16)
    kernel_DV = jnp.asarray(head.kernel_DV * 2**-14, jnp.float16)
    bias_V = np.where(np.arange(head.kernel_DV.shape[1]) == 5, 15.5, 0.0).astype(np.float32)
    targets_BL = np.full_like(targets_BL, 5)
    x, kernel = np.asarray(x_BLD, np.float64), np.asarray(kernel_DV, np.float64)
    _, d = numpy_sums(x @ kernel + bias_V, targets_BL, mask_BL)
    expected = [np.delete(np.einsum("bld,blv->dv", x, d), 5, axis=1), d @ kernel.T]
    head = Head(kernel_DV.astype(jnp.float32), jnp.asarray(bias_V), head.softcap)
    loss = CrossEntropy(Parallel(one_mesh(**sizes)), logits_mib=0.01)

    def errors(scale):
        """Of the gradients by kernel and by states, over the scale, in units of their norms."""
        gradient = jax.jit(jax.grad(lambda h, x: loss.sums(h, x, targets_BL, mask_BL, scale)[0], (0, 1)))
        d_head, dx_BLD = gradient(head, x_BLD)
        assert dx_BLD.dtype == jnp.float16
        found = np.delete(d_head.kernel_DV, 5, axis=1), np.asarray(dx_BLD, np.float64)
        return [
            np.linalg.norm(got / (scale or 1) - wanted) / np.linalg.norm(wanted)
            for got, wanted in zip(found, expected, strict=True)
        ]

    assert max(errors(jnp.float32(2**18))) < 2e-3
    assert min(errors(None)) > 0.01


@pytest.mark.parametrize("sizes", MESHES[:2], ids=mesh_name)
def test_tokens_equal_numpy(sizes):
    (head, x_BLD, targets_BL, _), _, _ = case(softcap=2.0, bias=True)
    logits = np.asarray(x_BLD, np.float64) @ np.asarray(head.kernel_DV, np.float64) + head.bias_V
    logits = 2 * np.tanh(logits / 2)
    tokens = jax.jit(CrossEntropy(Parallel(one_mesh(**sizes)), 0.01).per_token)(head, x_BLD, targets_BL)
    log_total = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, targets_BL[..., None], -1)[..., 0]
    np.testing.assert_allclose(tokens["log_total"], log_total, rtol=2e-6)
    np.testing.assert_allclose(tokens["loss"], log_total - target, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(tokens["correct"], logits.argmax(-1) == targets_BL)


def test_chunk_sizes():
    """Within the bound, a multiple of 128, and as even as can be."""
    assert chunk_size(4096, 50304, 256) == 1024
    assert chunk_size(4096, 50304 // 2, 256) == 2048
    assert chunk_size(4096, 50304, 0) == 4096
    assert chunk_size(700, 384, 256) == 700
    assert chunk_size(700, 384, 1) == 384  # 682 would fit, but 2 * 384 holds them, too
    assert chunk_size(700, 1 << 20, 1) == 128


def abstract(mesh, vocab, positions=(8, 256), dim=64):
    """Head, states, targets and mask as they lie on the mesh."""

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(axes)))

    return (
        Head(array((dim, vocab), jnp.float32, "embed", "vocab"), None),
        array((*positions, dim), jnp.float32, "batch", "length", None),
        array(positions, jnp.int32, "batch", "length"),
        array(positions, jnp.bool_, "batch", "length"),
    )


def compiled(function, mesh, vocab):
    return jax.jit(jax.grad(function, argnums=(0, 1), has_aux=True)).lower(*abstract(mesh, vocab)).compile()


@pytest.mark.evidence("the loss's memory does not grow with the vocabulary, from compiled programs")
def test_memory_does_not_grow_with_the_vocabulary():
    """Temporaries of loss and gradient at V and 2 V, in sizes of a kernel, against optax on all logits."""
    mesh, vocab, kernel = one_mesh(), 4096, 4 * 64 * 4096

    def plain(head, x_BLD, targets_BL, mask_BL):
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(head(x_BLD), targets_BL)
        return jnp.sum(losses_BL * mask_BL), None

    def growth(function):
        once, twice = (
            compiled(function, mesh, size).memory_analysis().temp_size_in_bytes for size in (vocab, 2 * vocab)
        )
        return twice - once

    assert growth(plain) > 8 * 256 * vocab * 4
    assert growth(CrossEntropy(Parallel(mesh), logits_mib=4).sums) < kernel + 0.02 * growth(plain)


def test_logits_are_computed_once():
    """The head is multiplied once for the loss, three times for loss and gradient; no chunk twice."""
    mesh = one_mesh()
    loss, arguments = CrossEntropy(Parallel(mesh), logits_mib=2).sums, abstract(mesh, 4096)
    for function, products in ((loss, 1), (jax.grad(loss, argnums=(0, 1), has_aux=True), 3)):
        assert str(jax.make_jaxpr(function)(*arguments)).count("dot_general[") == products


@pytest.mark.evidence("the loss exchanges the head's kernel once, from compiled programs")
def test_the_kernel_travels_once():
    """On data 2, fsdp 2, tensor 2, in chunks: the loop exchanges a few numbers a position, and no more."""
    mesh = one_mesh(data=2, fsdp=2, tensor=2)
    program = compiled(CrossEntropy(Parallel(mesh), logits_mib=1).sums, mesh, 4096).as_text()
    exchanges, where = {"loop": [], "outside": []}, ""
    for line in program.splitlines():
        if line and not line.startswith(" "):
            where = "outside" if line.startswith("ENTRY") else "loop"
        if found := re.search(r"= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all)\(", line):
            exchanges[where].append((found[2], re.findall(r"\w+\[[\d,]*\]", found[1])))
    assert exchanges["loop"] == [("all-reduce", ["f32[128]"]), ("all-reduce", ["f32[128]", "f32[128]"])]
    of_kernels = [
        (kind, shape) for kind, shapes in exchanges["outside"] for shape in shapes if "2048" in shape
    ]
    assert sorted(of_kernels) == [
        ("all-gather", "f32[64,2048]"),
        ("all-reduce", "f32[32,2048]"),
        ("reduce-scatter", "f32[32,2048]"),
    ]
