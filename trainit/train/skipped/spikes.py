"""Loss spikes: steps are left out whose loss or gradient norm is far above those before."""

import jax
import jax.numpy as jnp

from trainit.config import Config

Numbers = dict[str, jax.Array]  # scalars except "newest", and alike on all devices


def init(config: Config) -> Numbers:
    """What a run keeps that leaves out spikes: its newest losses and gradient norms; {} for others."""
    if not config.skip_deviations:
        return {}
    zero = jnp.int32(0)
    return {"newest": jnp.zeros((2, config.window), jnp.float32), "count": zero, "skipped": zero}


def judge(
    config: Config, state: Numbers, sums: dict, grad_norm: jax.Array, finite: jax.Array
) -> tuple[jax.Array, Numbers, Numbers]:
    """Whether a step is `finite` and no spike, what is kept after it, and its metrics.

    A spike's loss or gradient norm is above its bound: the mean of the `window` steps before, and
    `skip_deviations` of their standard deviation; infinity, while there are fewer steps. What is above
    enters as the bound: so a spike hardly raises the next bounds, and many in a row, a level that stays, do.
    """
    if not state:
        return finite, state, {}
    newest, count = state["newest"], state["count"]
    values = jnp.stack([sums["loss"] / jnp.maximum(sums["count"], 1), grad_norm])
    bounds = jnp.mean(newest, axis=1) + config.skip_deviations * jnp.std(newest, axis=1)
    bounds = jnp.where(count < config.window, jnp.inf, bounds)
    good = finite & jnp.all(values <= bounds)
    entered = newest.at[:, count % config.window].set(jnp.minimum(values, bounds))
    skipped = state["skipped"] + (finite & ~good)
    kept = {"newest": jnp.where(finite, entered, newest), "count": count + finite, "skipped": skipped}
    metrics = {"train/loss_bound": bounds[0], "train/grad_norm_bound": bounds[1]}
    return good, kept, metrics | {"train/skipped_spikes": skipped}
