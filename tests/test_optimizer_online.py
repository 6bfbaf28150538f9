"""Online learners as optimizers, against NumPy's float64 on all parameters as one vector."""

import jax
import numpy as np
import pytest
import scipy.optimize
from optimizer_cases import (
    RATES,
    STEPS,
    build,
    by_path,
    compare,
    decay_mask,
    decays,
    draw,
    draw_gradients,
    flat,
    run,
    some_shapes,
    unflat,
)

from trainit.config import choose, defaults, resolve
from trainit.optimizers import choices
from trainit.transforms import online

pytestmark = pytest.mark.evidence(
    "online learners against their formulas, among them minima that are found numerically"
)

PLAIN = {"random_scaling": "none"}


def check(name: str, changes: dict, learner, scaled: bool = False, rtol: float = 1e-4, late: int = 0):
    """Clipping at 40, the learner's points (gradient, rate) -> point, and decay of 0.3.

    late: how many points are 0 at first, whatever the gradient.
    """
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 41), draw_gradients(shapes)
    got = run(build(name, PLAIN | changes, 0.3, 40.0), parameters, gradients)
    mask = decay_mask(parameters)
    x, expected = flat(parameters), []
    for step, gradient in zip(STEPS, map(flat, gradients), strict=True):
        rate = RATES[step]
        g = gradient * min(1.0, 40.0 / np.linalg.norm(gradient))
        point = learner(g, rate)
        assert np.any(point) == (len(expected) >= late)
        update = point * (rate if scaled else 1.0) - rate * 0.3 * mask * x
        expected.append(unflat(update, parameters))
        x = x + update
    for update in got[:late]:
        assert not any(value.any() for path, value in by_path(update).items() if not decays(path))
    compare(got[late:], expected[late:], rtol)


def into_ball(x: np.ndarray, radius: float) -> np.ndarray:
    return x * min(1.0, radius / np.linalg.norm(x)) if radius else x


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_ogd(radius):
    point = 0.0

    def learner(g, rate):
        nonlocal point
        point = into_ball((1 - 0.7 * rate) * point - rate * g, radius)
        return point

    check("ogd", {"shrinkage": 0.7, "radius": radius}, learner)


def test_ogd_with_mirror_descent():
    """The minimum of <g, x> + |x - old|^2 / (2 rate) + mu/2 |x|^2, discounted."""
    point = 0.0

    def learner(g, rate):
        nonlocal point
        point = 0.9 * (point / rate - g) / (1 / rate + 3.0)
        return point

    check("ogd_md", {"discount": 0.9, "mu": 3.0}, learner)


@pytest.mark.parametrize("radius", [0.0, 1.5])
def test_ftrl(radius):
    seen = []

    def learner(g, rate):
        seen.append(g)
        losses = sum(0.8**age * g for age, g in enumerate(reversed(seen)))
        return into_ball(-rate * losses, radius)

    check("ftrl", {"discount": 0.8, "radius": radius}, learner)


def test_adaptive_ftrl_is_the_leader_of_growing_losses():
    seen = []
    fields = {"beta1": 0.9, "beta2": 0.7, "eps": 0.3}

    def learner(g, rate):
        seen.append(g)
        total = sum(0.9**-age * g for age, g in enumerate(seen))
        squares = sum(0.7**-age * g**2 for age, g in enumerate(seen))
        return -rate * total / (0.3 + np.sqrt(squares))

    switches = dict.fromkeys(("scale_exponential", "scale_learning_rate", "scale_eps"), True)
    check("ada_ftrl", fields | switches, learner)


def test_adaptive_ftrl_is_adam():
    """Kingma & Ba's moments without debiasing, and an eps that fades."""
    m = v = t = 0

    def learner(g, rate):
        nonlocal m, v, t
        m, v = 0.8 * m + 0.2 * g, 0.97 * v + 0.03 * g**2
        t += 1
        return -rate * m / (0.3 * 0.97 ** ((t - 1) / 2) + np.sqrt(v))

    check("ada_ftrl", {"beta1": 0.8, "beta2": 0.97, "eps": 0.3}, learner)


class Bettor:
    """Wealth that grows by fractions bet on coins: Orabona & Pal 2016, algorithm 1."""

    def __init__(self, eps, lipschitz):
        self.wealth, self.coins, self.lipschitz = eps, [], lipschitz

    def __call__(self, g):
        coin = -np.clip(g / self.lipschitz, -1, 1)
        fraction = sum(self.coins) / (len(self.coins) + 1) if self.coins else 0.0
        self.wealth = self.wealth * (1 + fraction * coin)
        self.coins.append(coin)
        return sum(self.coins) / (len(self.coins) + 1) * self.wealth


