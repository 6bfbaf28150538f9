"""Polar descent: Adam on the direction of all parameters, and another on their length.

After weight normalization (Salimans & Kingma 2016, arXiv 1602.07868), with one length for all parameters
and the direction kept on the unit sphere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trainit.optimizers.common._bounds import not_below_0
from trainit.optimizers.common.moments import scale_by_moments
from trainit.parallel.trees import inner_product

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "polar"
    config.learning_rate = 1e-5  # of the direction, whose entries are those of a unit vector; >= 0
    config.radius_rate = 1e2  # learning rate of the length in units of the scheduled one; >= 0
    config.weight_decay = 0.0  # of the length, decoupled, times its learning rate; >= 0
    config.beta1 = 0.9  # decay of the mean gradients; in [0, 1)
    config.beta2 = 0.999  # decay of the mean squared gradients; in [0, 1)
    config.eps = 1e-8  # added to the roots of the mean squares; > 0
    return config


class PolarState(NamedTuple):
    direction: optax.OptState
    radius: optax.OptState


def make(config, context) -> optax.GradientTransformation:
    """For x = r w with the unit vector w: w <- (w + dw) / |w + dw|, r <- r + dr.

    dw and dr are Adam's steps for the gradients r g and <g, w>.
    """
    not_below_0(config, "radius_rate")
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)

    def init(params) -> PolarState:
        return PolarState(adam.init(params), adam.init(jnp.float32(0)))

    def update(gradients, state: PolarState, params, *, step, **extra_args):
        del extra_args
        rate = context.schedule(step)
        radius = jnp.maximum(optax.tree.norm(params), jnp.finfo(jnp.float32).tiny)
        w = jax.tree.map(lambda x: x / radius, params)
        along = inner_product(gradients, w)
        turn, direction = adam.update(jax.tree.map(lambda g: radius * g, gradients), state.direction)
        turn = jax.tree.map(lambda d: -rate * d, turn)
        grow, length = adam.update(along, state.radius)
        new_radius = radius - rate * config.radius_rate * (grow + context.weight_decay * radius)
        # |w + turn|, written so that without a turn it is 1 exactly, and nothing moves.
        stretch = jnp.sqrt(1 + 2 * inner_product(w, turn) + inner_product(turn, turn))
        factor = new_radius / stretch
        updates = jax.tree.map(lambda x, d: (factor / radius - 1) * x + factor * d, params, turn)
        return updates, PolarState(direction, length)

    return optax.chain(context.clip(), optax.GradientTransformationExtraArgs(init, update))
