"""Sharpness-aware minimization: the gradient is taken where the loss is larger. Foret et al. 2021.

arXiv 2010.01412; adaptive: Kwon et al. 2021, arXiv 2102.11600. A step costs two gradients.
"""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field

NEEDS = {"gradient_at"}
ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    base.sam = field(ConfigDict(), "settings of SAM")
    base.sam.rho = field(0.05, "distance, over all parameters, to where the gradient is taken", above=0)
    base.sam.adaptive = field(False, "measure the distance in units of the parameters' absolute values")
    return base


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """The other optimizer for the gradient at x + e, e = rho g / |g|; adaptive: rho x^2 g / |x g|."""
    base = make_base(context)

    def update(gradients, state, params, *, step, gradient_at, **extra_args):
        scale = jax.tree.map(jnp.abs if config.adaptive else jnp.ones_like, params)
        ascent = jax.tree.map(jnp.multiply, scale, gradients)
        length = config.rho / jnp.maximum(optax.tree.norm(ascent), jnp.finfo(jnp.float32).tiny)
        there = jax.tree.map(lambda x, a, s: x + length * a * s, params, ascent, scale)
        return base.update(
            gradient_at(there), state, params, step=step, gradient_at=gradient_at, **extra_args
        )

    return optax.GradientTransformationExtraArgs(base.init, update)