def test_kt_bettor():
    bettor = Bettor(0.3, 0.5)
    check("kt_bettor", {"eps": 0.3, "lipschitz": 0.5}, lambda g, rate: bettor(g), scaled=True)


class MirrorDescent:
    """The minimum of the objective in the file's docstring, found numerically along its ray."""

    def __init__(self, eps, lipschitz, num_grids=1):
        self.eps, self.lipschitz = eps / num_grids, lipschitz
        self.etas = [1 / lipschitz / 2**i for i in range(num_grids)]
        self.squares, self.points = 4 * lipschitz**2, [0.0] * num_grids

    def alpha(self):
        return self.eps * self.lipschitz**2 / (self.squares * np.log(self.squares / self.lipschitz**2) ** 2)

    def minimum(self, eta, point, g, old, new):
        size = np.linalg.norm(point)
        slope = 2 / eta * np.log(1 + size / old) * point / size if size else 0.0 * g
        against = slope - g
        push, square = np.linalg.norm(against), (g**2).sum()
        if not push:
            return 0.0 * g

        def objective(x):
            """In lengths of alpha; the integral of 2/eta ln(1 + x) is elementary."""
            psi = 2 / eta * ((1 + x) * np.log1p(x) - x)
            return (psi - push * x + 2 * eta * square * x) * eta

        most = np.exp(eta * push) + 1
        found = scipy.optimize.minimize_scalar(objective, bounds=(0, most), options={"xatol": 1e-12})
        return new * found.x * against / push

    def __call__(self, g):
        g = into_ball(g, self.lipschitz) if np.ndim(g) else np.clip(g, -self.lipschitz, self.lipschitz)
        g = np.atleast_1d(g)
        old = self.alpha()
        self.squares += (g**2).sum()
        new = self.alpha()
        steps = zip(self.etas, self.points, strict=True)
        self.points = [self.minimum(eta, point, g, old, new) for eta, point in steps]
        return sum(self.points)


@pytest.mark.parametrize("num_grids", [1, 3])
def test_mirror_descent(num_grids):
    """With a bound far above all gradients, so that the wish to move is larger than what holds it."""
    descent = MirrorDescent(2.0, 400.0, num_grids)
    fields = {"eps": 2.0, "lipschitz": 400.0, "num_grids": num_grids}
    check("mirror_descent", fields, lambda g, rate: descent(g), scaled=True, rtol=1e-3)


@pytest.mark.parametrize("magnitude", ["kt_bettor", "mirror_descent"])
@pytest.mark.parametrize("beta", [0.8, 1.0])
def test_blackbox(magnitude, beta):
    """Cutkosky & Orabona 2018, algorithm 2, with lambda z w added to the gradients."""
    of_length = Bettor(0.3, 50.0) if magnitude == "kt_bettor" else MirrorDescent(0.3, 50.0)
    mean, w, z = 0.0, 0.0, 0.0

    def learner(g, rate):
        nonlocal mean, w, z
        along = np.sum(g * w) + 0.2 * z
        mean = mean + g + 0.2 * z * w if beta == 1 else beta * mean + (1 - beta) * (g + 0.2 * z * w)
        z = float(np.squeeze(of_length(along)))
        w = -mean / np.linalg.norm(mean)
        return z * w

    fields = {"magnitude": magnitude, "eps": 0.3, "lipschitz": 50.0, "discount": beta, "regularization": 0.2}
    check("blackbox", fields, learner, scaled=True, rtol=1e-3, late=1)


@pytest.mark.parametrize("per_layer", [False, True])
def test_normalized_blackbox(per_layer):
    shapes = some_shapes()
    like = by_path(draw(shapes, 0))
    parts, begin = [], 0
    for path, leaf in like.items():  # of the vector, those with a length of their own
        layers = leaf.shape[0] if path.startswith("blocks/") else 1
        parts += np.split(np.arange(begin, begin + leaf.size), layers)
        begin += leaf.size
    parts = parts if per_layer else [np.arange(begin)]
    bettors = [Bettor(0.3, 20.0) for _ in parts]
    totals, past, point = np.zeros(len(parts)), np.zeros(begin), np.zeros(begin)

    def sign(x):
        return -1.0 if x < 0 else 1.0

    def learner(g, rate):
        nonlocal past, point
        g = g + 0.2 * point
        direction, past = (past if past.any() else g), 0.8 * past + 0.2 * g
        point = np.zeros(begin)
        for i, part in enumerate(parts):
            along = g[part] @ direction[part] / np.linalg.norm(direction[part])
            s = sign(totals[i]) * along
            z = bettors[i](s)
            totals[i] += s
            point[part] = sign(totals[i]) * z * past[part] / np.linalg.norm(past[part])
        return point

    fields = {"eps": 0.3, "lipschitz": 20.0, "discount": 0.8, "regularization": 0.2, "per_layer": per_layer}
    check("normalized_blackbox", fields, learner, scaled=True, rtol=1e-3)


