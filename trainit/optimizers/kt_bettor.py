"""The Krichevsky-Trofimov bettor of each coordinate as an optimizer, without a learning rate.

Orabona 2019, arXiv 1912.13213, algorithm 9.2; Orabona & Pal 2016, arXiv 1602.04128.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainit.config import ConfigDict, field
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1.0)
    config.eps = field(1e-3, "wealth of each coordinate at the beginning", above=0)
    config.lipschitz = field(0.1, "bound G of a gradient's entries; larger ones are clipped to it", above=0)
    return config


class BettorState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32: gradients seen
    total: dict  # of gradients, in units of G
    reward: dict  # won until now
    point: dict


def bettor(eps: float, lipschitz: float) -> online.Learner:
    """Delta = -S / (t + 1) * (eps + W), S the sum of t gradients over G, W what was won by bets on them."""

    def init(params) -> BettorState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return BettorState(jnp.int32(0), zeros, zeros, zeros)

    def update(gradients, state: BettorState, rate):
        # Clipped, or a bet could lose more than there is.
        g = jax.tree.map(lambda g: jnp.clip(g / lipschitz, -1, 1), gradients)
        count = state.count + 1
        total = jax.tree.map(jnp.add, state.total, g)
        reward = jax.tree.map(lambda w, g, d: w - g * d, state.reward, g, state.point)
        point = jax.tree.map(lambda s, w: -s / (count + 1) * (eps + w), total, reward)
        return point, BettorState(count, total, reward, point)

    return online.Learner(init, update)


def make(config, context):
    """The learning rate multiplies the point: 1 leaves it as it is."""
    return online.to_optimizer(bettor(config.eps, config.lipschitz), config, context, scaled=True)
