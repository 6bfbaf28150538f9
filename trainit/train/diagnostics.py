"""Statistics of the trajectory, measured inside the train step.

x_n are the parameters at which step n takes its gradient g_n (the batch's mean, before clipping), u_n is the
update that it makes of it, and d_n = x_n - x_{n-1}. What is kept from step to step is split over the devices
as the parameters are.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainit import optimizers
from trainit.checkpoints.state import TrainState
from trainit.config import Config, require
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind
from trainit.parallel.trees import device_bytes, inner_product, path_name
from trainit.train.gradients import LossAndGradient

NOISE = "noise/trace", "noise/gradient_square"  # means of both are kept; their ratio is the noise scale
NOISE_DECAY = 0.99  # of these means
POWERS = -32, 8  # of two: histograms' finest and coarsest edges
# Metrics whose sum over the measured steps is reported too.
SUMMED = "moved/dot_grad", "moved/dot_grad_unscaled", "moved/dot_last_grad", "loss/difference"


class Now(NamedTuple):
    """What a step knows when it measures."""

    params: dict  # x_n
    gradients: dict  # g_n
    updates: dict  # u_n
    loss: jax.Array  # f(x_n, z_n)
    loss_at: Callable[[dict], jax.Array]  # f(., z_n), with the same dropout
    micro_square: jax.Array | None  # mean of |gradient of a micro-step|^2, if noise_scale asks for it
    batches: tuple[int, int]  # sequences of a micro-step, and of the batch
    factor: jax.Array | None  # by which the optimizer has multiplied d_n, if it draws one


def check(config: Config, parameters: dict, micro_steps: int):
    """Raises ConfigError if something that the config asks for cannot be measured on these parameters."""
    if not config.every_steps:
        return
    alone = "diagnostics.noise_scale=True compares the gradients of several micro-steps, but a step has"
    require(not config.noise_scale or micro_steps > 1, f"{alone} {micro_steps}; lower device_batch_size")
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(parameters)]
    if config.spectra:
        wrong = f"diagnostics.spectra={config.spectra!r} is no matrix's path"
        require(any(_is_chosen(config, path) for path in paths), f"{wrong}; paths are {', '.join(paths)}")
    if config.histograms:
        wrong = f"diagnostics.histograms={config.histograms!r} is no parameter's path"
        is_right = any(re.fullmatch(config.histograms, path) for path in paths)
        require(is_right, f"{wrong}; paths are {', '.join(paths)}")


def is_due(config: Config, step: int | jax.Array) -> bool | jax.Array:
    """Whether step number `step` is measured; the first step is 1."""
    return config.every_steps > 0 and step % config.every_steps == 0


def _copies(config: Config) -> list[str]:
    """The names of what is kept that is as large as the parameters."""
    asked = config.last_gradient, config.past_gradients, config.last_parameters
    return list(itertools.compress(("last_gradient", "past_gradients", "last_parameters"), asked))


def init(config: Config, params: dict) -> dict:
    """What is kept from step to step, before the first one: copies nested as the parameters, and sums."""
    if not config.every_steps:
        return {}
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = {"last_gradient": zeros, "past_gradients": zeros, "last_parameters": params}
    state = {name: first[name] for name in _copies(config)}
    return state | {"sums": {name: jnp.float32(0) for name in SUMMED + NOISE * config.noise_scale}}


def describe(config: Config, abstract: dict) -> str:
    """When diagnostics are measured, and the device memory of what `init` gives; "" if they are off."""
    if not config.every_steps:
        return ""
    kept = f"{', '.join(_copies(config)) or 'no copies'}: {device_bytes(abstract) / 2**20:.1f} MiB"
    return f"every {config.every_steps} steps; keeps {kept} on each device"


def measure_step(
    loss_and_gradient: LossAndGradient,
    state: TrainState,
    batch: dict,
    gradients: dict,
    updates: dict,
    sums: dict,
    good: jax.Array,
) -> tuple[dict[str, jax.Array], dict]:
    """What `measure` returns for a step that takes these gradients at the state's parameters."""
    config = loss_and_gradient.config.diagnostics
    if not config.every_steps:
        return {}, {}

    def loss_at(params: dict) -> jax.Array:
        elsewhere = loss_and_gradient.loss_sums(params, batch, state.step)
        return elsewhere["loss"] / jnp.maximum(elsewhere["count"], 1)

    micro_steps, rows = batch["lengths"].shape
    now = Now(
        params=state.params,
        gradients=gradients,
        updates=updates,
        loss=sums["loss"] / jnp.maximum(sums["count"], 1),
        loss_at=loss_at,
        micro_square=sums["square"] / micro_steps if "square" in sums else None,
        batches=(rows, micro_steps * rows),
        factor=optimizers.logged(state.opt_state).get("optimizer/random_scaling"),
    )
    return measure(config, state.diagnostics, now, state.step + 1, good)


