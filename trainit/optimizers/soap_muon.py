"""SOAP-Muon: Muon on a momentum that is divided by its root mean square in SOAP's eigenbasis.

As in results 14 and 44 of modded-nanoGPT's track 3; no paper describes it. The basis is SOAP's (Vyas et al.
2024, arXiv 2409.11321), what follows is Muon's (Jordan et al. 2024).
"""

import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers import muon
from trainit.transforms import kronecker


def get_config() -> ConfigDict:
    config = muon.get_config()
    config.beta2 = field(0.9, "decay of the mean square in the bases", at_least=0, below=1)
    config.eps = field(1e-8, "added to its root", above=0)
    config.shampoo_beta = field(0.9, "decay of the means of G G^T and G^T G", at_least=0, below=1)
    config.precondition_every = field(10, "updates between turns of the bases, each a QR", above=0)
    config.max_size = field(10000, "maximum side of a matrix whose basis is changed", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    """SOAP-Muon for the blocks' matrices, `rest` for embeddings, head and vectors.

    The first update is Muon's, since the bases come from gradients before.
    """
    parts = _whiten(config, context.mesh), muon.orthogonal(config, context, config.scale)
    return muon.by_kind(config, context, {"matrix"}, *parts)


def _whiten(config, mesh) -> optax.GradientTransformation:
    beta = config.momentum

    def update(gradients, state: kronecker.BasisState, params=None):
        first = state.count == 0

        def one(g, mu, nu, bases):
            mu = beta * mu + (1 - beta) * g
            momentum = beta * mu + (1 - beta) * g if config.nesterov else mu

            # Divide in the bases, which exist from the second gradient on, and keep the length.
            rotated = kronecker.between(bases, momentum)
            nu = jnp.where(first, nu, config.beta2 * nu + (1 - config.beta2) * rotated * rotated)
            back = [None if basis is None else basis.T for basis in bases]
            divided = kronecker.between(back, rotated / (jnp.sqrt(nu) + config.eps))
            length = jnp.linalg.norm(momentum) / jnp.maximum(jnp.linalg.norm(divided), config.eps)
            return jnp.where(first, momentum, divided * length), mu, nu

        return kronecker.update_in_bases(one, config, mesh, gradients, state)

    return optax.GradientTransformation(lambda params: kronecker.begin_bases(params, config.max_size), update)
