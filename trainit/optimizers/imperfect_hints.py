"""Online learning with imperfect hints as an optimizer: after Bhaskara, Cutkosky, Kumar & Purohit 2020.

arXiv 2002.04726. The hint of the next gradient is the direction of the last one. The hints come after the
leader in the unit ball, with the root of the sum of squares as its regularizer, and the past discounted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainit.config import ConfigDict, field
from trainit.parallel.trees import inner_product
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=0.1, discount=0.95)
    config.mu = field(1.0, "strength of the losses' curvature that hints bring", at_least=0)
    return config


class HintState(NamedTuple):
    trust: jax.Array  # float32: r^2, which bad hints make larger
    curvature: jax.Array  # float32: sum of sigma = mu |<g, h>| / r
    squares: jax.Array  # float32: sum of |g|^2
    total: dict  # sum of gradients
    hint: dict


def make(config, context):
    """Delta = rate * (y - (1 - |y|^2) / (2 r) h), with the leader y and the hint h.

    y is -sum(g) / (sum(sigma) + root of sum(|g|^2)), in the unit ball.
    """
    discount = config.discount

    def init(params) -> HintState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return HintState(jnp.float32(1), jnp.float32(0), jnp.float32(0), zeros, zeros)

    def update(gradients, state: HintState, rate):
        along = inner_product(gradients, state.hint)
        curvature = discount * state.curvature + config.mu * jnp.abs(along) / jnp.sqrt(state.trust)
        trust = state.trust + jnp.maximum(-along, 0.0)
        squares = discount**2 * state.squares + inner_product(gradients, gradients)
        total = jax.tree.map(lambda s, g: discount * s + g, state.total, gradients)
        weight = jnp.maximum(curvature + jnp.sqrt(squares), jnp.finfo(jnp.float32).tiny)
        leader = online.project(jax.tree.map(lambda s: -s / weight, total), 1.0)
        hint = online.unit(gradients)
        lean = (1 - inner_product(leader, leader)) / (2 * jnp.sqrt(trust))
        point = jax.tree.map(lambda y, h: y - lean * h, leader, hint)
        return point, HintState(trust, curvature, squares, total, hint)

    return online.to_optimizer(online.Learner(init, update), config, context, scaled=True)
