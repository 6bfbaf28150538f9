"""Adam with a switch for each of its parts, and two of its relatives: `adam`, `nadam`, `rmsprop`.

Kingma & Ba 2014, arXiv 1412.6980; NAdam: Dozat 2016, "Incorporating Nesterov Momentum into Adam"; RMSProp:
Hinton 2012, Coursera lecture 6e.
"""

import optax
from ml_collections import ConfigDict

from trainit.optimizers.common.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "adam"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.0  # of the kind that `decoupled` says; >= 0
    config.decoupled = False  # decay behind the direction (AdamW) instead of in the gradient
    config.beta1 = 0.9  # decay of the mean gradient; in [0, 1)
    config.beta2 = 0.999  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    config.nesterov = False  # the mean gradient looks one step ahead
    config.debias_beta1 = True  # divide the mean gradient by 1 - beta1^t
    config.debias_beta2 = True  # divide the mean square by 1 - beta2^t
    config.use_momentum = True  # off: the gradient itself instead of its mean
    config.use_preconditioner = True  # off: no division by the root of the mean square
    return config


def make(config, context) -> optax.GradientTransformation:
    direction = scale_by_moments(
        config.beta1,
        config.beta2,
        config.eps,
        nesterov=config.nesterov,
        debias_beta1=config.debias_beta1,
        debias_beta2=config.debias_beta2,
        use_momentum=config.use_momentum,
        use_preconditioner=config.use_preconditioner,
    )
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")


def get_nadam_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "nadam"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.1  # of the kind that `decoupled` says; >= 0
    config.decoupled = True  # decay behind the direction instead of in the gradient
    config.beta1 = 0.9  # decay of the mean gradient; in [0, 1)
    config.beta2 = 0.999  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    return config


def make_nadam(config, context) -> optax.GradientTransformation:
    direction = scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=True)
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")


def get_rmsprop_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "rmsprop"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.1  # of the kind that `decoupled` says; >= 0
    config.decoupled = True  # decay behind the direction instead of in the gradient
    config.beta2 = 0.99  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    config.debias_beta2 = True  # divide the mean square by 1 - beta2^t; off: as in the lecture
    return config


def make_rmsprop(config, context) -> optax.GradientTransformation:
    direction = scale_by_moments(
        beta2=config.beta2, eps=config.eps, debias_beta2=config.debias_beta2, use_momentum=False
    )
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")
