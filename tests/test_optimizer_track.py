"""What modded-nanoGPT's optimization track brought: formulas in NumPy's float64 against what is computed."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from optimizer_cases import (
    RATES,
    STEPS,
    build,
    by_path,
    compare,
    decays,
    draw,
    draw_gradients,
    draw_gradients_with_a_basis,
    jitted,
    numpy_updates,
    run,
    sides,
    some_shapes,
)
from test_optimizer_formulas import numpy_adam, numpy_momentum
from test_optimizer_matrices import FLOAT32, INPUTS, by_layer, kind, numpy_newton_schulz

from trainit import optimizers
from trainit.config import ConfigError, resolve
from trainit.transforms.newton_schulz import COEFFICIENTS

pytestmark = pytest.mark.evidence("optimizers and wrappers against the formulas of their papers, in float64")
REST = {"rest_rate": 0.5, "rest_beta1": 0.8, "rest_beta2": 0.97, "rest_eps": 1e-3}


def matrix(path, x):
    """One layer's parameter as (inputs, outputs)."""
    inputs = next((n for end, n in INPUTS.items() if path.endswith(end)), x.ndim - 1)
    return x.reshape(int(np.prod(x.shape[:inputs])), -1)


def muon_like(make_update):
    """Directions and rates of an optimizer: `make_update`(path)(matrix, t) for matrices, AdamW elsewhere."""
    rest, layers = numpy_adam(0.8, 0.97, 1e-3, False), {}

    def direction(path, g, t):
        if kind(path) != "matrix":
            return rest(path, g, t)
        each = layers.setdefault(path, [make_update(path) for _ in g])
        return np.stack([one(matrix(path, x), t).reshape(x.shape) for one, x in zip(each, g, strict=True)])

    return direction, lambda path: 1.0 if kind(path) == "matrix" else 0.5


def unit(x, of):
    """x (inputs, outputs) with norms 1."""
    axes = {"inputs": 1, "outputs": 0}
    return x / (np.linalg.norm(x, axis=axes[of], keepdims=True) + 1e-7) if of in axes else x


SCALES = {
    "jordan": lambda rows, columns: np.sqrt(max(1, columns / rows)),
    "moonlight": lambda rows, columns: 0.2 * np.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: np.sqrt(columns / rows),
    "none": lambda rows, columns: 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "moonlight"},
        {"scale": "spectral"},
        {"scale": "none"},
        {"equilibrate": "outputs"},
        {"equilibrate": "inputs", "normalize": "outputs", "scale": "moonlight"},
        {"normalize": "inputs"},
        {"ns_coefficients": "dion"},
        {"ns_coefficients": "polar_express", "ns_steps": 9},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_fields_of_muon(changes):
    """Scales by a matrix's size; MuonEq (before) and Muon+ (after): norms of outputs or inputs become 1."""
    parameters, gradients = draw(some_shapes(), 21), draw_gradients(some_shapes())
    fields = FLOAT32 | REST | {"momentum": 0.7} | changes
    updates = run(build("muon", fields, 0.3, 40.0), parameters, gradients)

    def make_update(path):
        momentum = numpy_momentum(0.7, True)

        def update(g, t):
            x = unit(momentum(path, g, t), changes.get("equilibrate", "none"))
            x = x / (np.linalg.norm(x) + 1e-7)
            triples = COEFFICIENTS[changes.get("ns_coefficients", "jordan")]
            for i in range(changes.get("ns_steps", 5)):
                a, b, c = triples[min(i, len(triples) - 1)]
                gram = x @ x.T
                x = a * x + b * gram @ x + c * gram @ gram @ x
            scale = SCALES[changes.get("scale", "jordan")](*x.shape)
            return scale * unit(x, changes.get("normalize", "none"))

        return update

    direction, rates = muon_like(make_update)
    expected = numpy_updates(direction, parameters, gradients, 0.3, 40.0, rates=rates)
    compare(updates, expected, rtol=1e-2 if "ns_steps" in changes else 2e-3)


