"""Losses as (sum, count), so that totals over micro-steps, devices and hosts are exact means."""

import jax
import jax.numpy as jnp


def token_losses(logits_BLV: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each position in nats, float32 (B, L), and whether its target has the highest logit.

    The target's logit is picked by comparison, not by a gather, so that a vocabulary split over
    devices needs no exchange but that of the sums.

    Args:
        logits_BLV: any float type; computed in float32.
        targets_BL: integer ids below V.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    top_BL = jnp.max(logits_BLV, axis=-1)
    shifted_BLV = logits_BLV - jax.lax.stop_gradient(top_BL)[..., None]
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    target_BL = jnp.sum(jnp.where(is_target_BLV, shifted_BLV, 0.0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted_BLV), axis=-1)) - target_BL, target_BL >= 0


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array, mask_BL: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy over the positions that count.

    Args:
        logits_BLV: any float type; computed in float32.
        targets_BL: integer ids below V.
        mask_BL: 1 where the position counts, 0 where not.

    Returns:
        Float32 scalars: "loss" sum of -log p(target) in nats; "correct" number of positions whose target
        has the highest logit; "count" number of positions.
    """
    loss_BL, correct_BL = token_losses(logits_BLV, targets_BL)
    mask_BL = mask_BL.astype(jnp.float32)
    return {
        "loss": jnp.sum(loss_BL * mask_BL),
        "correct": jnp.sum(correct_BL * mask_BL),
        "count": jnp.sum(mask_BL),
    }
