"""Parameter-free mirror descent as an optimizer: after Jacobsen & Cutkosky 2022, arXiv 2203.00444.

For a step eta the regularizer is psi(w) = 2/eta * integral of ln(x/alpha + 1) dx from 0 to |w|, around 0,
with an alpha that falls as gradients come, and 2 eta |g|^2 |w| is added to each loss. The next point is

    argmin <g, w> + psi_new(w) - <grad psi_old(w_old), w> + 2 eta |g|^2 |w|
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.parallel.trees import inner_product
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1.0)
    config.eps = field(10.0, "scale of the point before the first gradient", above=0)
    config.lipschitz = field(1.0, "bound G of the gradient's norm, to which larger ones are clipped", above=0)
    config.num_grids = field(4, "learners, with steps 1/G, 1/2G, ...; each takes a copy's memory", above=0)
    return config


class MirrorState(NamedTuple):
    squares: jax.Array  # float32: 4 G^2 and the sum of |g|^2
    points: tuple  # of each step


def learner(eps: float, lipschitz: float, num_grids: int = 1) -> online.Learner:
    """Of all parameters together, with `num_grids` steps, each half of the one before, that share `eps`."""

    def alpha(squares):
        return eps / num_grids * lipschitz**2 / (squares * jnp.log(squares / lipschitz**2) ** 2)

    def init(params) -> MirrorState:
        return MirrorState(jnp.float32(4 * lipschitz**2), (optax.tree.zeros_like(params),) * num_grids)

    def step(eta, w, g, square, old, new):
        """The minimum's gradient of psi is `theta` less 2 eta |g|^2 of its norm; |w| follows from that."""
        slope = 2 / eta * jnp.log1p(optax.tree.norm(w) / old)
        theta = jax.tree.map(lambda u, g: slope * u - g, online.unit(w), g)
        length = jnp.maximum(optax.tree.norm(theta) - 2 * eta * square, 0.0)
        return jax.tree.map(lambda u: new * jnp.expm1(eta / 2 * length) * u, online.unit(theta))

    def update(gradients, state: MirrorState, rate):
        g = online.project(gradients, lipschitz)
        square = inner_product(g, g)
        squares = state.squares + square
        old, new = alpha(state.squares), alpha(squares)
        points = tuple(step(2.0**-i / lipschitz, w, g, square, old, new) for i, w in enumerate(state.points))
        return jax.tree.map(lambda *parts: sum(parts), *points), MirrorState(squares, points)

    return online.Learner(init, update)


def make(config, context):
    """The learning rate multiplies the point: 1 leaves it as it is."""
    whole = learner(config.eps, config.lipschitz, config.num_grids)
    return online.to_optimizer(whole, config, context, scaled=True)
