"""RMSProp: Hinton 2012, Coursera lecture 6e; its mean square is debiased as Adam's unless switched off."""

import optax
from ml_collections import ConfigDict

from trainit.optimizers.common.moments import scale_by_moments


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "rmsprop"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.1  # of the kind that `decoupled` says; >= 0
    config.decoupled = True  # decay behind the direction instead of in the gradient
    config.beta2 = 0.99  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    config.debias_beta2 = True  # divide the mean square by 1 - beta2^t; off: as in the lecture
    return config


def make(config, context) -> optax.GradientTransformation:
    direction = scale_by_moments(
        beta2=config.beta2, eps=config.eps, debias_beta2=config.debias_beta2, use_momentum=False
    )
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")
