"""AdamW: Loshchilov & Hutter 2017, arXiv 1711.05101; Nesterov's form after Dozat 2016."""

import optax
from ml_collections import ConfigDict

from trainit.optimizers.common.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "adamw"
    config.learning_rate = 1e-3  # peak of the schedule; >= 0
    config.weight_decay = 0.1  # decoupled, times the learning rate; >= 0
    config.beta1 = 0.9  # decay of the mean gradient; in [0, 1)
    config.beta2 = 0.999  # decay of the mean squared gradient; in [0, 1)
    config.eps = 1e-8  # added to the root of the mean square; > 0
    config.nesterov = False  # the mean gradient looks one step ahead
    return config


def make(config, context) -> optax.GradientTransformation:
    return context.descend(scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=config.nesterov))
