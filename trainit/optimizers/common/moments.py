"""The direction of Adam and its relatives, and the walk over stacked layers that others share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.parallel.layout import is_stacked
from trainit.parallel.trees import path_name


class MomentsState(NamedTuple):
    """Of `scale_by_moments`; a moment that is not used is None."""

    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    mu: dict | None  # mean gradient
    nu: dict | None  # mean squared gradient


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
    """The mean gradient over the root of the mean squared gradient: Kingma & Ba 2014, arXiv 1412.6980.

    Each part can be left out. With all of them it is optax.scale_by_adam except for rounding: optax raises
    the decays to a whole-number power, whose last bits differ, and losses would change with them.

    Args:
        beta1: decay of the mean gradient.
        beta2: decay of the mean squared gradient.
        eps: added to the root.
        nesterov: the mean gradient looks one step ahead (Dozat 2016).
        debias_beta1: divide the mean by 1 - beta1^t.
        debias_beta2: divide the mean square by 1 - beta2^t.
        use_momentum: off: the gradient itself instead of its mean.
        use_preconditioner: off: no division.
    """

    def init(params) -> MomentsState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MomentsState(
            jnp.zeros((), jnp.int32), zeros if use_momentum else None, zeros if use_preconditioner else None
        )

    def numerator(g, m, t):
        if not nesterov:
            return m / (1 - beta1**t) if debias_beta1 else m
        if debias_beta1:
            return beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        return beta1 * m + (1 - beta1) * g

    def update(gradients, state: MomentsState, params=None):
        del params
        count, mu, nu = state.count + 1, state.mu, state.nu
        t, direction = count.astype(jnp.float32), gradients
        if use_momentum:
            mu = optax.tree.update_moment(gradients, mu, beta1, 1)
            direction = jax.tree.map(lambda g, m: numerator(g, m, t), gradients, mu)
        if use_preconditioner:
            nu = optax.tree.update_moment(gradients, nu, beta2, 2)
            correction = 1 - beta2**t if debias_beta2 else 1.0
            direction = jax.tree.map(lambda d, v: d / (jnp.sqrt(v / correction) + eps), direction, nu)
        return direction, MomentsState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_laprop(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """The mean of gradients over the root of their mean square: Ziyin et al. 2020, arXiv 2002.04839.

    Args:
        beta1: decay of the mean of what is divided.
        beta2: decay of the mean squared gradient.
        eps: added to the root.
    """
    divide = scale_by_moments(beta2=beta2, eps=eps, use_momentum=False)
    return optax.chain(divide, scale_by_moments(beta1, use_preconditioner=False))


def map_layers(function: Callable[..., jax.Array], tree: dict, *others: dict):
    """Applies function(path, array, ...) to every parameter, and of a stacked one to each layer by itself.

    Args:
        function: path and arrays without a layers axis -> array.
        tree: nested as the parameters, whole or with parts masked out.
        others: more arrays for each parameter.
    """

    def apply(path, *arrays):
        name = path_name(path)

        def one(*arrays):
            return function(name, *arrays)

        return jax.vmap(one)(*arrays) if is_stacked(name) else one(*arrays)

    return jax.tree.map_with_path(apply, tree, *others)


def norm(x: jax.Array) -> jax.Array:
    """The root of the sum of squares of all entries."""
    return jnp.sqrt(jnp.sum(x * x))
