"""Batches on the devices: ids and marks apart."""

import jax
import jax.numpy as jnp
import numpy as np

from trainit.tokenizers.chat import marks


def inputs_and_targets(micro_batch: dict) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Splits rows of L + 1 tokens: inputs (b, L) int32, targets (b, L) int32, and which targets count.

    The last result is which inputs are marked as a document's end; None: this batch cannot have marks.
    """
    tokens, ends_BL = micro_batch["tokens"], None
    if tokens.dtype == jnp.uint32:
        ends_BL, tokens = (tokens[:, :-1] & marks.LAST) > 0, tokens % marks.LAST
    tokens = tokens.astype(jnp.int32)
    return tokens[:, :-1], tokens[:, 1:], counting(micro_batch), ends_BL


def counting(batch: dict) -> jax.Array:
    """Which targets of a batch, or of a micro-step of it, count: (..., L)."""
    targets = batch["tokens"][..., 1:]
    mask = jnp.arange(targets.shape[-1]) < batch["lengths"][..., None]
    return mask & (targets < np.uint32(marks.IGNORED)) if targets.dtype == jnp.uint32 else mask
