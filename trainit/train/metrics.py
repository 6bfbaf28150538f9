"""What a run says of itself: norms, FLOPs, MFU, throughput, memory."""

import resource
import sys
import time

import jax
import numpy as np

from trainit import __version__
from trainit.cluster.hardware import peak_flops
from trainit.config import Config
from trainit.parallel.trees import total_bytes


def parameter_count(parameters: dict) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))


def facts(model: Config, state) -> dict:
    """What a run is made of, for its run.json and those who compare runs.

    Args:
        model: the sub-config.
        state: the train state's arrays, or their shapes.
    """
    return {
        "parameters": parameter_count(state.params),
        "flops_per_token": flops_per_token(model),
        "parameters_bytes": total_bytes(state.params),
        "optimizer_bytes": total_bytes(state.opt_state),  # on all devices together, replicas counted once
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "versions": f"Trainit {__version__}, JAX {jax.__version__}",
    }


def flops_per_token(model: Config) -> float:
    """Model FLOPs of forward and backward pass per token: 6 * weights in matrix products + attention.

    Attention is 12 * N * L * D, not halved for causality (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B). Embedding look-ups, norms, recomputation and the optimizer do not count.
    """
    head_size = model.dim // model.num_heads
    attention = 2 * model.dim * head_size * (model.num_heads + model.num_kv_heads)
    mlp = (3 if model.activation == "swiglu" else 2) * model.dim * model.mlp_dim
    weights = model.num_blocks * (attention + mlp) + model.dim * model.vocab_size
    return 6.0 * weights + 12.0 * model.num_blocks * model.context_length * model.dim


class Meter:
    """Turns the times of finished steps into time/, throughput/ and memory/ metrics.

    The first step, which compiles, counts for nothing, nor does time given to `pause`.
    """

    def __init__(self, model: Config):
        self._length, self._flops = model.context_length, flops_per_token(model)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._last: float | None = None
        self._data = 0.0

    def waited_for_data(self, seconds: float):
        self._data += seconds

    def pause(self):
        """Something other than a step has taken time: the next step's time is not measured."""
        self._last = None

    def step(self, batch_size: int) -> dict[str, float]:
        """To be called when a step of so many sequences has finished; its metrics since the step before."""
        now, last, data = time.perf_counter(), self._last, self._data
        self._last, self._data = now, 0.0
        metrics = {"memory/peak_gib": peak_memory() / 2**30}
        if last is None:
            return metrics
        seconds, tokens = now - last, batch_size * self._length
        metrics["time/step_seconds"] = seconds
        metrics["time/data_fraction"] = min(data / seconds, 1.0)
        metrics["throughput/tokens_per_second"] = tokens / seconds
        if self._peak:
            metrics["throughput/mfu"] = self._flops * tokens / seconds / self._peak
        return metrics


def peak_memory() -> int:
    """Most bytes in use so far on this process's fullest device, or in the process where none says."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
