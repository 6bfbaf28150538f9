"""Polar descent: Adam on the direction of all parameters, and another on their length.

After weight normalization (Salimans & Kingma 2016, arXiv 1602.07868), with one length for all parameters
and the direction kept on the unit sphere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.parallel.trees import inner_product
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(beta1=0.9, beta2=0.999, eps=1e-8)
    config.learning_rate = field(1e-5, "peak of the schedule, for a direction of norm 1", at_least=0)
    config.weight_decay = field(0.0, "decoupled decay of the length, times its learning rate", at_least=0)
    config.radius_rate = field(1e2, "learning rate of the length, in units of the scheduled one", at_least=0)
    return config


class PolarState(NamedTuple):
    direction: optax.OptState
    radius: optax.OptState


def make(config, context) -> optax.GradientTransformation:
    """For x = r w with the unit vector w: w <- (w + dw) / |w + dw|, r <- r + dr.

    dw and dr are Adam's steps for the gradients r g and <g, w>.
    """
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)

    def init(params) -> PolarState:
        return PolarState(adam.init(params), adam.init(jnp.float32(0)))

    def update(gradients, state: PolarState, params, *, step, **extra_args):
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
