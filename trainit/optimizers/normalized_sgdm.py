"""Normalized SGD with momentum: Cutkosky & Mehta 2020, arXiv 2002.03305; by layer after You et al. 2017."""

import jax
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers.common.moments import map_layers, norm

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.learning_rate = field(0.05, "peak of the schedule: the length of a step", at_least=0)
    config.weight_decay = field(0.0, "decoupled weight decay, times the learning rate", at_least=0)
    config.momentum = field(0.95, "factor of the old momentum in m <- momentum * m + g", at_least=0, below=1)
    config.nesterov = field(True, "take momentum * m + g as the direction instead of m")
    config.normalize = field(
        "layer",
        "what is divided by its norm: each array of each layer, all arrays together, or nothing",
        one_of=("layer", "global", "none"),
    )
    config.eps = field(1e-8, "added to the norm", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    def normalize(updates, params=None):
        del params
        match config.normalize:
            case "layer":
                return map_layers(lambda path, u: u / (norm(u) + config.eps), updates)
            case "global":
                length = optax.tree.norm(updates) + config.eps
                return jax.tree.map(lambda u: u / length, updates)
        return updates

    return context.descend(
        optax.chain(optax.trace(config.momentum, config.nesterov), optax.stateless(normalize))
    )
