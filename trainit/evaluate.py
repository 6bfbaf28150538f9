"""Validation: total nats over total tokens, total bits over total bytes."""

import math

import jax
import numpy as np

from trainit.data import loader
from trainit.data.tokens import Split
from trainit.peers import Peers
from trainit.step import Steps


def evaluate(
    steps: Steps,
    params: dict,
    split: Split,
    token_bytes: np.ndarray,
    sequences: int,
    shape: tuple[int, int, int],
    sharding: jax.sharding.NamedSharding,
    peers: Peers,
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
        peers: tells when to stop.

    Returns:
        "valid/loss" nats per token, "valid/accuracy", "valid/bits_per_byte" (NaN if the targets are no
        text); None if the run is to stop before that.
    """
    available = split.sequences(shape[2])
    chosen = min(sequences or available, available)
    batches = loader.batches(
        split, loader.Spaced(available, chosen), shape, sharding, count=-(-chosen // shape[1])
    )
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0, "bytes": 0.0}
    previous = None
    for batch in batches:
        if peers.stop():
            return None
        sums = steps.evaluate(params, batch, token_bytes)
        _add(totals, previous)  # read while the device works on this batch
        previous = sums
    _add(totals, previous)
    return {
        "valid/loss": totals["loss"] / totals["count"],
        "valid/accuracy": totals["correct"] / totals["count"],
        "valid/bits_per_byte": totals["loss"] / math.log(2) / (totals["bytes"] or math.nan),
    }


def _add(totals: dict[str, float], sums: dict | None):
    for name, value in jax.device_get(sums or {}).items():
        totals[name] += float(value)
