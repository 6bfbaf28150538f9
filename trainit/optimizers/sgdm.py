"""SGD with heavy-ball momentum (Polyak 1964), or in Nesterov's form (Sutskever et al. 2013).

m <- momentum m + g                              x <- x - rate * m, or in Nesterov's form (momentum m + g)
"""

import optax

from trainit.config import ConfigDict, field

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = field(0.1, "peak of the schedule", at_least=0)
    config.weight_decay = field(0.0, "weight decay, of the kind that `decoupled` says", at_least=0)
    config.decoupled = field(True, "add the decay after the direction instead of to the gradient")
    config.momentum = field(
        0.9,
        "factor of the old momentum in m <- momentum * m + g; 0: plain gradient descent",
        at_least=0,
        below=1,
    )
    config.nesterov = field(False, "take momentum * m + g as the direction instead of m")
    return config


def make(config, context) -> optax.GradientTransformation:
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    return context.descend(momentum, "decoupled" if config.decoupled else "coupled")
