"""PSGD with Kronecker factors: a momentum that two triangular matrices whiten. Li 2015, arXiv 1512.04202.

The factors are fitted to it as it goes, by multiplication (Li 2024, arXiv 2402.11858), in the form of
result 33 of modded-nanoGPT's track 3. That result is sphere+psgd.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import solve_triangular

from trainit.config import ConfigDict, field
from trainit.parallel.trees import path_name
from trainit.transforms import kronecker
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments
from trainit.transforms.newton_schulz import spectral_norm

TINY = jnp.finfo(jnp.float32).tiny


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=5e-4, weight_decay=0.6, beta1=0.95, eps=1e-8)
    config.beta2 = field(0.95, "decay of mean squares, of vectors", at_least=0, below=1)
    config.factor_rate = field(0.1, "part by which a factor changes at most in an update", above=0, at_most=1)
    config.max_rms = field(1.1, "maximum of a direction's root mean square", above=0)
    config.max_size = field(10000, "maximum side of a matrix that has a factor", above=0)
    return config


class PsgdState(NamedTuple):
    """Of `_psgd`. Factors are nested as the parameters, None where a side has none."""

    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    mu: dict  # mean gradient
    left: dict  # upper triangular
    right: dict


def make(config, context) -> optax.GradientTransformation:
    """Q_l^T Q_l M Q_r^T Q_r for matrices, AdamW for vectors.

    The side of the vocabulary or the positions has no factor, as any beyond max_size.
    """
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)
    labels = context.by_path(lambda path, kind: "rest" if kind == "vector" else "psgd")
    parts = {"psgd": _psgd(config, context.mesh, context.key), "rest": adam}
    return context.descend(optax.partition(parts, labels))


def _psgd(config, mesh, key) -> optax.GradientTransformation:
    def init(params) -> PsgdState:
        factors = kronecker.squares(params, config.max_size, jnp.eye)
        return PsgdState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), *factors)

    def update(gradients, state: PsgdState, params=None):
        t = (state.count + 1).astype(jnp.float32)
        drawn = jax.random.fold_in(jax.random.wrap_key_data(key), state.count)

        def noise(path, g):
            own = jax.random.fold_in(drawn, zlib.crc32(path_name(path).encode()))
            return jax.random.normal(own, g.shape)

        def one(matrices, factors):
            g, mu, probe = matrices
            mu = config.beta1 * mu + (1 - config.beta1) * g
            mean = mu / (1 - config.beta1**t)
            factors = _fit(factors, mean, probe, config.factor_rate)
            grams = [None if q is None else q.T @ q for q in factors]
            direction = kronecker.between(grams, mean)
            rms = jnp.sqrt(jnp.mean(jnp.square(direction)))
            return [direction * jnp.minimum(1.0, config.max_rms / jnp.maximum(rms, TINY)), mu, probe], factors

        arrays = [gradients, state.mu, jax.tree.map_with_path(noise, gradients)]
        (direction, mu, _), factors = kronecker.map_matrices(one, mesh, arrays, [state.left, state.right])
        return direction, PsgdState(state.count + 1, mu, *factors)

    return optax.GradientTransformation(init, update)


def _fit(factors: list, mean: jax.Array, probe: jax.Array, rate: float) -> list:
    """The factors after one step towards Q_l E[M M^T] Q_l^T = identity, and likewise for the right one.

    `probe` is random, N(0, 1). For A = Q_l M Q_r^T and B = Q_l^-T probe Q_r^-1, the left factor changes by
    -rate triu(A A^T - B B^T) Q_l / |A A^T + B B^T|. Without a momentum there is nothing to fit.
    """
    left, right = factors
    if left is not None and right is not None:  # only their product counts; keep them of one size
        ratio = jnp.sqrt(jnp.max(jnp.abs(right)) / jnp.max(jnp.abs(left)))
        left, right = left * ratio, right / ratio
    a = kronecker.between([None if q is None else q.T for q in (left, right)], mean)
    b = probe if left is None else solve_triangular(left, probe, trans="T")
    b = b if right is None else solve_triangular(right, b.T, trans="T").T

    def moved(q, a, b):
        if q is None:
            return None
        whole, part = a @ a.T + b @ b.T, jnp.triu(a @ a.T - b @ b.T)
        new = q - rate * part @ q / jnp.maximum(spectral_norm(whole), TINY)
        return jnp.where(jnp.any(mean != 0), new, q)

    return [moved(left, a, b), moved(right, a.T, b.T)]
