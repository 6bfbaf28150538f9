"""Discounted online mirror descent as an optimizer: Zhang & Cutkosky 2024, arXiv 2405.09742.

With discount=0.99 and mu=100 it is the unconstrained OGD of github.com/ZQZCalin/trainit, with discount=1
and mu=0 its OGD with mirror descent.
"""

import jax
import optax

from trainit.config import ConfigDict, field
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1e-3, discount=0.99)
    config.random_scaling = "exponential"
    config.mu = field(100.0, "strength of the regularizer mu/2 |Delta|^2", at_least=0)
    return config


def make(config, context):
    """Delta <- discount / (1 + rate * mu) * (Delta - rate * g)."""

    def update(gradients, point, rate):
        factor = config.discount / (1 + rate * config.mu)
        point = jax.tree.map(lambda d, g: factor * (d - rate * g), point, gradients)
        return point, point

    return online.to_optimizer(online.Learner(optax.tree.zeros_like, update), config, context)
