"""Adaptive FTRL as an optimizer, which is Adam: Ahn, Zhang, Kook & Dai 2024, arXiv 2402.01567.

The leader of losses that grow by 1 / beta1 a step, over the root of squares that grow by 1 / beta2, is
-rate * c * m / (eps' + sqrt(v)) for Adam's moments m and v without debiasing. The three switches keep the
factors by which the exact leader differs from Adam.
"""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field, require
from trainit.transforms import online
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = online.get_config(learning_rate=1e-3, beta1=0.9, beta2=0.999)
    config.eps = field(1e-8, "added to the root of the sum of squares; fades as beta2^(t/2)", above=0)
    config.scale_exponential = field(False, "multiply by (sqrt(beta2) / beta1)^t; needs beta2 <= beta1^2")
    config.scale_learning_rate = field(False, "multiply by sqrt(1 - beta2) / (1 - beta1)")
    config.scale_eps = field(False, "multiply eps by sqrt(1 - beta2)")
    return config


def make(config, context):
    """See above; with all three switches on, Delta = -rate * S / (eps + sqrt(Q)).

    S = sum_s beta1^(1 - s) g_s and Q = sum_s beta2^(1 - s) g_s^2, s from 1 on.
    """
    beta1, beta2 = config.beta1, config.beta2
    require(
        not config.scale_exponential or 0 < beta2 <= beta1**2,
        f"optimizer.scale_exponential grows without bound for beta2={beta2} above beta1^2={beta1**2:g}",
    )

    def update(gradients, state: optax.ScaleByAdamState, rate):
        t = state.count.astype(jnp.float32)
        mu = optax.tree.update_moment(gradients, state.mu, beta1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, beta2, 2)
        factor = (jnp.sqrt(beta2) / beta1) ** t if config.scale_exponential else 1.0
        factor *= (1 - beta2) ** 0.5 / (1 - beta1) if config.scale_learning_rate else 1.0
        eps = config.eps * beta2 ** (t / 2) * ((1 - beta2) ** 0.5 if config.scale_eps else 1.0)
        tiny = jnp.finfo(jnp.float32).tiny  # eps fades away in time, and a v may be 0
        point = jax.tree.map(lambda m, v: -rate * factor * m / jnp.maximum(eps + jnp.sqrt(v), tiny), mu, nu)
        return point, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return online.to_optimizer(online.Learner(scale_by_moments().init, update), config, context)
