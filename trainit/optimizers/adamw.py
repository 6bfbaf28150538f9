"""AdamW: Loshchilov & Hutter 2017, arXiv 1711.05101; Nesterov's form after Dozat 2016."""

import optax

from trainit.config import ConfigDict, field
from trainit.optimizers.common.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = field(1e-3, "peak of the schedule", at_least=0)
    config.weight_decay = field(0.1, "decoupled weight decay, times the learning rate", at_least=0)
    config.beta1 = field(0.9, "decay of the mean gradient", at_least=0, below=1)
    config.beta2 = field(0.999, "decay of the mean squared gradient", at_least=0, below=1)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    config.nesterov = field(False, "the mean gradient looks one step ahead")
    return config


def make(config, context) -> optax.GradientTransformation:
    return context.descend(scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=config.nesterov))
