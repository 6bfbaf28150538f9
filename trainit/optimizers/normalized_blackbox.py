"""A bettor for the length along the normalized sum of past gradients, of all parameters or of each layer.

From github.com/ZQZCalin/trainit, after the reduction of Cutkosky & Orabona 2018, arXiv 1802.06293; no paper
describes it. There the first gradient meets a random direction, here its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.optimizers import kt_bettor
from trainit.parallel.trees import inner_product
from trainit.transforms import online
from trainit.transforms.moments import map_layers

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1.0, lipschitz=10.0, discount=0.9, regularization=0.0)
    config.eps = field(1.0, "wealth of each length's bettor at the beginning", above=0)
    config.per_layer = field(False, "a length for each array of each layer instead of one for all parameters")
    return config


class NormalizedState(NamedTuple):
    bettor: optax.OptState
    total: dict  # of what the bettor saw, for each length
    past: dict  # mean gradient or sum
    point: dict


def make(config, context):
    """Delta = sign(sum s) z G / |G|: G of past gradients, z the bettor's for s = sign(sum s) <g, G / |G|>."""
    keep, add = online.mean_weights(config)
    bettor = kt_bettor.bettor(config.eps, config.lipschitz)

    def inners(one: dict, other: dict) -> dict:
        """The inner product of each array of each layer, or that of all together for each."""
        if config.per_layer:
            return map_layers(lambda path, a, b: inner_product(a, b).reshape([1] * a.ndim), one, other)
        whole = inner_product(one, other)
        return jax.tree.map(lambda a: whole.reshape([1] * a.ndim), one)

    def units(tree: dict) -> dict:
        """The tree divided by its norms; 0 where these are."""
        tiny = jnp.finfo(jnp.float32).tiny
        squares = inners(tree, tree)
        return jax.tree.map(lambda x, square: x / jnp.maximum(jnp.sqrt(square), tiny), tree, squares)

    def init(params) -> NormalizedState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        scalars = inners(zeros, zeros)
        return NormalizedState(bettor.init(scalars), scalars, zeros, zeros)

    def update(gradients, state: NormalizedState, rate):
        g = jax.tree.map(lambda g, d: g + config.regularization * d, gradients, state.point)
        seen = inners(state.past, state.past)
        direction = jax.tree.map(lambda p, g, n: jnp.where(n > 0, p, g), state.past, g, seen)
        along = inners(g, units(direction))
        s = jax.tree.map(lambda total, product: _sign(total) * product, state.total, along)
        z, of_bettor = bettor.update(s, state.bettor, rate)
        total = jax.tree.map(jnp.add, state.total, s)
        past = jax.tree.map(lambda p, g: keep * p + add * g, state.past, g)
        point = jax.tree.map(lambda total, z, unit: _sign(total) * z * unit, total, z, units(past))
        return point, NormalizedState(of_bettor, total, past, point)

    return online.to_optimizer(online.Learner(init, update), config, context, scaled=True)


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, -1.0, 1.0)
