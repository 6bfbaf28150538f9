"""Sphere: a matrix keeps its first Frobenius norm, and rates are in units of it ("Hyperball", MuonH, AdamH).

Wen, Dang, Lyu, Ma & Liang 2026, arXiv 2606.16899.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict
from trainit.parallel.layout import is_stacked, parameter_kind
from trainit.parallel.trees import path_name

ELEMENTWISE = True
TINY = jnp.finfo(jnp.float32).tiny


def get_config(base: ConfigDict) -> ConfigDict:
    return base


class SphereState(NamedTuple):
    """Nested as the parameters, None for those that are no matrices of the blocks."""

    base: optax.OptState
    radius: dict  # Frobenius norm of each layer's matrix: ([layers,])


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """x <- R y / |y| with y = x - rate R u / |u|, for each of the blocks' matrices of norm R.

    u is what the other optimizer would do, without decay, which here has no effect. Embeddings, head and
    vectors are updated and decay as they would be alone.
    """
    base = make_base(replace(context, undecayed=frozenset({"matrix"})))

    def init(params) -> SphereState:
        def radius(path, p):
            is_matrix = parameter_kind(path_name(path)) == "matrix"
            return jnp.ravel(_norm(path, p)) if is_matrix else None

        return SphereState(base.init(params), jax.tree.map_with_path(radius, params))

    def update(gradients, state: SphereState, params, *, step, **extra_args):
        updates, base_state = base.update(gradients, state.base, params, step=step, **extra_args)
        rate = context.schedule(step)

        def turn(path, x, u, radius):
            if radius is None:
                return u
            length = _norm(path, u)
            radius = radius.reshape(length.shape)
            move = rate * radius * u / jnp.maximum(length, TINY)
            y = x + move
            return move + (radius / jnp.maximum(_norm(path, y), TINY) - 1) * y  # exactly 0 if nothing moves

        updates = jax.tree.map_with_path(turn, params, updates, state.radius)
        return updates, SphereState(base_state, state.radius)

    return optax.GradientTransformationExtraArgs(init, update)


def _norm(path, x: jax.Array) -> jax.Array:
    """Frobenius norm of each layer, with axes of size 1: ([layers,] 1, ...)."""
    axes = tuple(range(is_stacked(path_name(path)), x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
