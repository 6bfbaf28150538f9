"""Normalized SGD with momentum: Cutkosky & Mehta 2020, arXiv 2002.03305; by layer after You et al. 2017."""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import map_layers

NORMALIZE = ("layer", "global", "none")
ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(weight_decay=0.0, momentum=0.95, nesterov=True)
    config.learning_rate = field(0.05, "peak of the schedule: the length of a step", at_least=0)
    config.normalize = field("layer", "divide by the norm of each layer's array, or of all", one_of=NORMALIZE)
    config.eps = field(1e-8, "added to the norm", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    def normalize(updates, params=None):
        match config.normalize:
            case "layer":
                return map_layers(lambda path, u: u / (jnp.linalg.norm(u) + config.eps), updates)
            case "global":
                length = optax.tree.norm(updates) + config.eps
                return jax.tree.map(lambda u: u / length, updates)
        return updates

    momentum = optax.trace(config.momentum, config.nesterov)
    return context.descend(optax.chain(momentum, optax.stateless(normalize)))
