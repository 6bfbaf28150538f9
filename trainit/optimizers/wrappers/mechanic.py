"""Mechanic, which learns the learning rate's scale: Cutkosky, Defazio & Mehta 2023, arXiv 2306.00144.

It is optax's. The schedule gives the shape.
"""

import optax
import optax.contrib

from trainit.config import ConfigDict, field

ELEMENTWISE = False  # an inner product of optax is a matrix product


def get_config(base: ConfigDict) -> ConfigDict:
    base.learning_rate = field(1.0, "peak of the schedule: multiplies the learned scale", at_least=0)
    base.mechanic = field(ConfigDict(), "settings of Mechanic")
    base.mechanic.decay = field(0.01, "decay of the scale, times |gradient| / |parameters|", at_least=0)
    base.mechanic.eps = field(1e-8, "added to the divisor", above=0)
    base.mechanic.start = field(1e-6, "the scale at the beginning", above=0)
    base.mechanic.num_betas = field(6, "learners with decays 0.9, 0.99, ..., whose scales are added", above=0)
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """x_0 + s times what the other optimizer has done until now, the scale s being learned."""
    c = config
    return optax.contrib.mechanize(make_base(context), c.decay, c.eps, c.start, c.num_betas)
