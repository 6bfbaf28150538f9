"""Optimizers: each is one file here with two functions, found by the file's name.

def get_config() -> ConfigDict                       # name, learning_rate, weight_decay, its own
def make(config, context) -> optax.GradientTransformation
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trainit import sharding
from trainit.config import Config, ConfigError
from trainit.schedules import Schedule


def choices() -> Mapping[str, Callable[[], ConfigDict]]:
    """Every optimizer's name and what makes its config: the group for `config.choose`."""
    return {
        module.name: lambda name=module.name: _load(name).get_config()
        for module in pkgutil.iter_modules(__path__)
    }


def _load(name: str):
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True)
class Context:
    """What an optimizer may want to know of the run that it serves."""

    schedule: Schedule  # step -> learning rate
    steps: int  # of the whole run
    parameters: dict  # shapes and dtypes, as nested as the parameters
    weight_decay: float
    clip_norm: float  # 0: no clipping
    key: jax.Array  # for the optimizer's own randomness

    @property
    def decay_mask(self) -> dict:
        """True where weights decay: matrices, embeddings and the head; not biases and norms' scales."""
        return jax.tree.map_with_path(
            lambda path, _: sharding.kind(sharding.path_name(path)) != "vector", self.parameters
        )

    def descend(self, direction: optax.GradientTransformation) -> optax.GradientTransformation:
        """Completes a direction to an optimizer.

        The gradient is clipped by its global norm, goes through `direction`, gets
        weight_decay * parameters added where `decay_mask` says so (Loshchilov & Hutter 2017,
        arXiv 1711.05101), and is multiplied by minus the scheduled learning rate.
        """
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            direction,
            optax.add_decayed_weights(self.weight_decay, self.decay_mask),
            scale_by_minus(self.schedule),
        )


def scale_by_minus(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -schedule(step), `step` being the run's and not a count of its own.

    A skipped update therefore does not shift the schedule.
    """

    def update(updates, state, params=None, *, step, **extra_args):
        del params, extra_args
        rate = -schedule(step)
        return jax.tree.map(lambda u: (rate * u.astype(jnp.float32)).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def build(config: Config, context: Context) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.name` names. Its update takes `step`, the run's, beside the gradients.

    Raises:
        ConfigError: there is none of this name, or it has other fields.
    """
    there = choices()
    if config.name not in there:
        raise ConfigError(f"optimizer.name={config.name!r}: there are {', '.join(sorted(there))}")
    fields = sorted(there[config.name]())
    if fields != sorted(config):
        raise ConfigError(
            f"optimizer.name={config.name} has the fields {', '.join(fields)}, not "
            f"{', '.join(sorted(config))}; choose it as a group: --config=FILE:optimizer={config.name}"
        )
    return optax.with_extra_args_support(_load(config.name).make(config, context))
