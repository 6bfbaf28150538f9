"""Offset: to each change the mean of the changes so far is added, as in mango and the original's Muon."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers.common.optax_adapter import decay_updates

ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    base.offset = field(ConfigDict(), "settings of the offset")
    base.offset.beta = field(0.99, "decay of the mean", at_least=0, below=1)
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """o <- beta o + (1 - beta) u; the update is rate * (u + o), u being the other optimizer's at a rate of 1.

    So old rates are not in the mean. Decay is decoupled and spared from it.
    """
    base = make_base(replace(context, weight_decay=0.0, schedule=lambda step: jnp.float32(1.0)))
    decay = decay_updates(context)

    def init(params):
        return base.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params, *, step, **extra_args):
        state, mean = state
        change, state = base.update(gradients, state, params, step=step, **extra_args)
        mean = optax.tree.update_moment(change, mean, config.beta, 1)
        rate = context.schedule(step)
        updates = jax.tree.map(lambda u, o: rate * (u + o), change, mean)
        return decay.update(updates, (), params, step=step)[0], (state, mean)

    return optax.GradientTransformationExtraArgs(init, update)
