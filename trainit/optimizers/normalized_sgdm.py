"""Normalized SGD with momentum: Cutkosky & Mehta 2020, arXiv 2002.03305; by layer after You et al. 2017."""

import jax
import optax
from ml_collections import ConfigDict

from trainit.config import require
from trainit.optimizers.common.moments import map_layers, norm

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "normalized_sgdm"
    config.learning_rate = 0.05  # peak of the schedule: the length of a step; >= 0
    config.weight_decay = 0.0  # decoupled, times the learning rate; >= 0
    config.momentum = 0.95  # m <- momentum * m + g; in [0, 1)
    config.nesterov = True  # direction momentum * m + g instead of m
    config.normalize = "layer"  # to norm 1: layer (each array of each layer), global (all together), none
    config.eps = 1e-8  # added to the norm; > 0
    return config


def make(config, context) -> optax.GradientTransformation:
    require(
        config.normalize in ("layer", "global", "none"),
        f"optimizer.normalize={config.normalize!r} is none of 'layer', 'global', 'none'",
    )

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
