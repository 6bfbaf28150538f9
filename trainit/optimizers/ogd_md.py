"""Discounted online mirror descent as an optimizer: Zhang & Cutkosky 2024, arXiv 2405.09742.

With discount=0.99 and mu=100 it is the unconstrained OGD of github.com/ZQZCalin/trainit, with discount=1
and mu=0 its OGD with mirror descent.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from trainit.optimizers.common import online as _online
from trainit.optimizers.common._bounds import not_below_0

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = _online.get_config("ogd_md", learning_rate=1e-3)
    config.random_scaling = "exponential"
    config.discount = 0.99  # discount of the past; in (0, 1]
    config.mu = 100.0  # strength of the regularizer mu/2 |Delta|^2; >= 0
    return config


def make(config, context):
    """Delta <- discount / (1 + rate * mu) * (Delta - rate * g)."""
    not_below_0(config, "mu")
    _online.check_discount(config)

    def update(gradients, point, rate):
        factor = config.discount / (1 + rate * config.mu)
        point = jax.tree.map(lambda d, g: factor * (d - rate * g), point, gradients)
        return point, point

    learner = _online.stateful(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return _online.to_optimizer(learner, config, context)