def measure(
    config: Config, state: dict, now: Now, step: jax.Array, good: jax.Array
) -> tuple[dict[str, jax.Array], dict]:
    """The metrics of a step, 0 between measurements, and what is kept: the old state if it was not `good`."""

    def measured() -> tuple[dict, dict]:
        values = _measure(config, state, now)
        sums = state["sums"] | {name: state["sums"][name] + values[name] for name in SUMMED if name in values}
        if config.noise_scale:
            for name in NOISE:
                sums[name] = NOISE_DECAY * sums[name] + (1 - NOISE_DECAY) * values[name]
            values["noise/scale"] = sums["noise/trace"] / sums["noise/gradient_square"]
        values |= {f"{name}_sum": sums[name] for name in SUMMED if name in values}
        return values, sums

    def nothing() -> tuple[dict, dict]:
        shapes, _ = jax.eval_shape(measured)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), state["sums"]

    # The first branch alone computes anything; copies and sums of gradients are kept in every step.
    values, sums = jax.lax.cond(is_due(config, step), measured, nothing)
    new = {"sums": sums, "last_gradient": now.gradients, "last_parameters": now.params}
    if "past_gradients" in state:
        new["past_gradients"] = jax.tree.map(jnp.add, state["past_gradients"], now.gradients)
    kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), {name: new[name] for name in state}, state)
    return values, kept


def _measure(config: Config, state: dict, now: Now) -> dict[str, jax.Array]:
    values: dict[str, jax.Array] = {}
    if config.norms:
        for name, tree in (("params", now.params), ("grads", now.gradients), ("updates", now.updates)):
            values |= {f"{name}/{norm}": value for norm, value in _norms(tree, config.norms_by).items()}
        for name in [name for name in values if name.startswith("updates/l2")]:
            own = values[name.replace("updates", "params", 1)]  # 0 of biases at the start
            values[name.replace("l2", "ratio", 1)] = values[name] / jnp.where(own > 0, own, jnp.inf)
    g, last_g = now.gradients, state.get("last_gradient")
    for name, past in (("last", last_g), ("past", state.get("past_gradients"))):
        if past is not None:
            values |= {f"grads/dot_{name}": inner_product(g, past), f"grads/cos_{name}": _cosine(g, past)}
    if "last_parameters" in state:
        values |= _moved(state["last_parameters"], last_g, now)
        if config.last_loss:
            values["loss/difference"] = now.loss - now.loss_at(state["last_parameters"])
    if config.spectra:
        values |= _spectra(config, now.params)
    if config.histograms:
        for name, tree in (("params", now.params), ("grads", now.gradients), ("updates", now.updates)):
            for path, leaf in jax.tree.leaves_with_path(tree):
                if re.fullmatch(config.histograms, path_name(path)):
                    values[f"histogram/{name}/{path_name(path)}"] = _histogram(leaf)
    if config.noise_scale:
        values |= _noise(now)
    return values


def _moved(last: dict, last_gradient: dict | None, now: Now) -> dict[str, jax.Array]:
    """Inner products and cosines of d_n with gradients and updates."""
    moved = jax.tree.map(jnp.subtract, now.params, last)
    # "Unscaled" is without the random factor by which the optimizer has multiplied d_n.
    scale = 1.0 if now.factor is None else 1 / now.factor
    values = {
        "params/cos_last": _cosine(now.params, last),
        "moved/l2": jnp.sqrt(inner_product(moved, moved)),
        "moved/dot_grad": inner_product(now.gradients, moved),
        "moved/cos_grad": _cosine(now.gradients, moved),
        "moved/cos_update": _cosine(now.updates, moved),
    }
    if now.factor is not None:
        values["moved/dot_grad_unscaled"] = scale * values["moved/dot_grad"]
    if last_gradient is not None:
        values["moved/dot_last_grad"] = scale * inner_product(last_gradient, moved)
        values["moved/cos_last_grad"] = _cosine(last_gradient, moved)
    return values


def _cosine(a: dict, b: dict) -> jax.Array:
    """The cosine between two trees; 0 if one of them is 0."""
    lengths = jnp.sqrt(inner_product(a, a)) * jnp.sqrt(inner_product(b, b))
    return jnp.where(lengths > 0, inner_product(a, b) / jnp.where(lengths > 0, lengths, 1.0), 0.0)


def _norms(tree: dict, groupings: tuple[str, ...]) -> dict[str, jax.Array]:
    """{"l2": ..., "l1/matrix": ..., "max/layer_0": ...}: l1, l2, and max, the largest absolute value."""
    groups: dict[str, list] = {}
    for name, layers in _layers(tree):
        axes, size = tuple(range(1, layers.ndim)), jnp.abs(layers)
        parts = jnp.sum(size * size, axes), jnp.sum(size, axes), jnp.max(size, axes)
        for group, chosen in _groups(name, len(layers), groupings):
            groups.setdefault(group, []).append([part[chosen] for part in parts])
    values = {}
    for group, members in groups.items():
        squares, sums, maxima = (jnp.concatenate(part) for part in zip(*members, strict=True))
        values[f"l2{group}"] = jnp.sqrt(jnp.sum(squares))
        values[f"l1{group}"], values[f"max{group}"] = jnp.sum(sums), jnp.max(maxima)
    return values


