"""Follow the regularized leader as an optimizer, with |Delta|^2 / 2 as regularizer, in a ball if asked for.

Shalev-Shwartz 2012, Online Learning and Online Convex Optimization, section 2.2; losses discounted as in
Ahn, Zhang, Kook & Dai 2024, arXiv 2402.01567.
"""

import jax
import optax

from trainit.config import ConfigDict
from trainit.transforms import online

ELEMENTWISE = True


def get_config() -> ConfigDict:
    return online.get_config(learning_rate=0.01, discount=0.9, radius=0.0)


def make(config, context):
    """Delta = argmin of rate * sum_s discount^(t-s) <g_s, Delta> + |Delta|^2 / 2 over |Delta| <= radius."""

    def update(gradients, total, rate):
        total = jax.tree.map(lambda s, g: config.discount * s + g, total, gradients)
        return online.project(jax.tree.map(lambda s: -rate * s, total), config.radius), total

    return online.to_optimizer(online.Learner(optax.tree.zeros_like, update), config, context)
