"""Measures matrix products: how many operations a second, by shape, form and types."""

from statistics import median

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trainit.tools.timing import in_turn

# How the product of x (rows, inner) and a kernel k (inner, columns), and its gradients by both from dy (rows,
# columns), are written: factors, the axis of each that is summed over, whether the result is transposed.
FORMS: dict[str, tuple[str, str, int, int, bool]] = {
    "x k": ("x", "k", 1, 0, False),
    "dy kᵀ": ("dy", "k", 1, 1, False),
    "xᵀ dy": ("x", "dy", 0, 0, False),
    "(dyᵀ x)ᵀ": ("dy", "x", 0, 0, True),
}
WORK = {"cpu": 2e10, "gpu": 2e13}  # operations between two looks at the clock: some 50 ms


def rate(sizes: tuple[int, int, int], form: str, dtype: DTypeLike, result: DTypeLike, rounds: int) -> float:
    """Returns the operations a second of a product of factors of one type, with a result of another.

    Sizes are rows, inner, columns. It is repeated in a loop, so that its start does not count, and the loop
    in `rounds`, whose median counts.
    """
    rows, inner, columns = sizes
    shapes = {"x": (rows, inner), "k": (inner, columns), "dy": (rows, columns)}
    left, right, left_axis, right_axis, transposed = FORMS[form]
    operations = 2 * rows * inner * columns
    count = max(1, round(WORK.get(jax.devices()[0].platform, WORK["gpu"]) / operations))

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = ((left_axis,), (right_axis,)), ((), ())
        y = jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.dtype(result))
        return y.T if transposed else y

    @jax.jit
    def repeat(a: jax.Array, b: jax.Array) -> jax.Array:
        # Each product needs the one before: XLA keeps 0 * y, since y may be NaN.
        def again(_: int, carry: tuple) -> tuple:
            factor, last = carry
            factor = factor.at[0, 0].add((0 * last[0, 0]).astype(factor.dtype))
            return factor, multiply(factor, b)

        first = jnp.zeros_like(jax.eval_shape(multiply, a, b))
        return jax.lax.fori_loop(0, count, again, (a, first))[1]

    draw = jax.random.split(jax.random.key(0))
    a, b = (
        jax.random.normal(key, shapes[name], dtype) for key, name in zip(draw, (left, right), strict=True)
    )
    [times] = in_turn([lambda: repeat(a, b)], rounds)
    return count * operations / median(times)
