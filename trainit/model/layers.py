"""What a GPT is made of: weights, norms, embeddings, rotary positions, documents in a row, the head.

Names of arrays carry their dimensions as in `model/gpt.py`.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

NORM_EPSILON = 1e-5
INIT_STD = 0.02  # of GPT-2's initial weights


class Linear(nnx.Module):
    """The weights of x @ kernel + bias. `parallel/matmul.py` multiplies with them."""

    def __init__(self, inputs: tuple, outputs: tuple, bias: bool, std: float, rngs: nnx.Rngs):
        """`inputs` and `outputs` are sizes of axes, e.g. (H, K); `std` is of the initial kernel."""
        self.kernel = nnx.Param(jax.nn.initializers.normal(std)(rngs.params(), (*inputs, *outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    @property
    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias, float32."""
        return self.kernel[...], None if self.bias is None else self.bias[...]


class Norm(nnx.Module):
    """LayerNorm (Ba et al., arXiv 1607.06450), with `center`, or RMSNorm (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, size: int, center: bool, bias: bool):
        self.center = center
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if center and bias else None

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        """Normalizes the last axis; the result is `dtype`, by default that of x."""
        y = x.astype(jnp.float32)  # squares and their mean lose too much in 16 bits
        if self.center:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPSILON) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(dtype or x.dtype)


class Embedding(nnx.Module):
    """A table (rows, D). `parallel/embedding.py` looks rows up in it."""

    def __init__(self, rows: int, dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.nn.initializers.normal(INIT_STD)(rngs.params(), (rows, dim)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The map from last hidden states to logits. `cross_entropy` applies it in chunks."""

    kernel_DV: jax.Array
    bias_V: jax.Array | None
    softcap: float = field(metadata={"static": True})  # logits pass through cap * tanh(logits / cap); 0: none

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> float32 logits (..., V)."""
        logits = jnp.matmul(x, self.kernel_DV.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = logits if self.bias_V is None else logits + self.bias_V
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """For each token the number of its document in the row, and its position in that document; int32."""

    number_BL: jax.Array
    position_BL: jax.Array


def find_documents(tokens_BL: jax.Array, end_of_text: int) -> Documents:
    """Finds the documents in each row by the end-of-text id, which belongs to the document that it ends.

    A row's first tokens count as a document of their own, even if their document began in the row before.
    """
    # A document starts after each end-of-text id; the latest start up to a token is its document's.
    ends_BL = jnp.pad(tokens_BL[:, :-1] == end_of_text, ((0, 0), (1, 0)))
    index_L = jnp.arange(tokens_BL.shape[1])
    starts_BL = jax.lax.cummax(jnp.where(ends_BL, index_L, 0), axis=1)
    return Documents(jnp.cumsum(ends_BL, axis=1), index_L - starts_BL)


def rope(x_BLHK: jax.Array, theta: float, position_BL: jax.Array | None = None) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): turns (x[i], x[i + K/2]) by l * theta^(-2i/K).

    The position l is by default a token's index in its row.
    """
    _, L, _, K = x_BLHK.shape
    # In float32: bfloat16 could not tell large positions apart.
    frequency = theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    position = jnp.arange(L) if position_BL is None else position_BL
    angle = position.astype(jnp.float32)[..., None] * frequency  # ([B,] L, K / 2)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x_BLHK.dtype)
