"""The train state, and the keys of a run's random numbers."""

import zlib
from dataclasses import dataclass

import jax
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes; a checkpoint holds all of it."""

    step: jax.Array  # int32: steps done, including those whose update was skipped
    params: dict  # float32, nested by path: {"blocks": {"mlp": {"up": {"kernel": ...}}}}
    opt_state: optax.OptState
    skipped: jax.Array  # int32: updates skipped because something was not finite, or a spike
    skipped_in_a_row: jax.Array  # int32: since the last good step, unless the loss scale was lowered
    diagnostics: dict  # see `diagnostics.init`; empty without diagnostics
    loss_scale: dict  # see `loss_scale.init`; empty unless something computes in float16
    spikes: dict  # see `spikes.init`; empty unless spikes are left out


def named_key(seed: int, name: str) -> jax.Array:
    """A run's random key for one purpose, such as "dropout"; those of different names are independent."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
