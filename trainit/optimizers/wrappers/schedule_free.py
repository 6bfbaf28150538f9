"""Schedule-Free: an average of the iterates instead of a schedule. Defazio et al. 2024, arXiv 2405.15682."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field

MOMENTA = ("beta1", "b1", "momentum")  # which the average replaces
ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    for momentum in MOMENTA:
        if momentum in base:
            base[momentum] = 0.0
    base.schedule_free = field(ConfigDict(), "settings of Schedule-Free")
    base.schedule_free.beta = field(0.9, "average's share where gradients are taken", at_least=0, below=1)
    return base


class ScheduleFreeState(NamedTuple):
    """The parameters that the model has, and is validated at, are the average x."""

    base: optax.OptState
    ahead: dict  # z - x, z being what the other optimizer moves
    weight: jax.Array  # sum of squared rates
    beta: jax.Array

    def training_point(self, x: dict) -> dict:
        """y = (1 - beta) z + beta x, where gradients are taken; parameters of other groups as they are."""
        return jax.tree.map(
            lambda x, d: x if isinstance(d, optax.MaskedNode) else x + (1 - self.beta) * d, x, self.ahead
        )


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """z <- z + what the other optimizer does at y; x <- (1 - c) x + c z, c being rate^2 over their sum."""
    base = make_base(context)

    def init(params) -> ScheduleFreeState:
        ahead = optax.tree.zeros_like(params)
        return ScheduleFreeState(base.init(params), ahead, jnp.float32(0), jnp.float32(config.beta))

    def update(gradients, state: ScheduleFreeState, params, *, step, **extra_args):
        y = state.training_point(params)
        change, base_state = base.update(gradients, state.base, y, step=step, **extra_args)
        ahead = jax.tree.map(jnp.add, state.ahead, change)
        square = jnp.square(jnp.float32(context.schedule(step)))
        weight = state.weight + square
        c = square / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)  # 0 while a warm-up is at 0
        updates = jax.tree.map(lambda d: c * d, ahead)
        ahead = jax.tree.map(lambda d: (1 - c) * d, ahead)
        return updates, ScheduleFreeState(base_state, ahead, weight, state.beta)

    return optax.GradientTransformationExtraArgs(init, update)
