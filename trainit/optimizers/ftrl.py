"""Follow the regularized leader as an optimizer, with |Delta|^2 / 2 as regularizer, in a ball if asked for.

Shalev-Shwartz 2012, Online Learning and Online Convex Optimization, section 2.2; losses discounted as in
Ahn, Zhang, Kook & Dai 2024, arXiv 2402.01567.
"""

import jax
import jax.numpy as jnp

from trainit.config import ConfigDict, field
from trainit.optimizers.common import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=0.01)
    config.discount = field(0.9, "factor by which past losses count less with each step", above=0, at_most=1)
    config.radius = field(0.0, "maximum of the point's norm over all parameters; 0: no maximum", at_least=0)
    return config


def make(config, context):
    """Delta = argmin of rate * sum_s discount^(t-s) <g_s, Delta> + |Delta|^2 / 2 over |Delta| <= radius."""

    def update(gradients, total, rate):
        total = jax.tree.map(lambda s, g: config.discount * s + g, total, gradients)
        return online.project(jax.tree.map(lambda s: -rate * s, total), config.radius), total

    learner = online.stateful(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return online.to_optimizer(learner, config, context)
