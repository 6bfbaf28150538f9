"""Each optimizer against its paper's formula in NumPy's float64."""

import numpy as np
import pytest
from optimizer_cases import (
    RATES,
    STEPS,
    build,
    by_path,
    compare,
    draw,
    draw_gradients,
    numpy_updates,
    run,
    some_shapes,
)


def numpy_adam(beta1, beta2, eps, nesterov):
    """Kingma & Ba 2014, algorithm 1; with Nesterov the numerator looks one step ahead (Dozat 2016)."""
    m, v = {}, {}

    def direction(path, g, t):
        m[path] = beta1 * m.get(path, 0.0) + (1 - beta1) * g
        v[path] = beta2 * v.get(path, 0.0) + (1 - beta2) * g**2
        mean = m[path] / (1 - beta1**t)
        if nesterov:
            mean = beta1 * m[path] / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        return mean / (np.sqrt(v[path] / (1 - beta2**t)) + eps)

    return direction


def numpy_moments(beta1, beta2, eps, nesterov, debias_beta1, debias_beta2, use_momentum, use_preconditioner):
    """Adam with parts left out, from its definition: weighted sums over all past gradients."""
    past = {}

    def direction(path, g, t):
        past.setdefault(path, []).append(g)
        ages = np.arange(t)[::-1].reshape(-1, *[1] * g.ndim)
        gradients = np.stack(past[path])
        m = (1 - beta1) * (beta1**ages * gradients).sum(0)
        v = (1 - beta2) * (beta2**ages * gradients**2).sum(0)
        if nesterov:
            m_part, g_part = beta1 * m, (1 - beta1) * g
            if debias_beta1:
                m_part, g_part = m_part / (1 - beta1 ** (t + 1)), g_part / (1 - beta1**t)
            m = m_part + g_part
        elif debias_beta1:
            m = m / (1 - beta1**t)
        if debias_beta2:
            v = v / (1 - beta2**t)
        return (m if use_momentum else g) / (np.sqrt(v) + eps if use_preconditioner else 1.0)

    return direction


def numpy_momentum(momentum, nesterov):
    """Polyak 1964; with Nesterov as Sutskever et al. 2013 have it, the gradient after the momentum step."""
    m = {}

    def direction(path, g, t):
        m[path] = momentum * m.get(path, 0.0) + g
        return momentum * m[path] + g if nesterov else m[path]

    return direction


@pytest.mark.parametrize(
    "nesterov, weight_decay, clip_norm",
    [(False, 0.0, 0.0), (False, 0.3, 40.0), (True, 0.0, 40.0), (True, 0.3, 0.0)],
)
def test_adamw(nesterov, weight_decay, clip_norm):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 11), draw_gradients(shapes)
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3, "nesterov": nesterov}
    updates = run(build("adamw", fields, weight_decay, clip_norm), parameters, gradients)
    compare(updates, numpy_updates(numpy_adam(**fields), parameters, gradients, weight_decay, clip_norm))


SWITCHES = ("nesterov", "debias_beta1", "debias_beta2", "use_momentum", "use_preconditioner")


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    "switches",
    [
        (0, 1, 1, 1, 1),
        (1, 1, 1, 1, 1),
        (0, 0, 1, 1, 1),
        (1, 0, 1, 1, 1),
        (0, 1, 0, 1, 1),
        (0, 1, 1, 0, 1),
        (0, 1, 1, 1, 0),
        (1, 0, 0, 1, 0),
    ],
)
def test_adam_with_each_switch(switches, decoupled):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 15), draw_gradients(shapes)
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3} | dict(
        zip(SWITCHES, map(bool, switches), strict=True)
    )
    updates = run(build("adam", fields | {"decoupled": decoupled}, 0.3, 40.0), parameters, gradients)
    direction = numpy_moments(**fields)
    expected = numpy_updates(direction, parameters, gradients, 0.3, 40.0, not decoupled)
    compare(updates, expected, rtol=1e-5 if decoupled else 1e-3)  # coupled, g + decay may cancel


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    ("name", "fields", "direction"),
    [
        ("nadam", {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3}, lambda: numpy_adam(0.8, 0.97, 1e-3, True)),
        ("rmsprop", {"beta2": 0.9, "eps": 1e-3}, lambda: numpy_adam(0.0, 0.9, 1e-3, False)),
    ],
)
def test_nadam_and_rmsprop(name, fields, direction, decoupled):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 16), draw_gradients(shapes)
    updates = run(build(name, fields | {"decoupled": decoupled}, 0.3, 40.0), parameters, gradients)
    expected = numpy_updates(direction(), parameters, gradients, 0.3, 40.0, not decoupled)
    compare(updates, expected, rtol=1e-5 if decoupled else 1e-3)  # coupled, g + decay may cancel