def _layers(tree: dict) -> Iterator[tuple[str, jax.Array]]:
    """The path of each parameter and its layers (n, ...); n is 1 if it is not stacked."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        yield name, leaf if is_stacked(name) else leaf[None]


def _end(path: str, layer: int) -> str:
    """The end of the name of a metric of one parameter in one layer."""
    return f"/{path}/{layer}" if is_stacked(path) else f"/{path}"


def _groups(path: str, layers: int, groupings: tuple[str, ...]) -> Iterator[tuple[str, slice]]:
    """The groups that layers of a parameter belong to: the end of the metric's name, and which layers."""
    yield "", slice(None)
    if "kind" in groupings:
        yield f"/{parameter_kind(path)}", slice(None)
    for layer in range(layers):
        if "layer" in groupings and is_stacked(path):
            yield f"/layer_{layer}", slice(layer, layer + 1)
        if "parameter" in groupings:
            yield _end(path, layer), slice(layer, layer + 1)


def _is_chosen(config: Config, path: str) -> bool:
    return parameter_kind(path) != "vector" and re.fullmatch(config.spectra, path) is not None


def _spectra(config: Config, params: dict) -> dict[str, jax.Array]:
    """Largest singular value, and effective rank, of each layer's matrix, one layer at a time.

    The effective rank is exp of the entropy of the singular values over their sum: Roy & Vetterli 2007.
    """
    values = {}
    for name, layers in _layers(params):
        if not _is_chosen(config, name):
            continue
        shape = matrix_shape(name, layers.shape[1:])

        def one(matrix, shape=shape):
            s = jnp.linalg.svd(matrix.reshape(shape), compute_uv=False)
            p = s / jnp.maximum(jnp.sum(s), jnp.finfo(jnp.float32).tiny)
            return s[0], jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))

        norms, ranks = jax.lax.map(one, layers)
        for layer in range(len(layers)):
            end = _end(name, layer)
            values[f"spectral/norm{end}"], values[f"spectral/rank{end}"] = norms[layer], ranks[layer]
    return values


def histogram_edges() -> np.ndarray:
    """The edges (83,) of the bins (82) of all histograms: -2^8, ..., -2^-32, 0, 2^-32, ..., 2^8.

    An edge belongs to the bin that is farther from 0. The first and the last bin have what lies beyond, too.
    """
    powers = 2.0 ** np.arange(POWERS[0], POWERS[1] + 1)
    return np.concatenate([-powers[::-1], [0.0], powers])


def _histogram(values: jax.Array) -> jax.Array:
    """How many of the values, of float32, lie in each bin; NaN lies in none."""
    # Bins are powers of two, so that a value's exponent is its bin.
    low, high = POWERS
    exponents = (jax.lax.bitcast_convert_type(values, jnp.uint32) >> 23 & 255).astype(jnp.int32) - 127
    size, half = jnp.clip(exponents - low + 1, 0, high - low), high - low + 1
    bins = jnp.where(values < 0, half - 1 - size, half + size)
    bins = jnp.where(jnp.isnan(values), 2 * half, bins).astype(jnp.uint8)
    count = {"cpu": _count_one_by_one, "default": _count_bin_by_bin}
    return jax.lax.platform_dependent(bins, **{name: partial(each, 2 * half) for name, each in count.items()})


def _count_one_by_one(number: int, bins: jax.Array) -> jax.Array:
    return jnp.zeros(number, jnp.uint32).at[bins].add(1, mode="drop")


def _count_bin_by_bin(number: int, bins: jax.Array) -> jax.Array:
    """The same. A GPU that counted one by one would have all its threads wait for the same few counters."""
    return jax.lax.map(lambda k: jnp.sum(bins == k, dtype=jnp.uint32), jnp.arange(number))


def _noise(now: Now) -> dict[str, jax.Array]:
    """The trace of a sequence's gradient covariance, and the square of the true gradient's norm.

    Unbiased, from the squares of gradients of one micro-step and of the batch: McCandlish et al. 2018,
    arXiv 1812.06162, appendix A.1. Their ratio is the batch size, in sequences, beyond which more help less.
    """
    assert now.micro_square is not None
    small, large = now.batches
    whole = inner_product(now.gradients, now.gradients)
    return {
        "noise/gradient_square": (large * whole - small * now.micro_square) / (large - small),
        "noise/trace": (now.micro_square - whole) / (1 / small - 1 / large),
    }
