"""SGD with heavy-ball momentum (Polyak 1964), or in Nesterov's form (Sutskever et al. 2013)."""

import optax
from ml_collections import ConfigDict

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "sgdm"
    config.learning_rate = 0.1  # peak of the schedule; >= 0
    config.weight_decay = 0.0  # of the kind that `decoupled` says; >= 0
    config.decoupled = True  # decay behind the direction instead of in the gradient
    config.momentum = 0.9  # m <- momentum * m + g; in [0, 1), 0: plain gradient descent
    config.nesterov = False  # direction momentum * m + g instead of m
    return config


def make(config, context) -> optax.GradientTransformation:
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    return context.descend(momentum, "decoupled" if config.decoupled else "coupled")
