"""Each optimizer against its paper's formula in NumPy's float64."""

import numpy as np
import pytest
from optimizer_cases import (
    build,
    by_path,
    compare,
    draw,
    draw_gradients,
    numpy_updates,
    parameter_shapes,
    run,
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


def numpy_momentum(momentum, nesterov):
    """Polyak 1964; with Nesterov as Sutskever et al. 2013 have it, the gradient behind the momentum step."""
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
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 11), draw_gradients(shapes)
    fields = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3, "nesterov": nesterov}
    updates = run(build("adamw", fields, weight_decay, clip_norm), parameters, gradients)
    compare(updates, numpy_updates(numpy_adam(**fields), parameters, gradients, weight_decay, clip_norm))


@pytest.mark.parametrize(
    "momentum, nesterov, weight_decay, clip_norm",
    [
        (0.7, False, 0.0, 0.0),
        (0.7, False, 0.3, 40.0),
        (0.7, True, 0.0, 40.0),
        (0.7, True, 0.3, 0.0),
        (0.0, False, 0.3, 40.0),
        (0.0, True, 0.0, 0.0),
    ],
)
def test_sgdm(momentum, nesterov, weight_decay, clip_norm):
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 12), draw_gradients(shapes)
    fields = {"momentum": momentum, "nesterov": nesterov}
    updates = run(build("sgdm", fields, weight_decay, clip_norm), parameters, gradients)
    direction = numpy_momentum(**fields)
    compare(updates, numpy_updates(direction, parameters, gradients, weight_decay, clip_norm))


def test_the_gradients_are_clipped_at_some_steps_only():
    norms = [
        np.sqrt(sum((g**2).sum() for g in by_path(tree).values()))
        for tree in draw_gradients(parameter_shapes())
    ]
    assert min(norms) < 0.5 * 40 and max(norms) > 2 * 40


@pytest.mark.parametrize("clip_norm", [0.0, 40.0])
def test_lion_of_optax_with_our_decay_and_rates(clip_norm):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2; its decay is its own, by our mask."""
    shapes = parameter_shapes()
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
        ("optax.trace", {"decay": 0.7}, numpy_momentum(0.7, False)),
    ],
)
def test_others_of_optax(name, fields, direction):
    shapes = parameter_shapes()
    parameters, gradients = draw(shapes, 14), draw_gradients(shapes)
    if name == "optax.trace":  # `decay` has no default: a config cannot give it
        with pytest.raises(ValueError, match=r"optimizer=optax.trace needs decay.*a file of your own"):
            build(name, fields)
        return
    updates = run(build(name, fields, 0.3, 40.0), parameters, gradients)
    compare(updates, numpy_updates(direction, parameters, gradients, 0.3, 40.0))
