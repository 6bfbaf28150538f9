"""SOAP and Shampoo, against their papers' formulas in NumPy's float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from optimizer_cases import (
    Adam,
    build,
    by_path,
    compare,
    draw,
    draw_gradients,
    numpy_updates,
    run,
    sides,
    some_shapes,
)

from trainit.parallel.layout import state_shardings
from trainit.parallel.mesh import make_mesh

FIELDS = {"beta1": 0.8, "beta2": 0.7, "shampoo_beta": 0.6, "precondition_every": 2}
# Sides of 64 are left out: in one gradient's 64 x 64 factor, 48 eigenvectors are anybody's.
MAX_SIZE = 32


def by_matrix(make_one, max_size=MAX_SIZE):
    """A direction from one of single matrices; `make_one`() makes one for each layer of each parameter."""
    ones = {}

    def direction(path, g, t):
        def matrix(name, x, layer):
            rows, columns, left, right = sides(name, x.shape, max_size)
            one = ones.setdefault((path, layer), make_one())
            return one(x.reshape(rows, columns), left, right, t).reshape(x.shape)

        if path.endswith(("bias", "scale")):
            return ones.setdefault(path, make_one()).vector(g, t)
        if path.startswith("blocks/"):
            return np.stack([matrix(path, x, layer) for layer, x in enumerate(g)])
        return matrix(path, g, None)

    return direction


class Soap:
    """Algorithm 3 of Vyas et al. with the authors' beginning: the first gradient sets bases and no more."""

    def __init__(self):
        self.m = self.v = 0.0
        self.adam = Adam(0.8, 0.7, 0.03)

    def vector(self, g, t):
        return np.zeros_like(g) if t == 1 else self.adam(g)

    def __call__(self, g, left, right, t):
        if t == 1:
            self.factors = [0.4 * g @ g.T, 0.4 * g.T @ g]
            self.bases = [
                np.linalg.eigh(factor)[1][:, ::-1] if there else np.eye(len(factor))
                for factor, there in zip(self.factors, (left, right), strict=True)
            ]
            return np.zeros_like(g)
        q_left, q_right = self.bases
        rotated = q_left.T @ g @ q_right
        self.m = 0.8 * self.m + 0.2 * g
        self.v = 0.7 * self.v + 0.3 * rotated**2
        mean = q_left.T @ self.m @ q_right / (1 - 0.8 ** (t - 1))
        direction = q_left @ (mean / (np.sqrt(self.v / (1 - 0.7 ** (t - 1))) + 0.03)) @ q_right.T
        products = [g @ g.T, g.T @ g]
        self.factors = [0.6 * f + 0.4 * p for f, p in zip(self.factors, products, strict=True)]
        if (t - 1) % 2 == 0:
            for axis, there in enumerate((left, right)):
                if there:
                    q, p = self.bases[axis], self.factors[axis]
                    order = np.argsort(-np.diag(q.T @ p @ q))
                    self.bases[axis] = np.linalg.qr((p @ q)[:, order])[0]
                    self.v = np.take(self.v, order, axis)
        return direction


def test_soap():
    parameters, gradients = draw(some_shapes(), 61), draw_gradients(some_shapes())
    fields = FIELDS | {"eps": 0.03, "max_size": MAX_SIZE}
    got = run(build("soap", fields, 0.3, 40.0), parameters, gradients)
    want = numpy_updates(by_matrix(Soap), parameters, gradients, 0.3, 40.0)
    assert not any(by_path(got[0])[path].any() for path in want[0] if path.endswith(("bias", "scale")))
    compare(got[1:], want[1:], rtol=2e-3)


