"""Sophia: the mean gradient over the Hessian's diagonal, entry by entry at most 1.

Liu et al. 2023, arXiv 2305.14342, algorithm 3, with either of its estimates of the diagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=1e-3, weight_decay=0.1, beta1=0.96)
    config.beta2 = field(0.99, "decay of the mean of the Hessian's diagonals", at_least=0, below=1)
    config.gamma = field(0.01, "share of the diagonal that the mean gradient is divided by", above=0)
    config.eps = field(1e-12, "minimum of that divisor", above=0)
    kinds = ("hutchinson", "gnb")
    config.estimator = field(kinds[0], "hutchinson: Sophia-H; gnb: Sophia-G, for gamma=0.05", one_of=kinds)
    config.every_steps = field(10, "updates between estimates, each of which costs two gradients", above=0)
    return config


def needs(config) -> set[str]:
    return {"sampled_gradient_at" if config.estimator == "gnb" else "gradient_at"}


class SophiaState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    mu: dict  # mean gradient
    hessian: dict  # mean of estimated diagonals


def make(config, context) -> optax.GradientTransformation:
    """m / max(gamma h, eps), clipped to [-1, 1]; every few updates h <- beta2 h + (1 - beta2) estimate."""
    estimator = _hutchinson if config.estimator == "hutchinson" else _gauss_newton_bartlett

    def init(params) -> SophiaState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SophiaState(jnp.int32(0), zeros, zeros)

    def update(gradients, state: SophiaState, params, *, step, **extra_args):
        mu = optax.tree.update_moment(gradients, state.mu, config.beta1, 1)

        def estimate() -> dict:
            key = jax.random.fold_in(jax.random.wrap_key_data(context.key), step)
            diagonal = estimator(params, key, **extra_args)
            return optax.tree.update_moment(diagonal, state.hessian, config.beta2, 1)

        is_due = state.count % config.every_steps == 0
        hessian = jax.lax.cond(is_due, estimate, lambda: state.hessian)
        direction = jax.tree.map(
            lambda m, h: jnp.clip(m / jnp.maximum(config.gamma * h, config.eps), -1, 1), mu, hessian
        )
        return direction, SophiaState(state.count + 1, mu, hessian)

    return context.descend(optax.GradientTransformationExtraArgs(init, update))


def _hutchinson(params: dict, key: jax.Array, *, gradient_at, **extra_args) -> dict:
    """z * (H z), z being drawn from the normal distribution (algorithm 1).

    H z is the derivative of this batch's gradient along z.
    """
    leaves, structure = jax.tree_util.tree_flatten(params)
    normals = [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)]
    z = jax.tree.unflatten(structure, normals)
    _, product = jax.jvp(gradient_at, (params,), (z,))
    return jax.tree.map(jnp.multiply, z, product)


def _gauss_newton_bartlett(params: dict, key: jax.Array, *, sampled_gradient_at, **extra_args) -> dict:
    """B g * g with g the mean gradient over B tokens, whose targets the model draws itself (algorithm 2)."""
    gradient, count = sampled_gradient_at(params, key)
    return jax.tree.map(lambda g: count * g * g, gradient)
