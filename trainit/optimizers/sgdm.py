"""SGD with heavy-ball momentum (Polyak 1964), or in Nesterov's form (Sutskever et al. 2013).

m <- momentum m + g                              x <- x - rate * m, or in Nesterov's form (momentum m + g)
"""

import optax

from trainit.config import ConfigDict
from trainit.transforms.fields import common_fields

ELEMENTWISE = True


def get_config() -> ConfigDict:
    return common_fields(learning_rate=0.1, weight_decay=0.0, decoupled=True, momentum=0.9, nesterov=False)


def make(config, context) -> optax.GradientTransformation:
    momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    return context.descend(momentum, "decoupled" if config.decoupled else "coupled")
