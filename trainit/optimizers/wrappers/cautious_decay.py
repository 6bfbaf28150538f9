"""Cautious weight decay: a weight decays where its update goes towards 0, too. Chen et al. 2025.

arXiv 2510.12402.
"""

from dataclasses import replace

import jax
import optax

from trainit.config import ConfigDict

ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """x <- x - rate (u + weight_decay x) where u x >= 0, and x - rate u elsewhere. The rate is the run's."""
    base = make_base(replace(context, weight_decay=0.0))

    def update(gradients, state, params, *, step, **extra_args):
        updates, state = base.update(gradients, state, params, step=step, **extra_args)
        agreeing = jax.tree.map(lambda x, change: x * (change * x <= 0), params, updates)
        return context.decay_updates(updates, agreeing, step), state

    return optax.GradientTransformationExtraArgs(base.init, update)