def test_rmsprop_as_in_the_lecture():
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 17), draw_gradients(shapes)
    updates = run(build("rmsprop", {"beta2": 0.9, "eps": 1e-3, "debias_beta2": False}), parameters, gradients)
    v = {}

    def direction(path, g, t):
        v[path] = 0.9 * v.get(path, 0.0) + 0.1 * g**2
        return g / (np.sqrt(v[path]) + 1e-3)

    compare(updates, numpy_updates(direction, parameters, gradients))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("normalize", ["layer", "global", "none"])
def test_normalized_sgdm(normalize, nesterov):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 18), draw_gradients(shapes)
    fields = {"momentum": 0.7, "nesterov": nesterov, "normalize": normalize, "eps": 1e-2}
    updates = run(build("normalized_sgdm", fields, 0.3, 40.0), parameters, gradients)
    plain = numpy_momentum(0.7, nesterov)

    def direction(path, g, t):
        u = plain(path, g, t)
        if normalize == "layer":
            axes = tuple(range(1, u.ndim)) if path.startswith("blocks/") else None
            u = u / (np.sqrt((u**2).sum(axes, keepdims=True)) + 1e-2)
        return u

    if normalize == "global":
        clipped = numpy_updates(lambda path, g, t: g, parameters, gradients, 0.0, 40.0)
        norms, momenta = [], numpy_momentum(0.7, nesterov)
        for t, (step, update) in enumerate(zip(STEPS, clipped, strict=True), start=1):
            tree = [momenta(path, -u / RATES[step], t) for path, u in update.items()]
            norms.append(np.sqrt(sum((u**2).sum() for u in tree)))
        expected = numpy_updates(
            lambda path, g, t: plain(path, g, t) / (norms[t - 1] + 1e-2), parameters, gradients, 0.3, 40.0
        )
    else:
        expected = numpy_updates(direction, parameters, gradients, 0.3, 40.0)
    compare(updates, expected)


def test_normalized_sgdm_refuses_another_norm():
    with pytest.raises(ValueError, match=r"optimizer.normalize='layers' is none of 'layer', 'global'"):
        build("normalized_sgdm", {"normalize": "layers"})


def test_adam_is_optax_adam():
    """An independent implementation: optax's."""
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 19), draw_gradients(shapes)
    for nesterov in (False, True):
        ours = run(build("adam", {"nesterov": nesterov}), parameters, gradients)
        theirs = run(build("optax.scale_by_adam", {"nesterov": nesterov}), parameters, gradients)
        compare(ours, [by_path(update) for update in theirs])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(
    "momentum, nesterov, weight_decay, clip_norm",
    [
        (0.7, False, 0.3, 40.0),
        (0.7, True, 0.3, 0.0),
        (0.0, True, 0.3, 40.0),
    ],
)
def test_sgdm(momentum, nesterov, weight_decay, clip_norm, decoupled):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 12), draw_gradients(shapes)
    fields = {"momentum": momentum, "nesterov": nesterov}
    optimizer = build("sgdm", fields | {"decoupled": decoupled}, weight_decay, clip_norm)
    updates = run(optimizer, parameters, gradients)
    direction = numpy_momentum(**fields)
    expected = numpy_updates(direction, parameters, gradients, weight_decay, clip_norm, not decoupled)
    compare(updates, expected)


def test_the_gradients_are_clipped_at_some_steps_only():
    norms = [
        np.sqrt(sum((g**2).sum() for g in by_path(tree).values())) for tree in draw_gradients(some_shapes())
    ]
    assert min(norms) < 0.5 * 40 and max(norms) > 2 * 40


@pytest.mark.parametrize("clip_norm", [0.0, 40.0])
def test_lion_of_optax_with_our_decay_and_rates(clip_norm):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2; its decay is its own, by our mask."""
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 13), draw_gradients(shapes)
    updates = run(build("optax.lion", {"b1": 0.8, "b2": 0.95}, 0.3, clip_norm), parameters, gradients)
    m = {}

    def direction(path, g, t):
        sign = np.sign(0.8 * m.get(path, 0.0) + 0.2 * g)
        m[path] = 0.95 * m.get(path, 0.0) + 0.05 * g
        return sign

    compare(updates, numpy_updates(direction, parameters, gradients, 0.3, clip_norm))


@pytest.mark.parametrize(
    ("name", "fields", "direction"),
    [
        # Without decay of its own; and without a rate: a direction.
        ("optax.nadam", {"b1": 0.8, "b2": 0.97, "eps": 1e-3}, numpy_adam(0.8, 0.97, 1e-3, True)),
        ("optax.scale_by_adam", {"b1": 0.8, "b2": 0.97, "eps": 1e-3}, numpy_adam(0.8, 0.97, 1e-3, False)),
    ],
)
def test_others_of_optax(name, fields, direction):
    shapes = some_shapes()
    parameters, gradients = draw(shapes, 14), draw_gradients(shapes)
    updates = run(build(name, fields, 0.3, 40.0), parameters, gradients)
    compare(updates, numpy_updates(direction, parameters, gradients, 0.3, 40.0))
