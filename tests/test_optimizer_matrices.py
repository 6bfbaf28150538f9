"""Muon and what else looks at a parameter's matrix: against NumPy's float64, optax, and on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizer_cases import (
    RATES,
    build,
    by_path,
    compare,
    draw,
    draw_gradients,
    numpy_updates,
    parameter_shapes,
    run,
    some_shapes,
)
from test_optimizer_formulas import numpy_adam, numpy_momentum

from trainit.parallel.layout import logical_axes, parameter_kind, partition_spec
from trainit.parallel.mesh import make_mesh
from trainit.transforms import newton_schulz

FLOAT32 = {"ns_precision": "float32"}
INPUTS = {"query/kernel": 1, "up/kernel": 1, "head/kernel": 1}  # axes; all but the last for the others


def numpy_newton_schulz(x, steps=5, eps=1e-7, quintic=(3.4445, -4.7750, 2.0315)):
    """Jordan's reference: Frobenius norm, then the quintic."""
    x, (a, b, c) = x / (np.sqrt((x**2).sum()) + eps), quintic
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def numpy_muon(path, u, *options):
    """A parameter's update: each layer as its (inputs, outputs) matrix."""
    if path.startswith("blocks/"):
        return np.stack([numpy_muon(path.removeprefix("blocks/"), layer, *options) for layer in u])
    inputs = next((n for end, n in INPUTS.items() if path.endswith(end)), u.ndim - 1)
    x = u.reshape(int(np.prod(u.shape[:inputs])), -1)
    rows, columns = x.shape
    ratio = rows / columns if path.endswith("embedding") else columns / rows
    return (numpy_newton_schulz(x, *options) * np.sqrt(max(1, ratio))).reshape(u.shape)


def numpy_laprop(beta1, beta2, eps):
    """Ziyin et al. 2020, algorithm 1."""
    m, v = {}, {}

    def direction(path, g, t):
        v[path] = beta2 * v.get(path, 0.0) + (1 - beta2) * g**2
        m[path] = beta1 * m.get(path, 0.0) + (1 - beta1) * g / (np.sqrt(v[path] / (1 - beta2**t)) + eps)
        return m[path] / (1 - beta1**t)

    return direction


def kind(path: str) -> str:
    if path.endswith("embedding"):
        return "embedding"
    if path.endswith(("bias", "scale")):
        return "vector"
    return "head" if path.startswith("head") else "matrix"


@pytest.mark.parametrize(
    ("name", "changes", "kinds"),
    [
        ("muon", {"nesterov": False}, {"matrix"}),
        ("muon", {"ns_coefficients": "convergent", "ns_steps": 9}, {"matrix"}),
        ("muon", {"rest": "laprop"}, {"matrix"}),
        ("muon_og", {}, {"matrix"}),
        ("muon_og", {"ns_embedding": True, "ns_head": True, "ns_steps": 3}, {"matrix", "embedding", "head"}),
    ],
)
def test_muon(name, changes, kinds):
    parameters, gradients = draw(some_shapes(), 21), draw_gradients(some_shapes())
    fields = {"momentum": 0.7, "rest_rate": 0.5, "rest_beta1": 0.8, "rest_beta2": 0.97, "rest_eps": 1e-3}
    updates = run(build(name, FLOAT32 | fields | changes, 0.3, 40.0), parameters, gradients)
    momentum = numpy_momentum(0.7, changes.get("nesterov", True))
    rest = numpy_laprop if changes.get("rest") == "laprop" else lambda *a: numpy_adam(*a, False)
    rest = rest(0.8, 0.97, 1e-3)

    def direction(path, g, t):
        if kind(path) in kinds:
            quintic = (2, -1.5, 0.5) if "ns_coefficients" in changes else (3.4445, -4.7750, 2.0315)
            return numpy_muon(path, momentum(path, g, t), changes.get("ns_steps", 5), 1e-7, quintic)
        return rest(path, g, t)

    def rates(path):
        return 1.0 if kind(path) in kinds else 0.5

    expected = numpy_updates(direction, parameters, gradients, 0.3, 40.0, rates=rates)
    compare(updates, expected, rtol=2e-3)  # the quintic is steep


