"""SOAP, Adam in the eigenbasis of Shampoo's factors: Vyas et al. 2024, arXiv 2409.11321, algorithm 3."""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms import kronecker
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=3e-3, weight_decay=0.1, beta1=0.95, beta2=0.95, eps=1e-8)
    config.shampoo_beta = field(0.95, "decay of the means of G G^T and G^T G", at_least=0, below=1)
    config.precondition_every = field(10, "updates between turns of the bases, each a QR", above=0)
    config.max_size = field(10000, "maximum side of a matrix whose basis is changed", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    """SOAP for matrices, AdamW for vectors.

    As its authors do it, the first gradient only sets the bases. The side of the vocabulary or the positions
    keeps its own basis, as any beyond max_size does.
    """
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)
    labels = context.by_path(lambda path, kind: "rest" if kind == "vector" else "soap")
    parts = {"soap": _soap(config, context.mesh), "rest": _but_the_first(adam)}
    return context.descend(optax.partition(parts, labels))


def _but_the_first(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The first gradient does nothing."""

    def init(params):
        return jnp.bool(True), inner.init(params)

    def update(gradients, state, params=None):
        first, old = state
        new = inner.update(gradients, old, params)
        still = jax.tree.map(jnp.zeros_like, gradients), old
        direction, kept = jax.tree.map(lambda n, o: jnp.where(first, o, n), new, still)
        return direction, (jnp.bool(False), kept)

    return optax.GradientTransformation(init, update)


def _soap(config, mesh) -> optax.GradientTransformation:
    def update(gradients, state: kronecker.BasisState, params=None):
        first = state.count == 0
        t = jnp.maximum(state.count, 1).astype(jnp.float32)

        def one(g, mu, nu, bases):
            back = [None if basis is None else basis.T for basis in bases]
            rotated = kronecker.between(bases, g)
            mu = jnp.where(first, mu, config.beta1 * mu + (1 - config.beta1) * g)
            nu = jnp.where(first, nu, config.beta2 * nu + (1 - config.beta2) * rotated * rotated)
            mean, square = kronecker.between(bases, mu) / (1 - config.beta1**t), nu / (1 - config.beta2**t)
            return kronecker.between(back, mean / (jnp.sqrt(square) + config.eps)), mu, nu

        return kronecker.update_in_bases(one, config, mesh, gradients, state)

    return optax.GradientTransformation(lambda params: kronecker.begin_bases(params, config.max_size), update)
