"""A learner made of one for the length and one for the direction: Cutkosky & Orabona 2018, arXiv 1802.06293.

Algorithm 2 there. The length has no learning rate; the direction follows the leader in the unit ball.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers import kt_bettor, mirror_descent
from trainit.parallel.trees import inner_product
from trainit.transforms import online

MAGNITUDES = {"kt_bettor": kt_bettor.bettor, "mirror_descent": mirror_descent.learner}

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1.0, lipschitz=10.0, discount=0.9, regularization=0.0)
    config.magnitude = field("kt_bettor", "learner of the length", one_of=tuple(MAGNITUDES))
    config.eps = field(1.0, "the learner's wealth or scale before the first gradient", above=0)
    return config


class BlackboxState(NamedTuple):
    magnitude: optax.OptState
    length: jax.Array  # float32: the magnitude's point
    leader: dict  # minus the mean gradient, or the sum


def make(config, context):
    """Delta = z w: w the unit vector of the leader, z of the magnitude's learner for gradients <g, w>."""
    magnitude = MAGNITUDES[config.magnitude](config.eps, config.lipschitz)
    keep, add = online.mean_weights(config)

    def init(params) -> BlackboxState:
        return BlackboxState(magnitude.init(jnp.float32(0)), jnp.float32(0), optax.tree.zeros_like(params))

    def update(gradients, state: BlackboxState, rate):
        w, z = online.unit(state.leader), state.length
        pull = config.regularization * z
        along = inner_product(gradients, w) + pull
        length, of_magnitude = magnitude.update(along, state.magnitude, rate)
        leader = jax.tree.map(lambda m, g, w: keep * m - add * (g + pull * w), state.leader, gradients, w)
        point = jax.tree.map(lambda u: length * u, online.unit(leader))
        return point, BlackboxState(of_magnitude, length, leader)

    return online.to_optimizer(online.Learner(init, update), config, context, scaled=True)
