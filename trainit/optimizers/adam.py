"""Adam with a switch for each of its parts (Kingma & Ba 2014, arXiv 1412.6980), and two of its relatives.

With m and v the running means of g and g^2, the direction is m / (sqrt(v) + eps), both divided by 1 - beta^t
first. NAdam takes beta1 m + (1 - beta1) g for m, RMSProp takes g.
"""

import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True
DECOUPLED = {"learning_rate": 1e-3, "weight_decay": 0.1, "decoupled": True}


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=1e-3, weight_decay=0.0, decoupled=False, beta1=0.9, beta2=0.999)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    config.nesterov = field(False, "the mean gradient looks one step ahead")
    config.debias_beta1 = field(True, "divide the mean gradient by 1 - beta1^t")
    config.debias_beta2 = field(True, "divide the mean square by 1 - beta2^t")
    config.use_momentum = field(True, "use the mean gradient; False: the gradient itself")
    config.use_preconditioner = field(True, "divide by the root of the mean square")
    return config


def make(config, context) -> optax.GradientTransformation:
    c = config
    options = {"debias_beta1": c.debias_beta1, "debias_beta2": c.debias_beta2, "use_momentum": c.use_momentum}
    options |= {"nesterov": c.nesterov, "use_preconditioner": c.use_preconditioner}
    direction = scale_by_moments(c.beta1, c.beta2, c.eps, **options)
    return context.descend(direction, "decoupled" if c.decoupled else "coupled")


def get_nadam_config() -> ConfigDict:
    return common_fields(**DECOUPLED, beta1=0.9, beta2=0.999, eps=1e-8)


def make_nadam(config, context) -> optax.GradientTransformation:
    """NAdam, Adam in Nesterov's form: Dozat 2016, "Incorporating Nesterov Momentum into Adam"."""
    direction = scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=True)
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")


def get_rmsprop_config() -> ConfigDict:
    config = common_fields(**DECOUPLED, beta2=0.99, eps=1e-8)
    config.debias_beta2 = field(True, "divide the mean square by 1 - beta2^t; False: as in the lecture")
    return config


def make_rmsprop(config, context) -> optax.GradientTransformation:
    """RMSProp, the gradient over the root of its mean square: Hinton 2012, Coursera lecture 6e."""
    options = {"debias_beta2": config.debias_beta2, "use_momentum": False}
    direction = scale_by_moments(beta2=config.beta2, eps=config.eps, **options)
    return context.descend(direction, "decoupled" if config.decoupled else "coupled")
