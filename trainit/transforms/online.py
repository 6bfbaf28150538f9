"""Online learners as optimizers: the conversion from online to non-convex.

A learner answers each gradient g, that is the linear loss <g, .>, with its next point, which is the model's
next change: Cutkosky, Mehta & Orabona 2023, arXiv 2302.03775. Zhang & Cutkosky 2024, arXiv 2405.09742,
multiply it by a random factor of mean 1. Here a learner's update(gradients, state, rate) returns its
point and its new state, `rate` being the scheduled learning rate.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields

Learner: TypeAlias = optax.GradientTransformation
SCALINGS = "none", "exponential", "uniform"


def get_config(learning_rate: float, **others: float) -> ConfigDict:
    """The fields that all learners have, and `others` of `common_fields`."""
    config = common_fields(weight_decay=0.0, **others)
    config.learning_rate = field(learning_rate, "peak of the learner's step or points' factor", at_least=0)
    config.random_scaling = field(
        "none", "random factor of the point: exponential (of mean 1), uniform (in [0, 2])", one_of=SCALINGS
    )
    config.importance_sampling = field(True, "weigh a gradient by (1 - F) / density at its point's factor")
    return config


class OnlineState(NamedTuple):
    learner: optax.OptState
    logged: dict  # float32: the last point's norm and factor, and the weight of the gradient to come


def to_optimizer(learner: Learner, config, context, scaled: bool = False) -> optax.GradientTransformation:
    """The optimizer whose change at x_n is s_n Delta_n, Delta_n being the learner's point.

    The first point is 0. Gradients are clipped and then weighed. A factor s drawn from the exponential
    distribution gives the weight 1, from the uniform one 2 - s. With `scaled`, points are multiplied by the
    scheduled rate, for learners that have no use for it.
    """
    weighs = config.importance_sampling and config.random_scaling == "uniform"

    def init(params) -> OnlineState:
        one = jnp.float32(1)
        logged = {"point_norm": jnp.float32(0), "random_scaling": one, "importance_weight": one}
        return OnlineState(learner.init(params), logged)

    def update(gradients, state: OnlineState, params, *, step, **extra_args):
        rate = context.schedule(step)
        weighed = jax.tree.map(lambda g: state.logged["importance_weight"] * g, gradients)
        point, inner_state = learner.update(weighed, state.learner, rate)
        factor = draw(config.random_scaling, jax.random.fold_in(jax.random.wrap_key_data(context.key), step))
        length = factor * (rate if scaled else 1.0)
        updates = context.decay_updates(jax.tree.map(lambda p: length * p, point), params, step)
        weight = 2 - factor if weighs else jnp.float32(1)
        logged = {"point_norm": optax.tree.norm(point), "random_scaling": factor, "importance_weight": weight}
        return updates, OnlineState(inner_state, logged)

    return optax.chain(context.clip(), optax.GradientTransformationExtraArgs(init, update))


def draw(scaling: str, key: jax.Array) -> jax.Array:
    """A factor of mean 1."""
    if scaling == "none":
        return jnp.float32(1)
    return jax.random.exponential(key) if scaling == "exponential" else jax.random.uniform(key, maxval=2.0)


def project(tree: dict, radius: float) -> dict:
    """The nearest point of a ball around 0; radius 0: the point itself."""
    if not radius:
        return tree
    factor = jnp.minimum(1.0, radius / jnp.maximum(optax.tree.norm(tree), jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda x: factor * x, tree)


def unit(tree: dict) -> dict:
    """The tree divided by its norm; 0 where that is 0."""
    norm = optax.tree.norm(tree)
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda x: inverse * x, tree)


def mean_weights(config) -> tuple[float, float]:
    """What the past and a new gradient weigh in their mean; with discount 1, in their sum."""
    return (config.discount, 1 - config.discount) if config.discount < 1 else (1.0, 1.0)
