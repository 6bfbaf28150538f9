"""EMA-Nesterov: gradients are taken ahead, along the mean of the changes so far. Yau et al. 2026.

arXiv 2605.25395. The defaults are those of modded-nanoGPT's track 3, as parts of a run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field

ELEMENTWISE = True


def get_config(base: ConfigDict) -> ConfigDict:
    base.ema_nesterov = field(ConfigDict(), "settings of EMA-Nesterov")
    base.ema_nesterov.lookahead = field(0.3, "how far ahead, in units of the mean change", at_least=0)
    base.ema_nesterov.decay = field(0.99, "decay of the mean change", at_least=0, below=1)
    base.ema_nesterov.start = field(0.1, "part of the run after which it begins", at_least=0, at_most=1)
    base.ema_nesterov.end = field(0.67, "part of the run after which it ends", at_least=0, at_most=1)
    return base


class EmaNesterovState(NamedTuple):
    """The parameters that the model has, and is validated at, are x, without the lookahead."""

    base: optax.OptState
    mean: dict  # of the changes of x
    ahead: jax.Array  # how far the next gradient is taken ahead

    def training_point(self, x: dict) -> dict:
        """y = x + ahead mean, where gradients are taken; parameters of other groups as they are."""
        return jax.tree.map(
            lambda x, m: x if isinstance(m, optax.MaskedNode) else x + self.ahead * m, x, self.mean
        )


def wrap(config, context, make_base) -> optax.GradientTransformation:
    """x' = y + what the other optimizer does at y = x + b m; m <- decay m + (1 - decay) (x' - x).

    b is `lookahead` between the parts `start` and `end` of the run, and 0 before and after.
    """
    base = make_base(context)

    def init(params) -> EmaNesterovState:
        return EmaNesterovState(base.init(params), optax.tree.zeros_like(params), jnp.float32(0))

    def update(gradients, state: EmaNesterovState, params, *, step, **extra_args):
        y = state.training_point(params)
        change, base_state = base.update(gradients, state.base, y, step=step, **extra_args)
        updates = jax.tree.map(lambda u, m: u + state.ahead * m, change, state.mean)
        mean = optax.tree.update_moment(updates, state.mean, config.decay, 1)
        done = (step + 1) / context.steps
        ahead = jnp.where((done >= config.start) & (done < config.end), config.lookahead, 0.0)
        return updates, EmaNesterovState(base_state, mean, ahead.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)
