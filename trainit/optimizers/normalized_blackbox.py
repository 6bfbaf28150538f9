"""A bettor for the length along the normalized sum of past gradients, of all parameters or of each layer.

From github.com/ZQZCalin/trainit, after the reduction of Cutkosky & Orabona 2018, arXiv 1802.06293; no paper
describes it. There the first gradient meets a random direction, here its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trainit.config import require
from trainit.metrics import inner
from trainit.optimizers import _online, kt_bettor
from trainit.optimizers._moments import map_layers


def get_config() -> ConfigDict:
    config = _online.get_config("normalized_blackbox", learning_rate=1.0)
    config.eps = 1.0  # the bettor's wealth at the beginning, of each length; > 0
    config.lipschitz = 10.0  # bound G of its gradients, to which larger ones are clipped; > 0
    config.beta = 0.9  # decay of the mean gradient that gives the direction; 1: the sum; in (0, 1]
    config.regularization = 0.0  # lambda: adds lambda/2 |Delta|^2 to each loss; >= 0
    config.per_layer = False  # a length for each array of each layer, or one for all parameters
    return config


class NormalizedState(NamedTuple):
    bettor: optax.OptState
    total: dict  # of what the bettor saw, for each length
    past: dict  # mean gradient or sum
    point: dict


def make(config, context):
    """Delta = sign(sum s) z G / |G|: G of past gradients, z the bettor's for s = sign(sum s) <g, G / |G|>."""
    for field in ("eps", "lipschitz"):
        require(config[field] > 0, f"optimizer.{field}={config[field]} must be above 0")
    _online.check_not_below_0(config, "regularization")
    require(0 < config.beta <= 1, f"optimizer.beta={config.beta} must lie in (0, 1]")
    bettor = kt_bettor.bettor(config.eps, config.lipschitz)
    keep, add = (1.0, 1.0) if config.beta == 1 else (config.beta, 1 - config.beta)

    def lengths(function, one: dict, other: dict) -> dict:
        """function(array, array) of each array of each layer, or the same of all together."""
        if config.per_layer:
            return map_layers(lambda path, a, b: function(a, b).reshape([1] * a.ndim), one, other)
        whole = function(one, other)
        return jax.tree.map(lambda a: whole.reshape([1] * a.ndim), one)

    def init(params) -> NormalizedState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        scalars = lengths(inner, zeros, zeros)
        return NormalizedState(bettor.init(scalars), scalars, zeros, zeros)

    def update(gradients, state: NormalizedState, rate):
        g = jax.tree.map(lambda g, d: g + config.regularization * d, gradients, state.point)
        seen = lengths(inner, state.past, state.past)
        direction = jax.tree.map(lambda p, g, n: jnp.where(n > 0, p, g), state.past, g, seen)
        size = lengths(lambda a, b: jnp.sqrt(inner(a, b)), direction, direction)
        tiny = jnp.finfo(jnp.float32).tiny
        s = jax.tree.map(
            lambda product, size, total: _sign(total) * product / jnp.maximum(size, tiny),
            lengths(inner, g, direction),
            size,
            state.total,
        )
        z, of_bettor = bettor.update(s, state.bettor, rate=rate)
        total = jax.tree.map(jnp.add, state.total, s)
        past = jax.tree.map(lambda p, g: keep * p + add * g, state.past, g)
        size = lengths(lambda a, b: jnp.sqrt(inner(a, b)), past, past)
        point = jax.tree.map(
            lambda p, z, total, size: _sign(total) * z * p / jnp.maximum(size, tiny), past, z, total, size
        )
        return point, NormalizedState(of_bettor, total, past, point)

    return _online.to_optimizer(_online.stateful(init, update), config, context, scaled=True)


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, -1.0, 1.0)
