"""Offset: to each change the mean of the changes so far is added, as in mango and the original's Muon."""

from dataclasses import replace

import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.moments import add_mean

ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    base.offset = field(ConfigDict(), "settings of the offset")
    base.offset.beta = field(0.99, "decay of the mean", at_least=0, below=1)
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """o <- beta o + (1 - beta) u; the update is rate * (u + o), u being the other optimizer's at a rate of 1.

    So old rates are not in the mean. Decay is decoupled and spared from it.
    """
    unscaled = replace(context, weight_decay=0.0, schedule=lambda step: jnp.float32(1.0))
    changes = optax.chain(make_base(unscaled), add_mean(config.beta))

    def update(gradients, state, params, *, step, **extra_args):
        updates, state = changes.update(gradients, state, params, step=step, **extra_args)
        updates = optax.tree.scale(context.schedule(step), updates)
        return context.decay_updates(updates, params, step), state

    return optax.GradientTransformationExtraArgs(changes.init, update)
