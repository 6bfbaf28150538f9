"""The cross-entropy's sums and gradient against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainit.losses import cross_entropy

B, L, V = 3, 7, 19


def numpy_sums(logits_BLV, targets_BL, mask_BL):
    """Sums and the gradient of "loss" with respect to the logits, position by position."""
    sums, gradient = {"loss": 0.0, "correct": 0, "count": 0}, np.zeros(logits_BLV.shape)
    for position in np.ndindex(*targets_BL.shape):
        if not mask_BL[position]:
            continue
        logits_V, target = np.asarray(logits_BLV[position], np.float64), targets_BL[position]
        log_total = logits_V.max() + np.log(np.exp(logits_V - logits_V.max()).sum())
        sums["loss"] += log_total - logits_V[target]
        sums["correct"] += int(np.argmax(logits_V) == target)
        sums["count"] += 1
        gradient[position] = np.exp(logits_V - log_total)
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
    check(jax.jit(cross_entropy)(logits_BLV, targets_BL, mask_BL), expected)
    gradient = jax.grad(lambda x: cross_entropy(x, targets_BL, mask_BL)["loss"])(jnp.asarray(logits_BLV))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask_BL], 0)


def test_nothing_that_counts():
    logits_BLV, targets_BL, _ = draw(2, scale=1e4)
    mask_BL = np.zeros((B, L), bool)
    check(cross_entropy(logits_BLV, targets_BL, mask_BL), {"loss": 0, "correct": 0, "count": 0})
    gradient = jax.grad(lambda x: cross_entropy(x, targets_BL, mask_BL)["loss"])(jnp.asarray(logits_BLV))
    np.testing.assert_array_equal(gradient, 0)


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
    parts = [cross_entropy(logits_BLV[i], targets_BL[i], mask_BL[i]) for i in range(B)]
    check(jax.tree.map(lambda *terms: sum(terms), *parts), whole)


def test_surely_right_and_surely_wrong():
    """The target's probability is 1, then about exp(-1e4)."""
    logits_BLV = np.zeros((1, 2, V), np.float32)
    logits_BLV[..., 4] = 1e4
    sums = cross_entropy(logits_BLV, np.array([[4, 3]]), np.ones((1, 2)))
    check(sums, {"loss": 1e4, "correct": 1, "count": 2})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    logits_BLV, targets_BL, mask_BL = draw(6)
    narrow_BLV = jnp.asarray(logits_BLV, dtype)
    targets_BL = np.where(mask_BL, np.asarray(narrow_BLV, np.float32).argmax(-1), targets_BL)
    targets_BL[1] = (targets_BL[1] + 1) % V  # else all would be right
    expected, expected_gradient = numpy_sums(np.asarray(narrow_BLV, np.float32), targets_BL, mask_BL)
    check(cross_entropy(narrow_BLV, targets_BL.astype(np.uint16), mask_BL), expected)
    gradient = jax.grad(lambda x: cross_entropy(x, targets_BL, mask_BL)["loss"])(narrow_BLV)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected_gradient, rtol=0.01, atol=1e-5)