def test_a_device_has_one_layers_squares_at_a_time():
    """No buffer is larger than a device's share of the largest squares, all layers, or one whole square."""
    shapes = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((8, 32, 128), jnp.float32)}}}}
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4, "context": 1})
    optimizer = build("soap", {}, shapes=shapes, mesh=mesh)
    state = jax.eval_shape(optimizer.init, shapes)
    layout = state_shardings((shapes, state, shapes), shapes, mesh)
    arguments = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (shapes, state, shapes), layout
    )
    for leaf in jax.tree.leaves(arguments):
        assert not leaf.shape or leaf.sharding.shard_shape(leaf.shape)[1:] == (
            leaf.shape[1] // 2,
            leaf.shape[2] // 4,
        )
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, step=1), out_shardings=layout[:2])
    lowered = update.lower(*arguments)
    assert lowered.as_text().count("dot_general") == lowered.as_text().count("[HIGHEST, HIGHEST]") > 0
    text = lowered.compile().as_text()
    largest = max(int(np.prod(list(map(int, s.split(","))))) for s in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest == 8 * 128 * 128 // 8


def numpy_shampoo(graft):
    """Gupta et al. with means, roots at every second gradient, and the length of another direction."""

    class Shampoo:
        def __init__(self):
            self.m = 0.0
            self.factors = [0.0, 0.0]
            self.adam = Adam(0.8, 0.7, 0.03)

        def vector(self, g, t):
            return self.adam(g)

        def __call__(self, g, left, right, t):
            self.m = 0.8 * self.m + 0.2 * g
            mean = self.m / (1 - 0.8**t)
            self.factors = [0.6 * f + 0.4 * p for f, p in zip(self.factors, (g @ g.T, g.T @ g), strict=True)]
            if t % 2:
                self.roots = [np.eye(len(f)) for f in self.factors]
                for axis, there in enumerate((left, right)):
                    if there:
                        values, vectors = np.linalg.eigh(self.factors[axis] / (1 - 0.6**t))
                        raised = (values + 0.01 * values.max()) ** (-1 / (2 * (left + right)))
                        self.roots[axis] = vectors @ np.diag(raised) @ vectors.T
            direction = self.roots[0] @ mean @ self.roots[1]
            other = {"adam": self.adam(g), "sgd": mean, "none": direction}[graft]
            return direction * np.linalg.norm(other) / np.linalg.norm(direction)

    return Shampoo


@pytest.mark.parametrize("graft", ["adam", "sgd", "none"])
def test_shampoo(graft):
    parameters, gradients = draw(some_shapes(), 62), draw_gradients(some_shapes())
    max_size = MAX_SIZE if graft == "adam" else 64  # roots do not depend on which eigenvectors are taken
    fields = FIELDS | {"eps": 0.03, "ridge": 0.01, "graft": graft, "max_size": max_size}
    got = run(build("shampoo", fields, 0.3, 40.0), parameters, gradients)
    direction = by_matrix(numpy_shampoo(graft), max_size)
    want = numpy_updates(direction, parameters, gradients, 0.3, 40.0)
    compare(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("shampoo", {"graft": "lion"}, "optimizer.graft='lion' is none of 'adam', 'sgd', 'none'"),
        ("shampoo", {"ridge": 0.0}, "optimizer.ridge=0.0 must be above 0"),
        ("soap", {"precondition_every": 0}, "optimizer.precondition_every=0 must be above 0"),
    ],
)
def test_refusals(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, changes)


def test_squares_are_split_where_that_divides():
    """A side of 6 is not split over 4 devices, and a square that belongs to no parameter not at all."""
    shapes = {"blocks": {"mlp": {"down": {"kernel": jax.ShapeDtypeStruct((3, 6, 8), jnp.float32)}}}}
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    left, right = ({"blocks": {"mlp": {"down": {"kernel": jnp.zeros((3, n, n))}}}} for n in (6, 8))
    layout = state_shardings((left, right, jnp.zeros((3, 8, 8))), shapes, mesh)
    specs = [s.spec for s in jax.tree.leaves(layout)]
    assert specs == [P(None, "tensor", None), P(None, "tensor", "fsdp"), P()]
