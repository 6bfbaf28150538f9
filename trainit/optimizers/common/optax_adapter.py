"""Any optimizer of optax by its import path, such as optax.lion or optax.contrib.prodigy.

Its config's fields are the function's parameters whose defaults are numbers, texts or tuples of them. A
function of the name scale_by_..., without `learning_rate`, is a direction for `context.descend`. Where it has
`weight_decay`, decay is its own, with our mask if it takes one; else ours. Optax sees layers as they are
stored, stacked: a rule for an array's shape or norm, as in optax.lamb, takes all layers together for one.
"""

import importlib
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from trainit.config import ConfigError, require

OWN_FILE = "call it in a file of your own: optimizer=path/to/mine.py"
LEARNING_RATE = 1e-3  # where the function has no default
MASKS = {"mask", "weight_decay_mask"}  # parameters that say what decays: our mask
REFUSED = {
    "optax.adafactor": "it takes stacked layers for one array; take optimizer=adafactor",
    "optax.contrib.muon": "it takes stacked layers for something else than matrices; take optimizer=muon",
    "optax.contrib.schedule_free": "it wants validation elsewhere; take optimizer=schedule_free+NAME",
}
# Whose updates have matrix products: optax's own solvers, and inner products over all parameters.
IN_CONTRIB = ("dadapt_adamw", "galore", "prodigy", "scale_by_galore")
MATRIX_PRODUCTS = {"optax.scale_by_lbfgs", *map("optax.contrib.{}".format, IN_CONTRIB)}


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
            needs = f"optimizer={self._name} needs more than gradients and parameters: {error}"
            raise ConfigError(f"{needs}; {OWN_FILE}") from None
        return optimizer

    def _complete(self, fields: dict, config, context) -> optax.GradientTransformation:
        if "learning_rate" not in self._parameters:
            return context.descend(self._function(**fields))
        decays = "weight_decay" in self._parameters
        if decays:
            masks = dict.fromkeys(MASKS & set(self._parameters), context.decay_mask)
            fields = fields | masks | {"weight_decay": context.weight_decay}
        optimizer = _at_the_runs_rate(
            lambda rate: self._function(learning_rate=rate, **fields), config.learning_rate, context.schedule
        )
        if decays:
            return optax.chain(context.clip(), optimizer)

        def decay(updates, state, params, *, step, **extra_args):
            return context.decay_updates(updates, params, step), state

        own = optax.GradientTransformationExtraArgs(optax.init_empty_state, decay)
        return optax.chain(context.clip(), optimizer, own)


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
    is_complete = "learning_rate" in parameters or attribute.startswith("scale_by_")
    require(is_complete, f"optimizer={name} takes no learning_rate and is no scale_by_...; {OWN_FILE}")
    needed = [key for key, p in parameters.items() if p.default is p.empty and key != "learning_rate"]
    message = f"optimizer={name} needs {', '.join(needed)}, which a config cannot give; {OWN_FILE}"
    require(not needed, message)
    return Wrapped(name, function)


def _is_simple(value) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_simple, value))
    return isinstance(value, bool | int | float | str)


def _at_the_runs_rate(make: Callable, peak: float, schedule) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `make(rate)` gives, made again in each step with the scheduled, traced rate."""

    def update(updates, state, params=None, *, step, **extra_args):
        rate = schedule(step)
        optimizer = optax.with_extra_args_support(make(rate))
        new = optimizer.update(updates, state, params, **extra_args)
        # Some divide by the rate, which a warm-up begins with 0: nothing is done then.
        numbers = [leaf for leaf in jax.tree.leaves(new) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        good = (rate > 0) | jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in numbers]))
        old = jax.tree.map(jnp.zeros_like, updates), state
        return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

    return optax.GradientTransformationExtraArgs(make(peak).init, update)
