"""Optimizers that look at all parameters together, against NumPy's float64."""

import numpy as np
import pytest
from optimizer_cases import (
    RATES,
    STEPS,
    Adam,
    build,
    compare,
    decay_mask,
    draw,
    draw_gradients,
    flat,
    run,
    some_shapes,
    unflat,
)


def clipped(gradient: dict) -> np.ndarray:
    g = flat(gradient)
    return g * min(1.0, 40.0 / np.linalg.norm(g))


FIELDS = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-3}


def test_polar():
    parameters, gradients = draw(some_shapes(), 31), draw_gradients(some_shapes())
    got = run(build("polar", FIELDS | {"radius_rate": 3.0}, 0.3, 40.0), parameters, gradients)
    x, expected = flat(parameters), []
    turn, grow = Adam(**FIELDS), Adam(**FIELDS)
    for step, g in zip(STEPS, map(clipped, gradients), strict=True):
        r = np.linalg.norm(x)
        w = x / r
        moved = w - RATES[step] * turn(r * g)
        new_r = r - RATES[step] * 3.0 * (grow(g @ w) + 0.3 * r)
        new = new_r * moved / np.linalg.norm(moved)
        expected.append(unflat(new - x, parameters))
        x = new
    compare(got, expected, rtol=1e-4)


def test_jump():
    """Two normal steps, two jumps, and a normal step that starts afresh."""
    parameters, gradients = draw(some_shapes(), 32), draw_gradients(some_shapes())
    fields = FIELDS | {"normal_steps": 2, "jump_steps": 2, "jump_rate": 3.0}
    got = run(build("jump", fields, 0.3, 40.0), parameters, gradients)
    mask = decay_mask(parameters)
    x, expected = flat(parameters), []
    for number, (step, g) in enumerate(zip(STEPS, map(clipped, gradients), strict=True)):
        if number in (0, 4):
            normal = Adam(**FIELDS)
        if number == 2:
            jump = Adam(**FIELDS)
        unit = x / np.linalg.norm(x)
        direction = 3.0 * jump(g @ unit) * unit if number in (2, 3) else normal(g) + 0.3 * mask * x
        expected.append(unflat(-RATES[step] * direction, parameters))
        x = x - RATES[step] * direction
    compare(got, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("polar", {"radius_rate": -1.0}, r"optimizer.radius_rate=-1.0 must not be below 0"),
        ("jump", {"normal_steps": 0}, r"optimizer.normal_steps=0 must be above 0"),
        ("jump", {"jump_steps": 0}, r"optimizer.jump_steps=0 must be above 0"),
        ("jump", {"jump_rate": -1.0}, r"optimizer.jump_rate=-1.0 must not be below 0"),
    ],
)
def test_what_they_refuse(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, changes)
