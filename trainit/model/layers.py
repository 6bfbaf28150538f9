"""What a GPT is made of: weights, norms, embeddings, rotary positions, documents in a row, the head.

Names of arrays carry their dimensions as in `model/gpt.py`.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from trainit.config import Config
from trainit.parallel.collectives import MaybeArray
from trainit.parallel.cpu_workarounds import product
from trainit.parallel.float8 import Factor, factor


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


def init_std(c: Config, inputs: int, output: bool = False) -> float:
    """Standard deviation of an initial kernel; `output`: its results are added to the residual stream.

    For init=gpt2, outputs have 1 / sqrt(2 N) of the others' (Radford et al. 2019). With zero_outputs, a block
    changes nothing at first, as in the modded-nanoGPT optimization benchmark.
    """
    if c.init == "gpt2":
        return c.init_std / math.sqrt(2 * c.num_blocks) if output else c.init_std
    return 0.0 if output else math.sqrt(0.33 / inputs)


class Norm(nnx.Module):
    """LayerNorm (Ba et al., arXiv 1607.06450), with `center`, or RMSNorm (Zhang & Sennrich, 1910.07467)."""

    def __init__(self, c: Config, shape: tuple[int, ...], center: bool, scales: tuple = ("all", "blocks")):
        """`c` is the config of the model, `shape` that of the last axes, which are normalized together.

        With the values `scales` of model.norm_scale, it learns a scale.
        """
        self.c, self.shape, self.center = c, shape, center
        size = math.prod(shape)
        scale = jnp.zeros(size) if c.norm_unit_offset else jnp.ones(size)
        self.scale = nnx.Param(scale) if c.norm_scale in scales else None
        self.bias = nnx.Param(jnp.zeros(size)) if center and c.use_bias else None

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        """Normalizes the last axes; the result is `dtype`, by default that of x."""
        y = x.astype(jnp.float32)  # squares and their mean lose too much in 16 bits
        axes = tuple(range(-len(self.shape), 0))
        if self.center:
            y = y - jnp.mean(y, axes, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + self.c.norm_epsilon)
        if self.scale is not None:
            y = y * (self.scale[...].reshape(self.shape) + (1 if self.c.norm_unit_offset else 0))
        return (y if self.bias is None else y + self.bias[...]).astype(dtype or x.dtype)


class Embedding(nnx.Module):
    """A table (rows, D). `parallel/embedding.py` looks rows up in it."""

    def __init__(self, rows: int, dim: int, std: float, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.nn.initializers.normal(std)(rngs.params(), (rows, dim)))


@dataclass(frozen=True)
class SoftCap:
    """Keeps logits within (-limit, limit), smoothly; limit 0: not (Gemma Team 2024, arXiv 2408.00118)."""

    limit: float = 0.0
    form: str = "tanh"  # or "rsqrt"

    def __call__(self, logits: jax.Array) -> jax.Array:
        """The capped logits, of the same shape."""
        if not self.limit:
            return logits
        x = logits / self.limit
        return self.limit * (jnp.tanh(x) if self.form == "tanh" else x * jax.lax.rsqrt(1 + x * x))

    def times_slope(self, gradient: jax.Array, capped: jax.Array) -> jax.Array:
        """The gradient of logits, from that of the capped ones and these themselves."""
        if not self.limit:
            return gradient
        slope = 1 - (capped / self.limit) ** 2
        return gradient * (slope if self.form == "tanh" else jnp.maximum(slope, 0) ** 1.5)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The map from last hidden states to logits. `cross_entropy` applies it in chunks."""

    kernel_DV: jax.Array
    bias_V: jax.Array | None
    softcap: SoftCap = field(default=SoftCap(), metadata={"static": True})
    kernel_parts: int = field(default=1, metadata={"static": True})  # of `Parallel`

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> float32 logits (..., V)."""
        factors = Factor(x, None), factor(self.kernel_DV, x.dtype)
        logits = product(*factors, ((x.ndim - 1,), (0,)), jnp.float32, None, self.kernel_parts)
        return self.softcap(logits if self.bias_V is None else logits + self.bias_V)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """For each token the number of its document in the row, and its position in that document; int32."""

    number_BL: jax.Array
    position_BL: jax.Array


def find_documents(tokens_BL: jax.Array, end_of_text: int, ends_BL: MaybeArray = None) -> Documents:
    """Finds the documents in each row by the end-of-text id, which belongs to the document that it ends.

    `ends_BL` says which other tokens end one. A row's first tokens count as a document of their own, even if
    their document began in the row before.
    """
    # A document starts after each end-of-text id; the latest start up to a token is its document's.
    ends_BL = (tokens_BL == end_of_text) | (False if ends_BL is None else ends_BL)
    ends_BL = jnp.pad(ends_BL[:, :-1], ((0, 0), (1, 0)))
    index_L = jnp.arange(tokens_BL.shape[1])
    starts_BL = jax.lax.cummax(jnp.where(ends_BL, index_L, 0), axis=1)
    return Documents(jnp.cumsum(ends_BL, axis=1), index_L - starts_BL)


def rope(x_BLHK: jax.Array, c: Config, position=None) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): turns (x[i], x[i + R/2]) by l * theta^(-2i/R).

    The positions l, (L,) or (B, L), are by default the tokens' indices in their row. The first R of K numbers
    are turned; interleaved, in pairs (x[2i], x[2i + 1]). `c` is the config of the model.
    """
    L, R = x_BLHK.shape[1], int(c.rotary_fraction * x_BLHK.shape[3])
    # In float32: bfloat16 could not tell large positions apart.
    frequency = c.rope_theta ** (-jnp.arange(0, R, 2, dtype=jnp.float32) / R)
    if (s := c.rope_scaling).factor != 1:
        # By its turns in the original context a frequency stays, is divided, or lies between (Llama 3,
        # Grattafiori et al. 2024, arXiv 2407.21783).
        turns = s.original_context / (2 * math.pi) * frequency
        kept = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
        kept = jnp.clip(kept, 0, 1)
        frequency = frequency * (kept + (1 - kept) / s.factor)
    position = jnp.arange(L) if position is None else jnp.asarray(position)
    angle = position.astype(jnp.float32)[..., None] * frequency  # ([B,] L, R / 2)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    x, rest = x_BLHK[..., :R].astype(jnp.float32), x_BLHK[..., R:]
    first, second = (x[..., ::2], x[..., 1::2]) if c.rope_interleaved else jnp.split(x, 2, axis=-1)
    pairs = first * cos - second * sin, first * sin + second * cos
    turned = jnp.stack(pairs, -1).reshape(x.shape) if c.rope_interleaved else jnp.concatenate(pairs, -1)
    return jnp.concatenate([turned.astype(x_BLHK.dtype), rest], -1)
