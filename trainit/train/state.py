"""The train state: everything that a train step changes, created on the devices that keep it."""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trainit.config import Config
from trainit.model.gpt import GPT
from trainit.optimizers import Optimizer
from trainit.parallel.layout import state_shardings
from trainit.train import diagnostics, loss_scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes; a checkpoint holds all of it."""

    step: jax.Array  # int32: steps done, including those whose update was skipped
    params: dict  # float32, nested by path: {"blocks": {"mlp": {"up": {"kernel": ...}}}}
    opt_state: optax.OptState
    skipped: jax.Array  # int32: updates skipped because something was not finite
    skipped_in_a_row: jax.Array  # int32: since the last good step, unless the loss scale was lowered
    diagnostics: dict  # see `diagnostics.init`; empty without diagnostics
    loss_scale: dict  # see `loss_scale.init`; empty unless something computes in float16


def named_key(seed: int, name: str) -> jax.Array:
    """A random key of the run for one purpose, such as "parameters" or "dropout".

    Keys of different names are independent: a new use of randomness does not change the others.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


@dataclass(frozen=True)
class StateFactory:
    """Creates train states. Its methods are meant to be jitted with the shardings that `layout` gives.

    So each device computes its own shards, and no array of the model's size exists in one place.
    """

    config: Config
    model: GPT
    optimizer: Optimizer

    def init(self) -> TrainState:
        """The state before the first step, from the config's seed."""
        params = self.model.init(named_key(self.config.seed, "parameters"))
        zero = jnp.zeros((), jnp.int32)
        kept, scale = self.begin_diagnostics(params), self.begin_loss_scale()
        return TrainState(zero, params, self.optimizer.init(params), zero, zero, kept, scale)

    def begin_diagnostics(self, params: dict) -> dict:
        """The state's field `diagnostics` for a run that has these parameters when its diagnostics begin."""
        return diagnostics.init(self.config.diagnostics, params)

    def begin_loss_scale(self) -> dict:
        """The state's field `loss_scale` at its start."""
        return loss_scale.init("float16" in (self.config.precision, *self.config.precision_of.values()))

    def layout(self, mesh: Mesh) -> tuple[TrainState, TrainState]:
        """The shardings of a state's arrays, and their shapes and types with these shardings."""
        shapes = jax.eval_shape(self.init)
        shardings = state_shardings(shapes, shapes.params, mesh)
        return shardings, jax.tree.map(lambda leaf, layout: leaf.update(sharding=layout), shapes, shardings)
