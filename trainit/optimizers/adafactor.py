"""Adafactor: Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind
from trainit.parallel.trees import path_name
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import map_layers, unzip

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(weight_decay=0.0)
    config.learning_rate = field(1e-2, "peak of the schedule, times an array's root mean square", at_least=0)
    config.beta1 = field(0.0, "decay of the mean direction, a copy's memory; 0: none", at_least=0, below=1)
    config.decay_power = field(0.8, "p in 1 - t^-p, the decay of the mean squared gradients", above=0)
    config.eps = field(1e-30, "added to squared gradients", above=0)
    config.threshold = field(1.0, "maximum of a direction's root mean square", above=0)
    config.scale_floor = field(1e-3, "least root mean square an array counts as, so that zeros move", above=0)
    return config


class AdafactorState(NamedTuple):
    """Nested as the parameters, None where there is none."""

    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    mu: dict | None  # mean direction
    rows: dict  # of matrices: mean squared gradient of each row
    columns: dict  # and of each column
    nu: dict  # of vectors: mean squared gradient


def make(config, context) -> optax.GradientTransformation:
    """The gradient over the root of a mean square that rows and columns give, clipped and scaled."""

    def init(params) -> AdafactorState:
        def means(path, p):
            name = path_name(path)
            if parameter_kind(name) == "vector":
                return None, None, jnp.zeros_like(p)
            stack = p.shape[: is_stacked(name)]
            rows, columns = matrix_shape(name, p.shape[len(stack) :])
            return jnp.zeros((*stack, rows)), jnp.zeros((*stack, columns)), None

        mu = optax.tree.zeros_like(params) if config.beta1 else None
        return AdafactorState(jnp.int32(0), mu, *unzip(params, jax.tree.map_with_path(means, params), 3))

    def update(gradients, state: AdafactorState, params):
        count = state.count + 1
        beta2 = 1 - count.astype(jnp.float32) ** -config.decay_power

        def mean(old, new):
            return beta2 * old + (1 - beta2) * new

        def one(path, g, x, rows, columns, nu):
            square = g * g + config.eps
            if nu is not None:
                nu = mean(nu, square)
                direction = g / jnp.sqrt(nu)
            else:
                matrix, square = (a.reshape(matrix_shape(path, g.shape)) for a in (g, square))
                rows, columns = mean(rows, square.mean(1)), mean(columns, square.mean(0))
                # Not the root of their product, which may be too small for a float.
                direction = matrix * jax.lax.rsqrt(rows / rows.mean())[:, None] * jax.lax.rsqrt(columns)
                direction = direction.reshape(g.shape)
            direction = direction / jnp.maximum(1.0, _root_mean_square(direction) / config.threshold)
            return jnp.maximum(_root_mean_square(x), config.scale_floor) * direction, rows, columns, nu

        done = map_layers(one, gradients, params, state.rows, state.columns, state.nu)
        direction, rows, columns, nu = unzip(gradients, done, 4)
        mu = state.mu
        if config.beta1:
            direction = mu = optax.tree.update_moment(direction, mu, config.beta1, 1)
        return direction, AdafactorState(count, mu, rows, columns, nu)

    return context.descend(optax.GradientTransformation(init, update))


def _root_mean_square(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x) / x.size**0.5
