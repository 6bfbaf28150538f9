"""Follow the regularized leader as an optimizer, with |Delta|^2 / 2 as regularizer, in a ball if asked for.

Shalev-Shwartz 2012, Online Learning and Online Convex Optimization, section 2.2; losses discounted as in
Ahn, Zhang, Kook & Dai 2024, arXiv 2402.01567.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from trainit.optimizers.common import online
from trainit.optimizers.common._bounds import not_below_0

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config("ftrl", learning_rate=0.01)
    config.discount = 0.9  # discount of past losses; in (0, 1]
    config.radius = 0.0  # largest norm of the point, all parameters together; 0: any
    return config


def make(config, context):
    """Delta = argmin of rate * sum_s discount^(t-s) <g_s, Delta> + |Delta|^2 / 2 over |Delta| <= radius."""
    not_below_0(config, "radius")
    online.check_discount(config)

    def update(gradients, total, rate):
        total = jax.tree.map(lambda s, g: config.discount * s + g, total, gradients)
        return online.project(jax.tree.map(lambda s: -rate * s, total), config.radius), total

    learner = online.stateful(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return online.to_optimizer(learner, config, context)