def test_normuon():
    """Li et al. 2025, algorithm 1: each output's mean square of Muon's direction, and 0.2 as its rms."""
    parameters, gradients = draw(some_shapes(), 23), draw_gradients(some_shapes())
    fields = {"momentum": 0.7, "beta2": 0.6, "rest_rate": 0.5, "rest_eps": 1e-3, **FLOAT32}
    updates = run(build("normuon", fields, 0.3, 40.0), parameters, gradients)
    momentum, rest, squares = numpy_momentum(0.7, False), numpy_adam(0.95, 0.95, 1e-3, False), {}

    def even(path, name, u):
        if path.startswith("blocks/"):
            layers = range(len(u))
            return np.stack([even(path.removeprefix("blocks/"), f"{name}{n}", u[n]) for n in layers])
        inputs = next((n for end, n in INPUTS.items() if path.endswith(end)), u.ndim - 1)
        matrix = u.reshape(int(np.prod(u.shape[:inputs])), -1)
        squares[name] = 0.6 * squares.get(name, 0.0) + 0.4 * (matrix**2).mean(0)
        matrix = matrix / (np.sqrt(squares[name]) + 1e-8)
        return (0.2 * matrix / np.sqrt((matrix**2).mean())).reshape(u.shape)

    def direction(path, g, t):
        if kind(path) != "matrix":
            return rest(path, g, t)
        return even(path, path, numpy_muon(path, momentum(path, g, t)))

    expected = numpy_updates(
        direction, parameters, gradients, 0.3, 40.0, rates=lambda path: 1.0 if kind(path) == "matrix" else 0.5
    )
    compare(updates, expected, rtol=2e-3)


def test_newton_schulz_nearly_orthogonalizes():
    """Singular values between 0.65 and 1.25 from those of a random matrix, and nearly as much in bfloat16."""
    x = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)
    for dtype in ("float32", "bfloat16"):
        y = newton_schulz.newton_schulz(jnp.asarray(x), 5, dtype, 1e-7)
        assert y.dtype == jnp.float32
        values = np.linalg.svd(y, compute_uv=False)
        assert values.min() > 0.65 and values.max() < 1.25
    u, _, v = np.linalg.svd(x, full_matrices=False)
    assert np.sum(y * (u @ v)) / np.linalg.norm(y) / np.linalg.norm(u @ v) > 0.97


def test_muon_is_optax_muon():
    """An independent implementation, without Nesterov's form, in which it corrects a bias as NAdam does."""
    shapes = {"blocks": {"mlp": some_shapes()["blocks"]["mlp"]}}
    parameters, gradients = draw(shapes, 22), [draw(shapes, seed) for seed in range(5)]
    fields = FLOAT32 | {"ns_eps": 1e-8, "nesterov": False}
    ours = run(build("muon", fields, shapes=shapes), parameters, gradients)
    numbers = optax.contrib.MuonDimensionNumbers(1, 2)
    numbers = jax.tree.map(lambda _: numbers, shapes)
    theirs = optax.contrib.muon(1.0, nesterov=False, muon_weight_dimension_numbers=numbers)
    state = theirs.init(parameters)
    for step, gradient, got in zip((4, 9, 2, 2, 7), gradients, ours, strict=True):
        change, state = jax.jit(theirs.update)(gradient, state, parameters)
        want = {path: RATES[step] * u for path, u in by_path(change).items()}
        for path, u in by_path(got).items():
            np.testing.assert_allclose(u, want[path], atol=2e-3 * np.abs(want[path]).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rest": "sgdm"}, "optimizer.rest='sgdm' is none of 'adamw', 'laprop'"),
        ({"ns_precision": "float16"}, "optimizer.ns_precision='float16' is none of"),
        ({"ns_steps": 0}, "optimizer.ns_steps=0 must be above 0"),
        ({"rest_rate": -1.0}, "optimizer.rest_rate=-1.0 must not be below 0"),
    ],
)
def test_muon_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        build("muon", changes)


