"""Shampoo: Gupta et al. 2018, arXiv 1802.09568, with the changes that made it practical.

Roots that are taken now and then, and grafting: Anil et al. 2020, arXiv 2002.09018. Means instead of sums,
and the mean gradient in the place of the gradient: Shi et al. 2023, arXiv 2309.06497.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms import kronecker
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, eps=1e-8)
    config.beta2 = field(0.95, "decay of mean squares, of vectors and for graft=adam", at_least=0, below=1)
    config.shampoo_beta = field(0.95, "decay of the means of G G^T and G^T G", at_least=0, below=1)
    config.ridge = field(1e-6, "share of a factor's largest eigenvalue that is added to all of them", above=0)
    config.precondition_every = field(10, "updates between roots, each an eigendecomposition", above=0)
    config.max_size = field(10000, "maximum side of a matrix that has a factor", above=0)
    config.graft = field(
        "adam", "whose length directions take; sgd: the mean's", one_of=("adam", "sgd", "none")
    )
    return config


class ShampooState(NamedTuple):
    """Of `_shampoo`. Squares are nested as the parameters, None where a side has no factor."""

    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    mu: dict  # mean gradient
    nu: dict | None  # mean squared gradient, for graft=adam
    left: dict  # mean of G G^T
    right: dict  # mean of G^T G
    left_root: dict  # the inverse roots that it is multiplied by
    right_root: dict


def make(config, context) -> optax.GradientTransformation:
    """L^(-1/4) M R^(-1/4) for matrices, AdamW for vectors.

    The side of the vocabulary or the positions has no factor, as any beyond max_size; the other's root is
    then L^(-1/2).
    """
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)
    labels = context.by_path(lambda path, kind: "rest" if kind == "vector" else "shampoo")
    return context.descend(optax.partition({"shampoo": _shampoo(config, context.mesh), "rest": adam}, labels))


def _shampoo(config, mesh) -> optax.GradientTransformation:
    def init(params) -> ShampooState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        factors = kronecker.squares(params, config.max_size, lambda size: jnp.zeros((size, size)))
        roots = kronecker.squares(params, config.max_size, jnp.eye)
        return ShampooState(jnp.int32(0), zeros, zeros if config.graft == "adam" else None, *factors, *roots)

    def update(gradients, state: ShampooState, params=None):
        t = (state.count + 1).astype(jnp.float32)
        is_due = state.count % config.precondition_every == 0

        def one(matrices, squares):
            g, mu, *nu = matrices
            factors = kronecker.add(squares[:2], g, config.shampoo_beta)
            sides = sum(factor is not None for factor in factors)

            def root(factor, old):
                mean = factor / (1 - config.shampoo_beta**t)
                return jax.lax.cond(is_due, lambda: _inverse_root(mean, 2 * sides, config.ridge), lambda: old)

            before = zip(factors, squares[2:], strict=True)
            roots = [None if factor is None else root(factor, last) for factor, last in before]
            mu = config.beta1 * mu + (1 - config.beta1) * g
            mean = mu / (1 - config.beta1**t)
            direction = kronecker.between(roots, mean)
            if config.graft == "adam":
                nu = [config.beta2 * nu[0] + (1 - config.beta2) * g * g]
                mean = mean / (jnp.sqrt(nu[0] / (1 - config.beta2**t)) + config.eps)
            if config.graft != "none":
                length = jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(jnp.float32).tiny)
                direction *= jnp.linalg.norm(mean) / length
            return [direction, mu, *nu], [*factors, *roots]

        arrays = [gradients, state.mu, *([] if state.nu is None else [state.nu])]
        (direction, mu, *nu), squares = kronecker.map_matrices(one, mesh, arrays, list(state[3:]))
        return direction, ShampooState(state.count + 1, mu, nu[0] if nu else None, *squares)

    return optax.GradientTransformation(init, update)


def _inverse_root(factor: jax.Array, power: int, ridge: float) -> jax.Array:
    """factor^(-1/power) of a positive semidefinite matrix, of zeros the identity."""
    values, vectors = jnp.linalg.eigh(factor)
    largest = values[-1]
    raised = jnp.where(largest > 0, jnp.maximum(values, 0) + ridge * largest, 1.0)
    return (vectors * raised ** (-1 / power)) @ vectors.T