def test_imperfect_hints():
    seen, sigmas, trust, hint = [], [], 1.0, 0.0

    def learner(g, rate):
        nonlocal trust, hint
        along = np.sum(g * hint)
        sigmas.append(2.0 * abs(along) / np.sqrt(trust))
        trust += max(0.0, -along)
        seen.append(g)
        ages = range(len(seen))[::-1]
        total = sum(0.9**age * g for age, g in zip(ages, seen, strict=True))
        squares = sum(0.81**age * g @ g for age, g in zip(ages, seen, strict=True))
        curvature = sum(0.9**age * s for age, s in zip(ages, sigmas, strict=True))
        leader = into_ball(-total / (curvature + np.sqrt(squares)), 1.0)
        hint = g / np.linalg.norm(g)
        return leader - (1 - leader @ leader) / (2 * np.sqrt(trust)) * hint

    check("imperfect_hints", {"mu": 2.0, "discount": 0.9}, learner, scaled=True)


@pytest.mark.parametrize("scaling", ["exponential", "uniform"])
@pytest.mark.parametrize("weighs", [True, False])
def test_random_scaling(scaling, weighs):
    """All of a change is multiplied by one factor; with the uniform one, the next gradient by 2 less it."""
    shapes = some_shapes()
    gradients = draw_gradients(shapes)
    fields = {"random_scaling": scaling, "importance_sampling": weighs, "discount": 0.5, "mu": 0.0}
    got = run(build("ogd_md", fields), draw(shapes, 42), gradients)
    point, weight, factors = 0.0, 1.0, []
    for step, update, gradient in zip(STEPS, map(flat, got), map(flat, gradients), strict=True):
        point = 0.5 * (point - RATES[step] * weight * gradient)
        factors.append(update @ point / (point @ point))
        np.testing.assert_allclose(update, factors[-1] * point, rtol=1e-4, atol=1e-5 * abs(point).max())
        weight = 2 - factors[-1] if (scaling, weighs) == ("uniform", True) else 1.0
    assert len({round(factor, 4) for factor in factors}) == 4  # a step's, not an update's: 2 comes twice
    assert min(factors) > 0


@pytest.mark.parametrize(("scaling", "variance"), [("exponential", 1.0), ("uniform", 1 / 3)])
def test_factors_are_of_mean_one(scaling, variance):
    keys = jax.random.split(jax.random.key(3), 20_000)
    factors = np.asarray(jax.vmap(lambda key: online.draw(scaling, key))(keys))
    assert np.mean(factors) == pytest.approx(1, abs=0.03)
    assert np.var(factors) == pytest.approx(variance, abs=0.06)
    # With the weight w, E[w(s) f'(s)] = E[f(s)] - f(0): here for f(s) = s^2.
    weights = 2 - factors if scaling == "uniform" else 1.0
    assert np.mean(weights * 2 * factors) == pytest.approx(1 + variance, abs=0.08)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "ogd",
            {"random_scaling": "normal"},
            "random_scaling='normal' is none of 'none', 'exponential', 'uniform'",
        ),
        ("ogd", {"radius": -1.0}, "radius=-1.0 must not be below 0"),
        ("ogd_md", {"discount": 0.0}, r"discount=0.0 must lie in \(0, 1\]"),
        ("ada_ftrl", {"scale_exponential": True}, "grows without bound for beta2=0.999 above beta1.2=0.81"),
        ("kt_bettor", {"lipschitz": 0.0}, "lipschitz=0.0 must be above 0"),
        ("mirror_descent", {"num_grids": 0}, "num_grids=0 must be above 0"),
        ("blackbox", {"magnitude": "ogd"}, "magnitude='ogd' is none of 'kt_bettor', 'mirror_descent'"),
    ],
)
def test_what_they_refuse(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, changes)


@pytest.mark.parametrize("name", ["ogd_md", "ftrl", "imperfect_hints", "blackbox", "normalized_blackbox"])
def test_a_discount_of_1_is_a_config(name):
    """Unlike a beta, whose name alone keeps it below 1."""
    config = choose(defaults(), f"optimizer={name}", optimizer=choices())
    config.optimizer.discount = 1.0
    assert resolve(config, 257).optimizer.discount == 1.0
    build(name, {"discount": 1.0})
