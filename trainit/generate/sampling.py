"""The next token, chosen of the model's logits.

The order is that of `transformers`: repetition penalty, temperature, then top-k, top-p and min-p, which leave
tokens out.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults take the most likely one. A program takes its `arguments`."""

    temperature: Any = 0.0  # divides the logits; 0: the most likely token
    top_k: int = field(default=0, metadata={"static": True})  # only this many of the most likely; 0: all
    top_p: Any = 1.0  # only the fewest most likely tokens that together have this probability
    min_p: Any = 0.0  # only tokens of at least this part of the highest probability
    repetition_penalty: Any = 1.0  # lowers what prompt or text has (Keskar et al., arXiv 1909.05858)

    def arguments(self) -> Self:
        """The same with arrays as numbers, and None for what changes nothing.

        One compiled program does for all settings that have the same of them.
        """
        named = {"temperature": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        given: dict[str, Any] = {
            name: None if getattr(self, name) == off else np.float32(getattr(self, name))
            for name, off in named.items()
        }
        return replace(self, **given)

    def choose(self, logits_BV: jax.Array, seen_BV: jax.Array | None, key_B: jax.Array) -> jax.Array:
        """A token (B,) of each row, by the row's own key. `seen_BV` says which tokens a row has already.

        This is of `arguments`, as is `filtered`.
        """
        logits_BV = self.filtered(logits_BV, seen_BV)
        if self.temperature is None:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)

    def filtered(self, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
        """The float32 logits from which is drawn: -inf where a token is left out."""
        # In bfloat16 many logits are equal, and random numbers of 8 bits would reach few of them.
        logits_BV = logits_BV.astype(jnp.float32)
        if seen_BV is not None:
            penalty = self.repetition_penalty
            lower = jnp.where(logits_BV > 0, 1 / penalty, penalty)
            logits_BV = jnp.where(seen_BV, logits_BV * lower, logits_BV)
        if self.temperature is None:
            return logits_BV
        logits_BV = logits_BV / self.temperature
        if 0 < self.top_k < logits_BV.shape[-1]:
            least_BK, _ = jax.lax.top_k(logits_BV, self.top_k)
            logits_BV = _from(logits_BV, least_BK[:, -1:])
        if self.top_p is not None:
            # A token stays if those that are more likely have less than top_p together.
            sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            stays_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < self.top_p
            least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
            logits_BV = _from(logits_BV, least_B1)
        if self.min_p is not None:
            top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
            logits_BV = _from(logits_BV, top_B1 + jnp.log(self.min_p))
        return logits_BV


def _from(logits_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
