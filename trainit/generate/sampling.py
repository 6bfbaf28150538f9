"""The next token, chosen of the model's logits.

The order is that of `transformers`: repetition penalty, temperature, then top-k, top-p and min-p, which leave
tokens out.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults take the most likely one."""

    temperature: float = 0.0  # divides the logits; 0: the most likely token
    top_k: int = 0  # only this many tokens, the most likely ones; 0: all
    top_p: float = 1.0  # only the fewest most likely tokens that together have this probability
    min_p: float = 0.0  # only tokens of at least this part of the highest probability
    repetition_penalty: float = 1.0  # lowers what stands in prompt or text (Keskar et al., arXiv 1909.05858)

    def choose(self, logits_BV: jax.Array, seen_BV: jax.Array | None, key_B: jax.Array) -> jax.Array:
        """A token (B,) of each row, by the row's own key. `seen_BV` says which tokens a row has already."""
        logits_BV = self.filtered(logits_BV, seen_BV)
        if not self.temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

    def filtered(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        """The float32 logits from which is drawn: -inf where a token is left out."""
        # In bfloat16 many logits are equal, and random numbers of 8 bits would reach few of them.
        logits_BV = logits_BV.astype(jnp.float32)
        if seen_BV is not None:
            lower = jnp.where(logits_BV > 0, 1 / self.repetition_penalty, self.repetition_penalty)
            logits_BV = jnp.where(seen_BV, logits_BV * lower, logits_BV)
        if not self.temperature:
            return logits_BV
        logits_BV = logits_BV / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            least_BK, _ = jax.lax.top_k(logits_BV, self.top_k)
            logits_BV = _from(logits_BV, least_BK[:, -1:])
        if self.top_p < 1:
            # A token stays if those that are more likely have less than top_p together.
            sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            stays_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < self.top_p
            least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
            logits_BV = _from(logits_BV, least_B1)
        if self.min_p:
            top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
            logits_BV = _from(logits_BV, top_B1 + math.log(self.min_p))
        return logits_BV


def _from(logits_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
