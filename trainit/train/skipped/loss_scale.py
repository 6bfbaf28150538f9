"""Dynamic loss scaling for float16: Micikevicius et al. 2017, arXiv 1710.03740, section 3.2.

The gradient is taken of the scale times the sum of the sequences' mean losses, so that gradients of
activations lie in float16's range (6e-8 to 65504); gradients of parameters are divided by it in float32. The
sum is over sequences rather than a mean over the batch, so that a scale that fits does so on any mesh. A step
in which something is not finite is skipped and halves the scale; many good ones in a row double it.
"""

import jax
import jax.numpy as jnp

START = 2.0**15
FLOOR, CEILING = 1.0, 2.0**24
GROWTH_STEPS = 2000  # good steps in a row that double it


def init(is_scaled: bool) -> dict[str, jax.Array]:
    """What a float16 run keeps: the scale, and the good steps since it last changed; empty otherwise."""
    return {"scale": jnp.float32(START), "good_steps": jnp.int32(0)} if is_scaled else {}


def after(state: dict[str, jax.Array], good: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """What is kept after a step in which everything was finite or not, and whether it lowered the scale."""
    if not state:
        return state, jnp.bool(False)
    scale, count = state["scale"], state["good_steps"] + 1
    grows = count == GROWTH_STEPS
    raised = jnp.where(grows, jnp.minimum(2 * scale, CEILING), scale)
    new = jnp.where(good, raised, jnp.maximum(scale / 2, FLOOR))
    return {"scale": new, "good_steps": jnp.where(good & ~grows, count, 0)}, ~good & (scale > FLOOR)


def stays_finite(new, old) -> jax.Array:
    """Whether every number that is finite in `old` is still finite in `new`, a tree of the same structure.

    An optimizer that takes further gradients may hide in its state that one of them was too large.
    """
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o)) for n, o in pairs]))
