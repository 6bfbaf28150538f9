"""Online gradient descent (Zinkevich 2003) as an optimizer: a step of the step."""

import jax
import optax

from trainit.config import ConfigDict, field
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1e-3, radius=0.0)
    config.shrinkage = field(10.0, "share of the point that decays, times the learning rate", at_least=0)
    return config


def make(config, context):
    """Delta <- project(Delta - rate * (g + shrinkage * Delta)).

    With 1 - rate * shrinkage as momentum and no radius it is SGD with momentum.
    """

    def update(gradients, point, rate):
        point = jax.tree.map(lambda d, g: d - rate * (g + config.shrinkage * d), point, gradients)
        point = online.project(point, config.radius)
        return point, point

    return online.to_optimizer(online.Learner(optax.tree.zeros_like, update), config, context)