def test_coefficients():
    """What they are for: small singular values reach 1 in few iterations, and the last ones are optax's."""

    def after(name, steps):
        x = np.geomspace(1e-3, 1, 2000)
        for i in range(steps):
            a, b, c = COEFFICIENTS[name][min(i, len(COEFFICIENTS[name]) - 1)]
            x = a * x + b * x**3 + c * x**5
        return np.abs(1 - x).max()

    assert after("polar_express", 9) < 1e-4
    assert after("polar_express", 6) < 0.05
    # As fast as the authors say: Jordan's and Newton-Schulz's own leave small ones behind.
    assert after("polar_express", 6) < 0.2 * min(after("jordan", 6), after("convergent", 6))

    shapes = {"blocks": {"mlp": some_shapes()["blocks"]["mlp"]}}
    parameters, gradient = draw(shapes, 22), draw(shapes, 0)
    fields = FLOAT32 | {"ns_eps": 1e-8, "nesterov": False, "ns_coefficients": "dion"}
    (ours,) = run(build("muon", fields, shapes=shapes), parameters, [gradient] * 5)[:1]
    numbers = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), shapes)
    theirs = optax.contrib.muon(1.0, nesterov=False, ns_coeffs="dion", muon_weight_dimension_numbers=numbers)
    change, _ = jax.jit(theirs.update)(gradient, theirs.init(parameters), parameters)
    for path, u in by_path(ours).items():
        want = RATES[STEPS[0]] * by_path(change)[path]
        np.testing.assert_allclose(u, want, atol=2e-3 * np.abs(want).max())


def layer_norms(x):
    """The Frobenius norm of each layer, with axes of size 1."""
    return np.sqrt((x**2).sum(tuple(range(1, x.ndim)), keepdims=True))


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_sphere(base):
    """Wen et al. 2026: matrices keep their first norm R, and move by rate R in the base's direction."""
    parameters, gradients = draw(some_shapes(), 31), draw_gradients(some_shapes())
    own = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3}
    fields = {"adamw": own, "muon": REST | FLOAT32 | {"momentum": 0.7}}
    got = run(build(f"sphere+{base}", fields[base], 0.3, 40.0), parameters, gradients)
    adam, momentum = numpy_adam(0.8, 0.97, 1e-3, False), numpy_momentum(0.7, True)

    def direction(path, g, t):
        if kind(path) != "matrix" or base == "adamw":
            return adam(path, g, t)
        mean = momentum(path, g, t)
        return by_layer(lambda p, m: numpy_newton_schulz(matrix(p, m)).reshape(m.shape), path, mean)

    x, expected = by_path(parameters), []
    radii = {path: layer_norms(x[path]) for path in x if kind(path) == "matrix"}
    for t, (step, gradient) in enumerate(zip(STEPS, map(by_path, gradients), strict=True), start=1):
        clip = min(1.0, 40.0 / np.sqrt(sum((g**2).sum() for g in gradient.values())))
        update = {}
        for path, g in gradient.items():
            u, rate = direction(path, clip * g, t), RATES[step]
            if path in radii:
                y = x[path] - rate * radii[path] * u / layer_norms(u)
                update[path] = radii[path] * y / layer_norms(y) - x[path]
            else:
                decay = 0.3 * x[path] if decays(path) else 0.0
                update[path] = -rate * (0.5 if base == "muon" else 1.0) * (u + decay)
            x[path] = x[path] + update[path]
        expected.append(update)
    compare(got, expected, 2e-3)  # a matrix's change is small next to the matrix, which rounds
    for path, want in radii.items():
        np.testing.assert_allclose(layer_norms(x[path]), want, rtol=1e-9)


def test_matrices_that_begin_at_zero_are_refused():
    config = tiny.get_config("optimizer=sphere+muon")
    config.model.update(tied_embeddings=False, init="zero_outputs")
    with pytest.raises(ConfigError, match="matrices begin at 0 and would stay there; set"):
        optimizers.check(resolve(config, 257))
    config.model.init = "gpt2"
    optimizers.check(resolve(config, 257))


