"""Online gradient descent (Zinkevich 2003) as an optimizer: a step of the step."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from trainit.optimizers.common import online
from trainit.optimizers.common._bounds import not_below_0

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config("ogd", learning_rate=1e-3)
    config.shrinkage = 10.0  # decay of the point: times the learning rate, so much of it is taken away; >= 0
    config.radius = 0.0  # largest norm of the point, all parameters together; 0: any
    return config


def make(config, context):
    """Delta <- project(Delta - rate * (g + shrinkage * Delta)).

    With 1 - rate * shrinkage as momentum and no radius it is SGD with momentum.
    """
    not_below_0(config, "shrinkage", "radius")

    def update(gradients, point, rate):
        point = jax.tree.map(lambda d, g: d - rate * (g + config.shrinkage * d), point, gradients)
        point = online.project(point, config.radius)
        return point, point

    learner = online.stateful(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return online.to_optimizer(learner, config, context)
