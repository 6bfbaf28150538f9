"""Validation: total nats over total tokens, total bits over total bytes; overall and for each subset."""

import math
import statistics
from contextlib import nullcontext

import jax
import numpy as np
from absl import logging

from trainit.cluster.monitor import JobMonitor
from trainit.config import Config
from trainit.data.training_data import TrainingData, validation_batches
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train.startup_timer import StartupTimer
from trainit.train.step import CompiledSteps

MAX_SUBSETS = 256  # a split with more of them is validated as a whole only


class Validation:
    """Validates the parameters of a run: always on the same sequences, evenly spaced over the split."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        shape: RunShape,
        steps: CompiledSteps,
        monitor: JobMonitor,
        timer: StartupTimer,
    ):
        self._sequences, self._split = config.eval.sequences, data.validation
        self._shape, self._layout = (1, *shape.batch_at(0)[1:]), batch_sharding(shape.device_mesh)
        self._steps, self._monitor, self._timer = steps, monitor, timer
        self._token_bytes = data.tokenizer.token_bytes()
        self._is_compiled = False

    def __call__(self, step: int, params: dict) -> dict[str, float] | None:
        """The validation metrics of the parameters after `step` steps.

        Returns:
            "valid/loss" in nats per token, "valid/accuracy", "valid/bits_per_byte", over all tokens. If the
            dataset has several subsets, also "valid/loss/SUBSET" and "valid/bits_per_byte/SUBSET" of those
            that have tokens among the sequences, and "valid/loss_macro" and "valid/bits_per_byte_macro", the
            plain means over these. NaN where the targets are no text. None if the job stops meanwhile.
        """
        # The first time compiles, which may take minutes: the watchdog must not take it for a stall.
        watchdog = self._monitor.watchdog
        patience = nullcontext() if self._is_compiled else watchdog.long_task("compiling the evaluation")
        self._is_compiled = True
        with patience, self._timer.part("validation"):
            metrics = self._evaluate(params)
        if metrics is not None:
            loss, bits = metrics["valid/loss"], metrics["valid/bits_per_byte"]
            logging.info("step %d: validation loss %.4f, %.4f bits per byte", step, loss, bits)
        return metrics

    def _evaluate(self, params: dict) -> dict[str, float] | None:
        names = [name or "unnamed" for name in self._split.subsets]
        by_subset = 1 < len(names) <= MAX_SUBSETS
        count = len(names) if by_subset else 1
        totals = {name: np.zeros(count) for name in ("loss", "correct", "count", "bytes")}
        batches = validation_batches(self._split, self._sequences, self._shape, self._layout, by_subset)
        previous: dict = {}
        for batch in batches:
            if self._monitor.stop_reason():
                return None
            sums = self._steps.evaluate(params, batch, self._token_bytes, count)
            _add(totals, previous)  # read while the devices work on this batch
            previous = sums
        _add(totals, previous)
        return _metrics(totals, names if by_subset else [])


def _add(totals: dict[str, np.ndarray], sums: dict):
    for name, value in jax.device_get(sums).items():
        totals[name] += np.asarray(value, np.float64)


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
    columns = (totals[name].tolist() for name in ("loss", "count", "bytes"))
    for name, loss, count, bytes_ in zip(names, *columns, strict=True):
        if count:
            losses[name] = loss / count
        if count and bytes_:
            bits[name] = loss / math.log(2) / bytes_
    result |= {f"valid/loss/{name}": value for name, value in losses.items()}
    result |= {f"valid/bits_per_byte/{name}": value for name, value in bits.items()}
    result["valid/loss_macro"] = statistics.mean(losses.values())
    result["valid/bits_per_byte_macro"] = statistics.mean(bits.values()) if bits else math.nan
    return result
