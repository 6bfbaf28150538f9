"""Adam with a switch for each of its parts, and two of its relatives: `adam`, `nadam`, `rmsprop`.

Kingma & Ba 2014, arXiv 1412.6980; NAdam: Dozat 2016, "Incorporating Nesterov Momentum into Adam"; RMSProp:
Hinton 2012, Coursera lecture 6e.

With m and v the running means of g and g^2, the direction is m / (sqrt(v) + eps), both divided by 1 - beta^t
first. NAdam takes beta1 m + (1 - beta1) g for m, RMSProp takes g.
"""

import optax

from trainit.config import ConfigDict, field
from trainit.optimizers.common.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = field(1e-3, "peak of the schedule", at_least=0)
    config.weight_decay = field(0.0, "weight decay, of the kind that `decoupled` says", at_least=0)
    config.decoupled = field(False, "add the decay after the direction (AdamW) instead of to the gradient")
    config.beta1 = field(0.9, "decay of the mean gradient", at_least=0, below=1)
    config.beta2 = field(0.999, "decay of the mean squared gradient", at_least=0, below=1)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    config.nesterov = field(False, "the mean gradient looks one step ahead")
    config.debias_beta1 = field(True, "divide the mean gradient by 1 - beta1^t")
    config.debias_beta2 = field(True, "divide the mean square by 1 - beta2^t")
    config.use_momentum = field(True, "use the mean gradient; False: the gradient itself")
    config.use_preconditioner = field(True, "divide by the root of the mean square")
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
    config.learning_rate = field(1e-3, "peak of the schedule", at_least=0)
    config.weight_decay = field(0.1, "weight decay, of the kind that `decoupled` says", at_least=0)
    config.decoupled = field(True, "add the decay after the direction instead of to the gradient")
    config.beta1 = field(0.9, "decay of the mean gradient", at_least=0, below=1)
    config.beta2 = field(0.999, "decay of the mean squared gradient", at_least=0, below=1)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    return config


def make_nadam(config, context) -> optax.GradientTransformation:
    """NAdam, Adam in Nesterov's form: Dozat 2016, "Incorporating Nesterov Momentum into Adam"."""
    direction = scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=True)
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")


def get_rmsprop_config() -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = field(1e-3, "peak of the schedule", at_least=0)
    config.weight_decay = field(0.1, "weight decay, of the kind that `decoupled` says", at_least=0)
    config.decoupled = field(True, "add the decay after the direction instead of to the gradient")
    config.beta2 = field(0.99, "decay of the mean squared gradient", at_least=0, below=1)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    config.debias_beta2 = field(True, "divide the mean square by 1 - beta2^t; False: as in the lecture")
    return config


def make_rmsprop(config, context) -> optax.GradientTransformation:
    """RMSProp, the gradient over the root of its mean square: Hinton 2012, Coursera lecture 6e."""
    direction = scale_by_moments(
        beta2=config.beta2, eps=config.eps, debias_beta2=config.debias_beta2, use_momentum=False
    )
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")