@pytest.mark.parametrize(
    ("sizes", "layers", "padded"),
    # Padded to a multiple of the devices that share the work: those that hold parts, and replicas if there
    # are layers for them.
    [
        ((1, 8, 1), 12, 16),
        ((1, 2, 4), 12, 16),
        ((2, 2, 2), 12, 16),
        ((8, 1, 1), 12, 16),
        ((8, 1, 1), 2, 2),
        ((2, 2, 2), 4, 4),
        ((4, 2, 1), 6, 6),
    ],
)
def test_a_device_has_one_whole_matrix_at_a_time(sizes, layers, padded):
    """On any mesh: the same result, and no buffer larger than the device's share or one layer's matrix."""
    path, shape = "blocks/mlp/up/kernel", (layers, 64, 256)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor", "context"), (*sizes, 1), strict=True)))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    layout = jax.NamedSharding(mesh, partition_spec(logical_axes(path)))
    options = {"steps": 5, "dtype": "float32", "eps": 1e-7}
    compiled = (
        jax.jit(lambda x: newton_schulz.orthogonalize(path, x, mesh, **options), out_shardings=layout)
        .lower(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout))
        .compile()
    )
    got = compiled(jax.device_put(x, layout))
    np.testing.assert_allclose(got, numpy_muon(path, x.astype(np.float64)), atol=1e-3)
    text = compiled.as_text()
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    share = padded * 64 * 256 // (sizes[1] * sizes[2])
    assert max(int(np.prod(s)) for s in shapes) <= max(share, 64 * 256), sorted(set(shapes))[-5:]


def test_every_matrix_has_rows_and_columns():
    for path, leaf in by_path(draw(parameter_shapes(), 0)).items():
        if parameter_kind(path) != "vector":
            shape = leaf.shape[1:] if path.startswith("blocks") else leaf.shape
            rows, columns = newton_schulz.matrix_shape(path, shape)
            assert rows * columns == np.prod(shape)
            ends = {"out/kernel": (16, 16), "query/kernel": (16, 16), "up/kernel": (16, 64)}
            ends |= {"down/kernel": (64, 16), "head/kernel": (16, 128)}
            for end, expected in ends.items():
                assert not path.endswith(end) or (rows, columns) == expected


def numpy_size(path, x, name):
    """Norms of one layer's parameter; units of matrices are columns, of embeddings rows."""
    if kind(path) == "vector":
        return {"l2": np.sqrt((x**2).sum()), "inf": np.abs(x).max()}.get(name, np.abs(x))
    inputs = next((n for end, n in INPUTS.items() if path.endswith(end)), x.ndim - 1)
    matrix = x.reshape(int(np.prod(x.shape[:inputs])), -1)
    units = matrix if kind(path) == "embedding" else matrix.T
    whole = {
        "l2": lambda: np.linalg.norm(units),
        "inf": lambda: np.linalg.norm(units, np.inf),
        "op": lambda: np.linalg.norm(units, 2),
    }
    if name in whole:
        return whole[name]()
    each = {"l2_row": np.linalg.norm(units, axis=1), "inf_row": np.abs(units).max(1)}[name]
    each = np.repeat(each[:, None], units.shape[1], 1)
    return (each if kind(path) == "embedding" else each.T).reshape(x.shape)


def by_layer(function, path, *arrays):
    if path.startswith("blocks/"):
        short = path.removeprefix("blocks/")
        return np.stack([function(short, *layer) for layer in zip(*arrays, strict=True)])
    return function(path, *arrays)


def mango_kind(path: str) -> str:
    if re.search("attention/(query|key|value)/", path):
        return {"kernel": "attention_kernel", "bias": "attention_bias"}[path.split("/")[-1]]
    return path.split("/")[-1] if kind(path) == "vector" else kind(path)


MANGO = {  # every normalization, every scaling and every way to keep moments
    "matrix": {"normalize": "ns", "scale": "l2", "rate": 0.5},
    "attention_kernel": {"normalize": "l2_row", "scale": "inf", "beta2": 0.0},
    "head": {"normalize": "inf", "scale": "l2_row", "use_adam": True},
    "embedding": {"normalize": "inf_row", "scale": "inf_row", "nesterov": False},
    "attention_bias": {"normalize": "inf_row", "scale": "none"},
    "scale": {"normalize": "none", "scale": "inf", "use_adam": True, "nesterov": False},
    "bias": {"normalize": "l2", "scale": "l2", "scale_power": 0.5},
}


def numpy_split(path, u, name):
    """Queries' kernels (inputs, heads, size) or biases (heads, size), head by head."""
    heads = np.moveaxis(u, -2, 0)
    if name == "ns_split":
        return np.moveaxis(np.stack([numpy_newton_schulz(head, 4, 1e-3) for head in heads]), 0, -2)
    if name == "l2_split":
        sizes = [np.sqrt((head**2).sum()) for head in heads]
    else:
        sizes = [np.abs(head).sum(0).max() if head.ndim == 2 else np.abs(head).max() for head in heads]
    return u / (np.array(sizes)[:, None] + 1e-3)


