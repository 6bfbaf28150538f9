"""Online gradient descent (Zinkevich 2003) as an optimizer: a step of the step."""

import jax
import jax.numpy as jnp

from trainit.config import ConfigDict, field
from trainit.optimizers.common import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1e-3)
    config.shrinkage = field(
        10.0, "decay of the point; each step takes away this share of it, times the learning rate", at_least=0
    )
    config.radius = field(0.0, "maximum of the point's norm over all parameters; 0: no maximum", at_least=0)
    return config


def make(config, context):
    """Delta <- project(Delta - rate * (g + shrinkage * Delta)).

    With 1 - rate * shrinkage as momentum and no radius it is SGD with momentum.
    """

    def update(gradients, point, rate):
        point = jax.tree.map(lambda d, g: d - rate * (g + config.shrinkage * d), point, gradients)
        point = online.project(point, config.radius)
        return point, point

    learner = online.stateful(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    return online.to_optimizer(learner, config, context)