def test_cautious_decay():
    """Chen et al. 2025: weights decay where the update shrinks them, too."""
    parameters, gradients = draw(some_shapes(), 41), draw_gradients(some_shapes())
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3}
    got = run(build("cautious_decay+adamw", fields, 0.3, 40.0), parameters, gradients)
    adam, x = numpy_adam(0.8, 0.97, 1e-3, False), by_path(parameters)
    expected, spared = [], 0
    for t, (step, gradient) in enumerate(zip(STEPS, map(by_path, gradients), strict=True), start=1):
        clip = min(1.0, 40.0 / np.sqrt(sum((g**2).sum() for g in gradient.values())))
        update = {}
        for path, g in gradient.items():
            u = adam(path, clip * g, t)
            decaying = (u * x[path] >= 0) & decays(path)
            spared += np.sum(~decaying & decays(path))
            update[path] = -RATES[step] * (u + 0.3 * decaying * x[path])
            x[path] = x[path] + update[path]
        expected.append(update)
    assert spared
    compare(got, expected, 1e-4)


def test_ema_nesterov():
    """Yau et al. 2026: x' = A(x + b m), with m the mean of x' - x; the model has x."""
    parameters, gradients = draw(some_shapes(), 51), draw_gradients(some_shapes())
    settings = {"lookahead": 0.7, "decay": 0.6, "start": 0.4, "end": 0.9}
    optimizer = build("ema_nesterov+adamw", {"eps": 1e-3, "ema_nesterov": settings}, 0.3, 40.0)
    update, state = jitted(optimizer), jax.jit(optimizer.init)(parameters)
    adam, x = numpy_adam(0.9, 0.999, 1e-3, False), by_path(parameters)
    mean, ahead, expected, got = dict.fromkeys(x, 0.0), 0.0, [], []
    for t, (step, given) in enumerate(zip(STEPS, gradients, strict=True), start=1):
        point = by_path(optimizers.training_point(state, parameters))
        change, state, parameters = update(given, state, parameters, np.int32(step))
        got.append(change)
        gradient = by_path(given)
        clip = min(1.0, 40.0 / np.sqrt(sum((g**2).sum() for g in gradient.values())))
        expected.append({})
        for path, g in gradient.items():
            y = x[path] + ahead * mean[path]
            np.testing.assert_allclose(point[path], y, rtol=1e-4, atol=1e-4)
            new = y - RATES[step] * (adam(path, clip * g, t) + 0.3 * decays(path) * y)
            expected[-1][path] = new - x[path]
            mean[path] = 0.6 * mean[path] + 0.4 * (new - x[path])
            x[path] = new
        ahead = 0.7 if 0.4 <= (step + 1) / len(RATES) < 0.9 else 0.0
    compare(got, expected, 1e-4)


def test_wrappers_that_do_not_go_together():
    """Two wrappers that choose where gradients are taken; a sphere whose updates another one changes."""
    names = optimizers.choices()
    for first, then in (("schedule_free", "ema_nesterov"), ("ema_nesterov", "schedule_free")):
        with pytest.raises(ConfigError, match=rf"{then} .* must come first"):
            names[f"{first}+{then}+adamw"]
    for outside in ("mechanic", "offset", "schedule_free"):
        with pytest.raises(ConfigError, match=rf"{outside} changes the updates by which sphere"):
            names[f"{outside}+sphere+muon"]
    assert names["sphere+offset+muon"]().offset.beta == 0.99
    with pytest.raises(ConfigError, match="ema_nesterov takes gradients ahead of the parameters, and so"):
        names["sam+ema_nesterov+muon"]


class SoapMuon:
    """The track's result 14 and 44: Nesterov's momentum, divided in SOAP's basis, then Muon."""

    def __init__(self, path):
        self.path, self.mean, self.square = path, 0.0, 0.0

    def __call__(self, g, t):
        self.mean = 0.7 * self.mean + 0.3 * g
        momentum = 0.7 * self.mean + 0.3 * g
        products = [g @ g.T, g.T @ g]
        if t == 1:
            self.factors = [0.4 * p for p in products]
            _, _, left, right = sides(self.path, g.shape, 32)
            self.moves = left, right
            self.bases = [
                np.linalg.eigh(p)[1][:, ::-1] if moves else np.eye(len(p))
                for p, moves in zip(products, self.moves, strict=True)
            ]
            return numpy_newton_schulz(momentum) * SCALES["jordan"](*g.shape)
        q_left, q_right = self.bases
        rotated = q_left.T @ momentum @ q_right
        self.square = 0.8 * self.square + 0.2 * rotated**2
        direction = q_left @ (rotated / (np.sqrt(self.square) + 0.03)) @ q_right.T
        self.factors = [0.6 * f + 0.4 * p for f, p in zip(self.factors, products, strict=True)]
        if (t - 1) % 2 == 0:
            for axis, moves in enumerate(self.moves):
                if moves:
                    q, p = self.bases[axis], self.factors[axis]
                    order = np.argsort(-np.diag(q.T @ p @ q))
                    self.square = np.take(self.square, order, axis)
                    self.bases[axis] = np.linalg.qr(p @ q[:, order])[0]
        return numpy_newton_schulz(direction) * SCALES["jordan"](*g.shape)


