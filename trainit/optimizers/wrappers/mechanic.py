"""Mechanic, which learns the learning rate's scale: Cutkosky, Defazio & Mehta 2023, arXiv 2306.00144.

It is optax's. The schedule gives the shape.
"""

import optax
import optax.contrib
from ml_collections import ConfigDict

from trainit.optimizers.common._bounds import above_0, not_below_0

ELEMENTWISE = False  # an inner product of optax is a matrix product


def get_config(base: ConfigDict) -> ConfigDict:
    base.learning_rate = 1.0  # peak of the schedule: multiplies the learned scale; >= 0
    base.mechanic = ConfigDict()
    base.mechanic.decay = (
        0.01  # of its own: times the scale, and the gradient's over the parameters' norm; >= 0
    )
    base.mechanic.eps = 1e-8  # added to what it divides by; > 0
    base.mechanic.start = 1e-6  # the scale at the beginning; > 0
    base.mechanic.num_betas = 6  # memories of 1 - 0.1, 1 - 0.01, ... that it adds up; > 0
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """x_0 + s times what the other optimizer has done until now, the scale s being learned."""
    above_0(config, "start", "num_betas", within="optimizer.mechanic")
    not_below_0(config, "decay", within="optimizer.mechanic")
    return optax.contrib.mechanize(
        make_base(context), config.decay, config.eps, config.start, config.num_betas
    )
