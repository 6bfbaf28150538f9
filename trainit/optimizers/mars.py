"""MARS: AdamW on a gradient of reduced variance. Yuan et al. 2024, arXiv 2411.10438, algorithm 2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=3e-3, weight_decay=0.01, beta1=0.95, beta2=0.99, eps=1e-8)
    config.gamma = field(0.025, "share of the gradient's change since the last step", at_least=0)
    config.exact = field(False, "take the change of this batch's gradient, at the cost of a second one")
    return config


def needs(config) -> set[str]:
    return {"gradient_at"} if config.exact else set()


class MarsState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    last: dict  # the parameters before the last update where exact, else the last gradient
    moments: optax.OptState


def make(config, context) -> optax.GradientTransformation:
    """c = g + gamma beta1 / (1 - beta1) (g - g_last), at most of norm 1, instead of the gradient.

    g_last is the last step's gradient, or exactly that of this batch at the last step's parameters.
    """
    moments = scale_by_moments(config.beta1, config.beta2, config.eps)
    factor = config.gamma * config.beta1 / (1 - config.beta1)

    def init(params) -> MarsState:
        last = params if config.exact else jax.tree.map(jnp.zeros_like, params)
        return MarsState(jnp.int32(0), last, moments.init(params))

    def update(gradients, state: MarsState, params, *, gradient_at=None, **extra_args):
        last = gradient_at(state.last) if config.exact else state.last
        weight = jnp.where(state.count > 0, factor, 0.0)
        corrected = jax.tree.map(lambda g, before: g + weight * (g - before), gradients, last)
        shrink = 1 / jnp.maximum(optax.tree.norm(corrected), 1.0)
        corrected = jax.tree.map(lambda c: shrink * c, corrected)
        direction, new = moments.update(corrected, state.moments)
        return direction, MarsState(state.count + 1, params if config.exact else gradients, new)

    return context.descend(optax.GradientTransformationExtraArgs(init, update))
