"""The direction of Adam and its relatives, and the walk over stacked layers that others share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from trainit.parallel.layout import is_stacked
from trainit.parallel.trees import path_name


def scale_by_moments(
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    nesterov: bool = False,
    debias_beta1: bool = True,
    debias_beta2: bool = True,
    use_momentum: bool = True,
    use_preconditioner: bool = True,
) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps), m and v the means of g and g^2: Kingma & Ba 2014, arXiv 1412.6980.

    With `nesterov` m looks one step ahead (Dozat 2016), `debias_` divides by 1 - beta^t. Without momentum m
    is g, and without preconditioner nothing is divided. By default it is optax.scale_by_adam except for
    rounding: optax raises the decays to a whole-number power, whose last bits differ, and losses with them.
    """

    def init(params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        mu, nu = zeros if use_momentum else None, zeros if use_preconditioner else None
        return optax.ScaleByAdamState(jnp.int32(0), mu, nu)

    def numerator(g, m, t):
        if not nesterov:
            return m / (1 - beta1**t) if debias_beta1 else m
        if debias_beta1:
            return beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        return beta1 * m + (1 - beta1) * g

    def update(gradients, state: optax.ScaleByAdamState, params=None):
        count, mu, nu = state.count + 1, state.mu, state.nu
        t, direction = count.astype(jnp.float32), gradients
        if use_momentum:
            mu = optax.tree.update_moment(gradients, mu, beta1, 1)
            direction = jax.tree.map(lambda g, m: numerator(g, m, t), gradients, mu)
        if use_preconditioner:
            nu = optax.tree.update_moment(gradients, nu, beta2, 2)
            correction = 1 - beta2**t if debias_beta2 else 1.0
            direction = jax.tree.map(lambda d, v: d / (jnp.sqrt(v / correction) + eps), direction, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_laprop(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """The mean of gradients over the root of their mean square: Ziyin et al. 2020, arXiv 2002.04839."""
    divide = scale_by_moments(beta2=beta2, eps=eps, use_momentum=False)
    return optax.chain(divide, scale_by_moments(beta1, use_preconditioner=False))


def add_mean(beta: float) -> optax.GradientTransformation:
    """o <- beta o + (1 - beta) u, and u + o; before the learning rate, so that old rates leave no trace."""

    def update(updates, mean, params=None):
        mean = optax.tree.update_moment(updates, mean, beta, 1)
        return jax.tree.map(jnp.add, updates, mean), mean

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def map_layers(function: Callable[..., jax.Array], tree: dict, *others: dict):
    """Applies function(path, array, ...) to every parameter, and to each layer of a stacked one by itself."""

    def apply(path, *arrays):
        name = path_name(path)
        one = functools.partial(function, name)
        return jax.vmap(one)(*arrays) if is_stacked(name) else one(*arrays)

    return jax.tree.map_with_path(apply, tree, *others)


def unzip(like: dict, results: dict, number: int) -> list:
    """As many trees as each leaf of `like` has results."""
    return [jax.tree.map(lambda _, result, i=i: result[i], like, results) for i in range(number)]
