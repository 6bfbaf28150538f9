"""Figures about a run and its speed: parameters, FLOPs, MFU, throughput, memory."""

import math
import time
from typing import Any

import jax

from trainit import __version__
from trainit.cluster.devices import computed_on, peak_memory
from trainit.cluster.hardware import peak_flops
from trainit.config import GATED, Config, layers_with_window
from trainit.parallel.mesh import RunShape
from trainit.parallel.trees import total_bytes
from trainit.train import diagnostics


def parameter_count(parameters: dict) -> int:
    """The number of scalars in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))


def facts(model: Config, state, shape: RunShape) -> dict:
    """What does not change in a job, for the commands that look at runs. `state`: its arrays, or shapes."""
    return {
        "parameters": parameter_count(state.params),
        "flops_per_token": flops_per_token(model),
        "parameters_bytes": total_bytes(state.params),
        "optimizer_bytes": total_bytes(state.opt_state),  # on all devices together, replicas counted once
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": f"Trainit {__version__}, JAX {jax.__version__}",
        "computed_on": computed_on(shape.sizes, shape.attention),
    }


def flops_per_token(model: Config) -> float:
    """Model FLOPs of forward and backward pass per token: 6 * weights in matrix products + attention.

    Attention is 12 * L * H * K a layer, not halved for causality (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B); a layer's window takes the place of a longer L. Embedding look-ups, norms, recomputation and
    the optimizer do not count.
    """
    attention = 2 * model.dim * model.head_dim * (model.num_heads + model.num_kv_heads)
    mlp = (3 if model.activation in GATED else 2) * model.dim * model.mlp_dim
    weights = model.num_blocks * (attention + mlp) + model.dim * model.vocab_size
    length = model.context_length
    keys = sum(min(model.window, length) if has else length for has in layers_with_window(model))
    return 6.0 * weights + 12.0 * keys * model.num_heads * model.head_dim


def numbers(config: Config, step: int, on_device: dict) -> dict[str, Any]:
    """The metrics that a step has left on the devices, for which it waits; histograms are lists of counts."""
    # Diagnostics are zeros in the steps between those in which they are measured.
    values = {name: value for name, value in on_device.items() if name != "diagnostics"}
    if diagnostics.is_due(config.diagnostics, step):
        values |= on_device["diagnostics"]
    return {name: value.tolist() for name, value in jax.device_get(values).items()}


class Meter:
    """Turns the times at which steps finish into time/, throughput/ and memory/ metrics.

    A step's time begins at the end of the step before. The first one, also after a `pause`, is not measured.
    """

    def __init__(self, model: Config):
        self._flops = flops_per_token(model)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._last: float | None = None  # when the step before finished
        self._data = 0.0  # seconds of waiting for data since then

    def waited_for_data(self, seconds: float):
        self._data += seconds

    def pause(self):
        """Leaves out the time until the next step: something else, such as validation, has taken it."""
        self._last = None

    def step(self, tokens: int) -> dict[str, float]:
        """The metrics of a step with `tokens` targets. To be called when the step has finished."""
        now, last, data = time.perf_counter(), self._last, self._data
        self._last, self._data = now, 0.0
        metrics = {"memory/peak_gib": peak_memory() / 2**30}
        if last is None:
            return metrics
        seconds = now - last
        metrics["time/step_seconds"] = seconds
        metrics["time/data_fraction"] = min(data / seconds, 1.0)
        metrics["throughput/tokens_per_second"] = tokens / seconds
        if self._peak:
            metrics["throughput/mfu"] = self._flops * tokens / seconds / self._peak
        return metrics