def test_soap_muon():
    gradients = draw_gradients_with_a_basis(some_shapes())
    parameters = draw(some_shapes(), 61)
    fields = FLOAT32 | REST | {"momentum": 0.7, "beta2": 0.8, "shampoo_beta": 0.6, "eps": 0.03}
    fields |= {"precondition_every": 2, "max_size": 32}
    updates = run(build("soap_muon", fields, 0.3, 0.0), parameters, gradients)
    direction, rates = muon_like(SoapMuon)
    expected = numpy_updates(direction, parameters, gradients, 0.3, 0.0, rates=rates)
    compare(updates, expected, rtol=1e-2)
    assert jnp.isfinite(updates[-1]["head"]["kernel"]).all()


class Psgd:
    """Li 2015 and 2024: triangular factors, fitted by multiplication; largest singular values by SVD."""

    def __init__(self, path, probes):
        self.path, self.probes, self.mean, self.factors = path, probes, 0.0, None

    def __call__(self, g, t):
        self.mean = 0.8 * self.mean + 0.2 * g
        mean, probe = self.mean / (1 - 0.8**t), self.probes[t - 1]
        _, _, *has = sides(self.path, g.shape, 32)
        left, right = self.factors or [np.eye(size) for size in g.shape]
        if all(has):
            ratio = np.sqrt(np.abs(right).max() / np.abs(left).max())
            left, right = left * ratio, right / ratio
        a = left @ mean @ right.T
        b = np.linalg.inv(left).T @ probe @ np.linalg.inv(right)
        pairs = [(left, a, b), (right, a.T, b.T)]
        self.factors = [
            q - 0.05 * np.triu(a @ a.T - b @ b.T) @ q / np.linalg.norm(a @ a.T + b @ b.T, 2) if moves else q
            for (q, a, b), moves in zip(pairs, has, strict=True)
        ]
        left, right = self.factors
        direction = left.T @ left @ mean @ right.T @ right
        return direction * min(1.0, 1.1 / np.sqrt((direction**2).mean()))


def test_psgd():
    parameters, gradients = draw(some_shapes(), 71), draw_gradients(some_shapes())
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3, "factor_rate": 0.05, "max_size": 32}
    updates = run(build("psgd", fields, 0.3, 40.0), parameters, gradients)
    adam, ones = numpy_adam(0.8, 0.97, 1e-3, False), {}

    def probes(path, shape):
        """What the optimizer draws for a parameter, by its key, the update and the path."""
        keys = [jax.random.fold_in(jax.random.key(0), count) for count in range(len(STEPS))]
        own = [jax.random.fold_in(key, zlib.crc32(path.encode())) for key in keys]
        return np.stack([jax.random.normal(key, shape) for key in own]).astype(np.float64)

    def direction(path, g, t):
        if kind(path) == "vector":
            return adam(path, g, t)
        if path not in ones:
            drawn = probes(path, g.shape)
            layers = range(len(g)) if path.startswith("blocks/") else [slice(None)]
            short = path.removeprefix("blocks/")
            each = [[matrix(short, one[n]) for one in drawn] for n in layers]
            ones[path] = [Psgd(path, one) for one in each]
        if not path.startswith("blocks/"):
            return ones[path][0](matrix(path, g), t).reshape(g.shape)
        pairs = zip(ones[path], g, strict=True)
        return np.stack(
            [one(matrix(path.removeprefix("blocks/"), x), t).reshape(x.shape) for one, x in pairs]
        )

    # Power iterations find the largest singular value to some percent, of a change of 5 %.
    compare(updates, numpy_updates(direction, parameters, gradients, 0.3, 40.0), rtol=1e-2)
