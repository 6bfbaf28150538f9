"""Validation: total nats over total tokens, total bits over total bytes; of all, and of each subset."""

import math
import statistics

import jax
import numpy as np

from trainit.cluster.monitor import JobMonitor
from trainit.data import training_data
from trainit.data.dataset import Split
from trainit.train.step import CompiledSteps

MOST_SUBSETS = 256  # that are validated apart


def evaluate(
    steps: CompiledSteps,
    params: dict,
    split: Split,
    token_bytes: np.ndarray,
    sequences: int,
    shape: tuple[int, int, int],
    sharding: jax.sharding.NamedSharding,
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
        sharding: of the batches.
        monitor: tells when to stop.

    Returns:
        "valid/loss" nats per token, "valid/accuracy", "valid/bits_per_byte", over all tokens; where the
        dataset has several subsets, also "valid/loss/SUBSET" and "valid/bits_per_byte/SUBSET" of those that
        have tokens among the sequences, and "valid/loss_macro" and "valid/bits_per_byte_macro", the plain
        means over these. NaN where the targets are no text. None if the run is to stop before that.
    """
    names = [name or "unnamed" for name in split.subsets]
    several = 1 < len(names) <= MOST_SUBSETS
    batches = training_data.validation_batches(split, sequences, shape, sharding, several)
    parts = len(names) if several else 1
    totals = {name: np.zeros(parts) for name in ("loss", "correct", "count", "bytes")}
    previous = None
    for batch in batches:
        if monitor.stop_reason():
            return None
        sums = steps.evaluate(params, batch, token_bytes, parts)
        _add(totals, previous)  # read while the device works on this batch
        previous = sums
    _add(totals, previous)
    return _metrics(totals, names if several else [])


def _metrics(totals: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """From sums by subset, float64."""
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
    there = [k for k in range(len(names)) if totals["count"][k]]
    losses = {names[k]: float(totals["loss"][k] / totals["count"][k]) for k in there}
    bits = {
        names[k]: float(totals["loss"][k] / math.log(2) / totals["bytes"][k])
        for k in there
        if totals["bytes"][k]
    }
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
