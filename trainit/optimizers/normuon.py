"""NorMuon: Muon whose update is evened out over neurons: Li et al. 2025, arXiv 2510.05491, algorithm 1.

For Muon's direction O of a matrix, v <- beta2 v + (1 - beta2) mean(O^2) over the inputs of each neuron, an
output of the matrix, and with O' = O / (sqrt(v) + eps) the direction is 0.2 O' / rms(O').
"""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers import muon
from trainit.parallel.layout import matrix_shape
from trainit.transforms.moments import map_layers

RMS = 0.2  # of an update, about AdamW's


def get_config() -> ConfigDict:
    config = muon.fields_of_direction()
    config.update(learning_rate=1e-3, nesterov=False, rest_rate=1.0)
    config.beta2 = field(0.95, "decay of each neuron's mean square", at_least=0, below=1)
    config.eps = field(1e-8, "added to the root of the mean square", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    """NorMuon for the blocks' matrices, `rest` for embeddings, head and vectors."""
    parts = muon.momentum(config), muon.orthogonal(config, context), _even_out(config.beta2, config.eps)
    return muon.by_kind(config, context, {"matrix"}, *parts)


def _even_out(beta2: float, eps: float) -> optax.GradientTransformation:
    """The state is each neuron's mean square: [layers,] outputs."""

    def mean_squares(path, u):
        return jnp.mean(jnp.square(u.reshape(matrix_shape(path, u.shape))), 0)

    def even(path, u, v):
        matrix = u.reshape(matrix_shape(path, u.shape)) / (jnp.sqrt(v) + eps)
        rms = jnp.sqrt(jnp.mean(jnp.square(matrix)))
        return (matrix * (RMS / jnp.maximum(rms, eps))).reshape(u.shape)

    def init(params) -> dict:
        return map_layers(mean_squares, jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        state = optax.tree.update_moment(map_layers(mean_squares, updates), state, beta2, 1)
        return map_layers(even, updates, state), state

    return optax.GradientTransformation(init, update)
