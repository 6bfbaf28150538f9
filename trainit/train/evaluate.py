"""Validation: total nats over total tokens, total bits over total bytes; overall and for each subset."""

import math
import statistics
from contextlib import nullcontext

import jax
import numpy as np
from absl import logging

from trainit.cluster.monitor import JobMonitor
from trainit.config import Config
from trainit.data.dataset import Split
from trainit.data.training_data import TrainingData, validation_batches
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train.startup_timer import StartupTimer
from trainit.train.step import CompiledSteps

MAX_SUBSETS = 256  # a split with more of them is validated as a whole only


class Validation:
    """Validates the parameters of a run, always on the same sequences."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        shape: RunShape,
        steps: CompiledSteps,
        monitor: JobMonitor,
        timer: StartupTimer,
    ):
        self._config, self._data, self._shape = config, data, shape
        self._steps, self._monitor, self._timer = steps, monitor, timer
        self._token_bytes = data.tokenizer.token_bytes()
        self._is_compiled = False

    def __call__(self, step: int, params: dict) -> dict[str, float] | None:
        """Validation metrics after a step, see `evaluate`; None if the job stops before they are complete."""
        # The first time compiles, which may take minutes: the watchdog must not take it for a stall.
        first, self._is_compiled = not self._is_compiled, True
        watchdog = self._monitor.watchdog
        compiling = watchdog.long_task("compiling the evaluation") if first else nullcontext()
        with compiling, self._timer.part("validation"):
            _, rows, length = self._shape.batch_at(0)
            metrics = evaluate(
                self._steps,
                params,
                self._data.validation,
                self._token_bytes,
                self._config.eval.sequences,
                (1, rows, length),
                batch_sharding(self._shape.mesh),
                self._monitor,
            )
        if metrics is not None:
            loss, bits = metrics["valid/loss"], metrics["valid/bits_per_byte"]
            logging.info("step %d: validation loss %.4f, %.4f bits per byte", step, loss, bits)
        return metrics


def evaluate(
    steps: CompiledSteps,
    params: dict,
    split: Split,
    token_bytes: np.ndarray,
    sequences: int,
    shape: tuple[int, int, int],
    layout: jax.sharding.NamedSharding,
    monitor: JobMonitor,
) -> dict[str, float] | None:
    """Metrics over always the same sequences, evenly spaced over the split.

    Args:
        steps: the run's compiled functions.
        params: sharded parameters.
        split: the validation split.
        token_bytes: int32 (V,): UTF-8 bytes of each id.
        sequences: how many; 0: all.
        shape: (1, rows, L) of an eval batch.
        layout: of the batches.
        monitor: knows whether the job stops.

    Returns:
        "valid/loss" in nats per token, "valid/accuracy", "valid/bits_per_byte", over all tokens. If the
        dataset has several subsets, also "valid/loss/SUBSET" and "valid/bits_per_byte/SUBSET" of those that
        have tokens among the sequences, and "valid/loss_macro" and "valid/bits_per_byte_macro", the plain
        means over these. NaN where the targets are no text. None if the job stops before that.
    """
    names = [name or "unnamed" for name in split.subsets]
    by_subset = 1 < len(names) <= MAX_SUBSETS
    count = len(names) if by_subset else 1
    totals = {name: np.zeros(count) for name in ("loss", "correct", "count", "bytes")}
    previous = None
    for batch in validation_batches(split, sequences, shape, layout, with_subsets=by_subset):
        if monitor.stop_reason():
            return None
        sums = steps.evaluate(params, batch, token_bytes, count)
        _add(totals, previous)  # read while the devices work on this batch
        previous = sums
    _add(totals, previous)
    return _metrics(totals, names if by_subset else [])


def _metrics(totals: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """The metrics, from float64 sums by subset; without names, only those of all tokens."""
    loss, correct, count, bytes_ = (
        float(sum(totals[name])) for name in ("loss", "correct", "count", "bytes")
    )
    result = {
        "valid/loss": loss / count,
        "valid/accuracy": correct / count,
        "valid/bits_per_byte": loss / math.log(2) / bytes_ if bytes_ else math.nan,
    }
    if not names:
        return result
    losses, bits = {}, {}
    for name, loss, count, bytes_ in zip(
        names, totals["loss"], totals["count"], totals["bytes"], strict=True
    ):
        if count:
            losses[name] = float(loss / count)
            if bytes_:
                bits[name] = float(loss / math.log(2) / bytes_)
    result |= {f"valid/loss/{name}": value for name, value in losses.items()}
    result |= {f"valid/bits_per_byte/{name}": value for name, value in bits.items()}
    result |= {
        "valid/loss_macro": statistics.mean(losses.values()),
        "valid/bits_per_byte_macro": statistics.mean(bits.values()) if bits else math.nan,
    }
    return result


def _add(totals: dict[str, np.ndarray], sums: dict | None):
    for name, value in jax.device_get(sums or {}).items():
        totals[name] += np.asarray(value, np.float64)
