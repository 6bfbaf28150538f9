"""Cautious: an update keeps what the gradient agrees with. Liang et al. 2024, arXiv 2411.16085."""

from dataclasses import replace

import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.moments import map_layers

ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    base.cautious = field(ConfigDict(), "settings of Cautious")
    base.cautious.eps = field(1.0, "added to the number of entries that stay, in their factor", above=0)
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """Of each array of each layer, the entries that go along the gradient become 0.

    The others grow by size / (their number + eps). Decay is decoupled and spared from that.
    """
    base = make_base(replace(context, weight_decay=0.0))

    def keep(path, update, gradient):
        agrees = (update * gradient < 0).astype(update.dtype)
        return update * agrees * (agrees.size / (jnp.sum(agrees) + config.eps))

    def update(gradients, state, params, *, step, **extra_args):
        updates, state = base.update(gradients, state, params, step=step, **extra_args)
        return context.decay_updates(map_layers(keep, updates, gradients), params, step), state

    return optax.GradientTransformationExtraArgs(base.init, update)
