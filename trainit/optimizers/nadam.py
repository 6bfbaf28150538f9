"""NAdam, Adam in Nesterov's form: Dozat 2016, "Incorporating Nesterov Momentum into Adam"."""

import optax
from ml_collections import ConfigDict

from trainit.optimizers.common.moments import scale_by_moments


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "nadam"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.1  # of the kind that `decoupled` says; >= 0
    config.decoupled = True  # decay behind the direction instead of in the gradient
    config.beta1 = 0.9  # decay of the mean gradient; in [0, 1)
    config.beta2 = 0.999  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    return config


def make(config, context) -> optax.GradientTransformation:
    direction = scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=True)
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")
