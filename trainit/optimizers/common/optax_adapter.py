"""Any optimizer of optax by its import path, such as optax.lion or optax.contrib.prodigy.

Its config's fields are the function's parameters whose defaults are numbers, texts or tuples of
them. A function of the name scale_by_..., without `learning_rate`, is a direction for
`context.descend`. Where it has `weight_decay`, decay is its own, with our mask if it takes one;
else ours. Optax sees layers as they are stored, stacked: a rule that looks at the shape or the norm
of an array, such as that of optax.lamb, takes those of all layers together for one.
"""

import importlib
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trainit.config import ConfigError, require

LEARNING_RATE = 1e-3  # where the function has no default
MASKS = {"mask", "weight_decay_mask"}  # parameters that say what decays: our mask
REFUSED = {
    "optax.adafactor": "it takes stacked layers for one array; take optimizer=adafactor",
    "optax.contrib.muon": "it takes stacked layers for something else than matrices; take optimizer=muon",
    "optax.contrib.schedule_free": "it wants validation elsewhere; take optimizer=schedule_free+NAME",
}
# Whose updates have matrix products: optax's own solvers, and inner products over all parameters.
MATRIX_PRODUCTS = {
    "optax.scale_by_lbfgs",
    "optax.contrib.dadapt_adamw",
    "optax.contrib.galore",
    "optax.contrib.prodigy",
    "optax.contrib.scale_by_galore",
}


class Wrapped:
    """A function of optax with the two functions of an optimizer's file."""

    def __init__(self, name: str, function: Callable):
        self._name, self._function = name, function
        self._parameters = inspect.signature(function).parameters
        self.ELEMENTWISE = name not in MATRIX_PRODUCTS

    def _default(self, parameter: str, otherwise: float) -> float:
        default = self._parameters[parameter].default if parameter in self._parameters else None
        return float(default) if isinstance(default, int | float) and type(default) is not bool else otherwise

    def get_config(self) -> ConfigDict:
        config = ConfigDict({"name": self._name})
        for parameter in self._parameters.values():
            if _is_simple(parameter.default) and parameter.name not in MASKS:
                config[parameter.name] = parameter.default
        with config.ignore_type():  # learning rates and decays are floats, whatever stands there
            config.learning_rate = self._default("learning_rate", LEARNING_RATE)
            config.weight_decay = self._default("weight_decay", 0.0)
        return config

    def make(self, config, context) -> optax.GradientTransformation:
        common = ("name", "learning_rate", "weight_decay")
        fields = {field: value for field, value in config.items() if field not in common}
        optimizer = self._complete(fields, config, context)
        try:
            jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p, step=0), context.parameters)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"optimizer={self._name} needs more than gradients and parameters: {error}; call it in a "
                f"file of your own: optimizer=path/to/mine.py"
            ) from None
        return optimizer

    def _complete(self, fields: dict, config, context) -> optax.GradientTransformation:
        if "learning_rate" not in self._parameters:
            return context.descend(self._function(**fields))
        decays = "weight_decay" in self._parameters
        if decays:
            fields = fields | {"weight_decay": context.weight_decay}
            masks = MASKS & set(self._parameters)
            fields |= dict.fromkeys(masks, context.decay_mask)
        optimizer = _at_the_runs_rate(
            lambda rate: self._function(learning_rate=rate, **fields), config.learning_rate, context.schedule
        )
        own = () if decays else (decay_updates(context),)
        return optax.chain(context.clip(), optimizer, *own)


def load(name: str) -> Wrapped:
    """The function with this import path. Raises ConfigError if it cannot be an optimizer."""
    for refused, reason in REFUSED.items():
        require(not name.startswith(refused), f"optimizer={name}: {reason}")
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ConfigError(f"optimizer={name}: {module} of this version has no {attribute}") from None
    is_function = callable(function) and not inspect.isclass(function)
    require(is_function, f"optimizer={name} is not a function that makes an optimizer")
    parameters = inspect.signature(function).parameters
    require(
        "learning_rate" in parameters or attribute.startswith("scale_by_"),
        f"optimizer={name} takes no learning_rate and is no scale_by_...; call it in a file of your own: "
        f"optimizer=path/to/mine.py",
    )
    needed = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.name != "learning_rate"
    ]
    require(
        not needed,
        f"optimizer={name} needs {', '.join(needed)}, which a config cannot give; call it in a file of your "
        f"own: optimizer=path/to/mine.py",
    )
    return Wrapped(name, function)


def _is_inexact(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _is_simple(value) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_simple, value))
    return isinstance(value, bool | int | float | str)


def _at_the_runs_rate(make: Callable, peak: float, schedule) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `make(rate)` gives, made again in each step with the scheduled rate.

    Args:
        make: rate -> optimizer; the rate is traced.
        peak: the rate with which the state is made.
        schedule: step -> rate.
    """

    def update(updates, state, params=None, *, step, **extra_args):
        rate = schedule(step)
        optimizer = optax.with_extra_args_support(make(rate))
        new = optimizer.update(updates, state, params, **extra_args)
        # Some divide by the rate, which a warm-up begins with 0: nothing is done then.
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new) if _is_inexact(leaf)]
        good = (rate > 0) | jnp.all(jnp.array(finite))
        old = jax.tree.map(jnp.zeros_like, updates), state
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    return optax.GradientTransformationExtraArgs(make(peak).init, update)


def decay_updates(context) -> optax.GradientTransformationExtraArgs:
    """Adds -rate * weight_decay * parameters to finished updates, where `decay_mask` says so."""

    def update(updates, state, params=None, *, step, **extra_args):
        del extra_args
        shrink = context.schedule(step) * context.weight_decay
        decayed = jax.tree.map(
            lambda u, p, masked: u - shrink * p if masked else u, updates, params, context.decay_mask
        )
        return decayed, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