@pytest.mark.parametrize(
    ("offset_beta", "split"), [(0.0, None), (0.8, None), (0.0, "l2"), (0.0, "inf"), (0.0, "ns")]
)
def test_mango(offset_beta, split):
    parameters, gradients = draw(some_shapes(), 23), draw_gradients(some_shapes())
    parameters["head"]["bias"] *= 0  # moves by the floor
    fields = FLOAT32 | {"offset_beta": offset_beta, "eps": 1e-3, "scale_floor": 0.2, "ns_steps": 4}
    kinds = dict(MANGO)
    if split:
        kinds["attention_kernel"] = MANGO["attention_kernel"] | {"normalize": f"{split}_split"}
        kinds["attention_bias"] = {
            "normalize": "inf_split" if split == "inf" else "l2_split",
            "scale": "none",
        }
    fields |= kinds
    updates = run(build("mango", fields, 0.3, 40.0), parameters, gradients)
    v, o, x, moments = {}, {}, by_path(parameters), {}

    def direction(path, g, t):
        if t > 1:  # the parameters that this step starts from
            x[path] = x[path] + by_path(updates[t - 2])[path]
        c = {
            "beta1": 0.95,
            "beta2": 0.95,
            "nesterov": True,
            "use_adam": False,
            "rate": 1.0,
            "scale_power": 1.0,
        }
        c |= kinds[mango_kind(path)]
        if c["use_adam"]:
            adam = moments.setdefault(path, numpy_adam(c["beta1"], c["beta2"], 1e-3, c["nesterov"]))
            u = adam(path, g, t)
        else:
            if c["beta2"]:
                v[path] = c["beta2"] * v.get(path, 0.0) + g**2
                g = g / (np.sqrt(v[path]) + 1e-3)
            u = moments.setdefault(path, numpy_momentum(c["beta1"], c["nesterov"]))(path, g, t)
        if c["normalize"].endswith("split"):
            u = by_layer(lambda p, u: numpy_split(p, u, c["normalize"]), path, u)
        elif c["normalize"] == "ns":
            u = numpy_muon(path, u, 4)
        elif c["normalize"] != "none":
            u = by_layer(lambda p, u: u / (numpy_size(p, u, c["normalize"]) + 1e-3), path, u)
        if c["scale"] != "none":

            def scaled(p, u, x):
                return u * np.maximum(numpy_size(p, x, c["scale"]), 0.2) ** c["scale_power"]

            u = by_layer(scaled, path, u, x[path])
        u = c["rate"] * u
        if offset_beta:
            o[path] = offset_beta * o.get(path, 0.0) + (1 - offset_beta) * u
            u = u + o[path]
        return u

    compare(updates, numpy_updates(direction, parameters, gradients, 0.3, 40.0), rtol=2e-3)


def test_spectral_norm():
    for seed, shape in enumerate([(48, 32), (32, 48), (8, 200)]):
        x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        largest = np.linalg.norm(x, 2)
        assert 0.95 * largest < newton_schulz.spectral_norm(jnp.asarray(x)) < 1.0001 * largest
    assert newton_schulz.spectral_norm(jnp.zeros((3, 4))) == 0
    np.testing.assert_allclose(newton_schulz.spectral_norm(jnp.diag(jnp.array([3.0, 1.0]))), 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matrix": {"normalize": "l3"}},
            r"optimizer.matrix.normalize='l3' is none of 'none', 'l2', 'l2_row'",
        ),
        ({"bias": {"normalize": "ns"}}, r"optimizer.bias.normalize=ns is for matrices"),
        ({"attention_bias": {"normalize": "ns_split"}}, r"normalize=ns_split is for matrices"),
        ({"matrix": {"normalize": "l2_split"}}, r"l2_split is for attention's queries, keys and values"),
        ({"head": {"rate": -1.0}}, r"optimizer.head.rate=-1.0 must not be below 0"),
        ({"scale_floor": 0.0}, r"optimizer.scale_floor=0.0 must be above 0"),
    ],
)
def test_mango_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        build("mango", changes)
