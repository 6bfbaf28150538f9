"""The GPT: GPT-2 exactly (Radford et al. 2019), and by config field its modern parts.

Arrays carry their dimensions after an underscore:

    B batch    L length    D model    H query heads    J key and value heads    K head size
    F MLP      V vocabulary    N layers    G micro-steps    S keys' length (= L)

Parameters are float32, stacked over the layers. They are cast to the compute type where they are
used, so that gradients come back in float32; softmax, norms and logits are float32.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from trainit.config import Config
from trainit.model.attention import PRODUCT, dropout, plain
from trainit.parallel.float8 import Part
from trainit.parallel.matmul import ONE_DEVICE, Parallel

Attend = Callable[..., jax.Array]
Parts = Mapping[str, Part]
NORM_EPSILON = 1e-5
STANDARD_DEVIATION = 0.02  # of GPT-2's weights; of those that write to the residual, over sqrt(2 N)


class Linear(nnx.Module):
    """The weights of x @ kernel + bias, over several input and output axes at once; `Parallel` multiplies."""

    def __init__(self, inputs: tuple, outputs: tuple, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.nn.initializers.normal(std)(rngs.params(), (*inputs, *outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    @property
    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        return self.kernel[...], None if self.bias is None else self.bias[...]


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, center: bool, bias: bool):
        self.center = center
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if center and bias else None

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPSILON) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(dtype or x.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["number_BL", "position_BL"], meta_fields=[])
@dataclass(frozen=True)
class Documents:
    """Which document each token of a row belongs to, and where in it it stands; both int32."""

    number_BL: jax.Array
    position_BL: jax.Array


def find_documents(tokens_BL: jax.Array, end_of_text: int) -> Documents:
    """The documents in each row, told apart by the end-of-text id, which belongs to what it ends.

    What a row begins with is a document of its own, wherever in its document it may be.
    """
    ends_BL = jnp.pad(tokens_BL[:, :-1] == end_of_text, ((0, 0), (1, 0)))  # the token before has ended one
    index_L = jnp.arange(tokens_BL.shape[1])
    starts_BL = jax.lax.cummax(jnp.where(ends_BL, index_L, 0), axis=1)
    return Documents(jnp.cumsum(ends_BL, axis=1), index_L - starts_BL)


def rope(x_BLHK: jax.Array, theta: float, position_BL: jax.Array | None = None) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): turns (x[i], x[i + K/2]) by l * theta^(-2i/K).

    l is the token's position: its index in the row, unless `position_BL` says otherwise.
    """
    _, L, _, K = x_BLHK.shape
    frequency = theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    position = jnp.arange(L) if position_BL is None else position_BL
    angle = position.astype(jnp.float32)[..., None] * frequency  # ([B,] L, K / 2)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x_BLHK.dtype)


def _for_heads(key_B: jax.Array, heads: int) -> jax.Array:
    """A key of dropout on attention's weights for each row and head (B, heads): site 0 of the layer."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, 0)
    return jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(heads)))(
        keys_B
    )


class Attention(nnx.Module):
    def __init__(self, c: Config, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, float8: bool):
        size, residual_std = c.dim // c.num_heads, STANDARD_DEVIATION / math.sqrt(2 * c.num_blocks)
        self.c, self.attend, self.parallel, self.float8 = c, attend, parallel, float8
        self.query = Linear((c.dim,), (c.num_heads, size), c.use_bias, STANDARD_DEVIATION, rngs)
        self.key = Linear((c.dim,), (c.num_kv_heads, size), c.use_bias, STANDARD_DEVIATION, rngs)
        self.value = Linear((c.dim,), (c.num_kv_heads, size), c.use_bias, STANDARD_DEVIATION, rngs)
        self.out = Linear((c.num_heads, size), (c.dim,), c.use_bias, residual_std, rngs)
        self.query_norm = Norm(size, center=False, bias=False) if c.qk_norm else None
        self.key_norm = Norm(size, center=False, bias=False) if c.qk_norm else None

    def __call__(self, x_BLD: jax.Array, key: jax.Array | None, documents: Documents | None) -> jax.Array:
        c = self.c
        number_BL, position_BL = (documents.number_BL, documents.position_BL) if documents else (None, None)
        linears = (self.query, self.key, self.value)
        weights = (linear.weights for linear in linears)
        q_BLHK, k_BLJK, v_BLJK = self.parallel.widen(x_BLD, *weights, float8=self.float8)
        if c.qk_norm:
            q_BLHK, k_BLJK = self.query_norm(q_BLHK), self.key_norm(k_BLJK)
        if c.positions == "rope":
            q_BLHK, k_BLJK = (rope(x, c.rope_theta, position_BL) for x in (q_BLHK, k_BLJK))
        attend = functools.partial(self.attend, rate=c.attn_dropout)
        attend = jax.checkpoint(attend) if c.remat == "attention" else attend
        keys_BJ = _for_heads(key, c.num_kv_heads) if key is not None and c.attn_dropout else None
        y_BLHK = attend(q_BLHK, k_BLJK, v_BLJK, number_BL, keys_BJ)
        y_BLD = self.parallel.narrow(y_BLHK, *self.out.weights, float8=self.float8)
        return dropout(y_BLD, c.attn_linear_dropout, key, 1)


class MLP(nnx.Module):
    """GELU (tanh form), squared ReLU (So et al., arXiv 2109.08668) or SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c: Config, parallel: Parallel, rngs: nnx.Rngs, float8: bool):
        residual_std = STANDARD_DEVIATION / math.sqrt(2 * c.num_blocks)
        self.c, self.parallel, self.float8 = c, parallel, float8
        self.up = Linear((c.dim,), (c.mlp_dim,), c.use_bias, STANDARD_DEVIATION, rngs)
        gated = c.activation == "swiglu"
        self.gate = Linear((c.dim,), (c.mlp_dim,), c.use_bias, STANDARD_DEVIATION, rngs) if gated else None
        self.down = Linear((c.mlp_dim,), (c.dim,), c.use_bias, residual_std, rngs)

    def __call__(self, x_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        linears = (self.up,) if self.gate is None else (self.up, self.gate)
        weights = (linear.weights for linear in linears)
        h_BLF, *gate_BLF = self.parallel.widen(x_BLD, *weights, float8=self.float8)
        match self.c.activation:
            case "gelu":
                # Its cube overflows in float16 from 41 on, and the slope is NaN then.
                wide = jnp.float32 if h_BLF.dtype == jnp.float16 else h_BLF.dtype
                h_BLF = jax.nn.gelu(h_BLF.astype(wide), approximate=True).astype(h_BLF.dtype)
            case "relu2":
                h_BLF = jnp.square(jax.nn.relu(h_BLF))
            case "swiglu":
                h_BLF = h_BLF * jax.nn.silu(*gate_BLF)
        y_BLD = self.parallel.narrow(h_BLF, *self.down.weights, float8=self.float8)
        return dropout(y_BLD, self.c.transformer_dropout, key, 2)


# What a block keeps for its gradient beside its input, by model.remat; the rest is computed once more.
POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),  # but for attention's output projection
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    def __init__(self, c: Config, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, parts: Parts):
        self.parallel = parallel
        self.types = parts["attention"].dtype, parts["mlp"].dtype
        self.attention_norm = Norm(c.dim, c.norm == "layernorm", c.use_bias)
        self.attention = Attention(c, attend, parallel, rngs, parts["attention"].float8)
        self.mlp_norm = Norm(c.dim, c.norm == "layernorm", c.use_bias)
        self.mlp = MLP(c, parallel, rngs, parts["mlp"].float8)

    def __call__(self, x_BLD: jax.Array, key: jax.Array | None, documents: Documents | None) -> jax.Array:
        with jax.named_scope("attention"):
            y_BLD = self.attention(self.attention_norm(x_BLD, self.types[0]), key, documents)
            x_BLD = x_BLD + y_BLD.astype(x_BLD.dtype)
        with jax.named_scope("mlp"):
            y_BLD = self.mlp(self.mlp_norm(x_BLD, self.types[1]), key)
            x_BLD = x_BLD + y_BLD.astype(x_BLD.dtype)
        return self.parallel.constrain(x_BLD, "batch", "residual_length", None)


class Embedding(nnx.Module):
    def __init__(self, rows: int, dim: int, rngs: nnx.Rngs):
        std = jax.nn.initializers.normal(STANDARD_DEVIATION)
        self.embedding = nnx.Param(std(rngs.params(), (rows, dim)))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel_DV", "bias_V"], meta_fields=["softcap"]
)
@dataclass(frozen=True)
class Head:
    """From last hidden states to logits; `losses` takes it apart."""

    kernel_DV: jax.Array
    bias_V: jax.Array | None
    softcap: float  # logits pass through cap * tanh(logits / cap); 0: none

    def replace(self, kernel_DV, bias_V) -> "Head":
        return Head(kernel_DV, bias_V, self.softcap)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> float32 logits (..., V)."""
        logits = jnp.matmul(x, self.kernel_DV.astype(x.dtype), preferred_element_type=jnp.float32)
        logits = logits if self.bias_V is None else logits + self.bias_V
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


class Network(nnx.Module):
    """The modules, each parameter declared where it is used; `GPT` is the way in."""

    def __init__(self, c: Config, dtype, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, parts: Parts):
        self.c, self.dtype, self.parallel, self.head_dtype = c, dtype, parallel, parts["head"].dtype
        self.token_embedding = Embedding(c.vocab_size, c.dim, rngs)
        learned = c.positions == "learned"
        self.position_embedding = Embedding(c.context_length, c.dim, rngs) if learned else None
        self.blocks = nnx.vmap(lambda key: Block(c, attend, parallel, nnx.Rngs(params=key), parts))(
            jax.random.split(rngs.params(), c.num_blocks)
        )
        self.final_norm = Norm(c.dim, c.norm == "layernorm", c.use_bias)
        own_head = not c.tied_embeddings
        self.head = (
            Linear((c.dim,), (c.vocab_size,), c.head_bias, STANDARD_DEVIATION, rngs) if own_head else None
        )

    def __call__(self, tokens_BL: jax.Array, key: jax.Array | None, first_row: int) -> tuple[jax.Array, Head]:
        c = self.c
        if key is not None:  # one a row
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(len(tokens_BL)))
        documents = find_documents(tokens_BL, c.end_of_text) if c.document_mask else None
        with jax.named_scope("embedding"):
            x_BLD = self.parallel.look_up(
                self.dtype,
                tokens_BL,
                self.token_embedding.embedding[...],
                None if self.position_embedding is None else self.position_embedding.embedding[...],
                documents.position_BL if documents else None,
            )
            x_BLD = dropout(x_BLD, c.gpt_dropout, key, 0)
        graph, layers = nnx.split(self.blocks)

        def block(x_BLD, layer):
            number, parameters = layer
            layer_key = None if key is None else jax.vmap(jax.random.fold_in, (0, None))(key, number + 1)
            return nnx.merge(graph, parameters)(x_BLD, layer_key, documents), None

        if c.remat in POLICIES:
            block = jax.checkpoint(block, prevent_cse=not c.scan_layers, policy=POLICIES[c.remat])
        unroll = 1 if c.scan_layers else c.num_blocks
        x_BLD, _ = jax.lax.scan(block, x_BLD, (jnp.arange(c.num_blocks), layers), unroll=unroll)
        with jax.named_scope("head"):
            return self.final_norm(x_BLD, self.head_dtype), self._head()

    def _head(self) -> Head:
        if self.head is None:
            return Head(self.token_embedding.embedding[...].T, None, self.c.logit_softcap)
        bias = self.head.bias
        return Head(self.head.kernel[...], None if bias is None else bias[...], self.c.logit_softcap)


class GPT:
    """Pure functions over a nested dict of parameters, with paths such as blocks/mlp/up/kernel."""

    def __init__(
        self,
        config: Config,
        precision: str = "float32",
        attend: Attend = plain,
        parallel: Parallel = ONE_DEVICE,
        parts: Parts | None = None,
    ):
        """
        Args:
            config: the resolved sub-config `model`.
            precision: of matrix products and activations: "float32", "bfloat16" or "float16".
            attend: attention's kernel, which takes and gives what `plain` does.
            parallel: multiplies matrices and lays out intermediate arrays on a mesh; default: one device.
            parts: how "attention", "mlp" and "head" compute; None: all in `precision`.
        """
        dtype = jnp.dtype(precision)
        parts = parts or dict.fromkeys(("attention", "mlp", "head"), Part(dtype))
        self._parallel = parallel
        self._build = lambda key: Network(config, dtype, attend, parallel, nnx.Rngs(params=key), parts)
        self._graph, _ = nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def init(self, key: jax.Array) -> dict:
        """Float32 parameters: N(0, 0.02), residual outputs N(0, 0.02 / sqrt(2 N)), biases 0, scales 1."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    def hidden(
        self, parameters: dict, tokens_BL: jax.Array, key: jax.Array | None = None, first_row: int = 0
    ) -> tuple[jax.Array, Head]:
        """The last hidden states (B, L, D) in the head's type, and the head that they go to.

        Args:
            parameters: from `init`.
            tokens_BL: integer ids.
            key: of the step's dropout; None: no dropout.
            first_row: where these rows stand in the global batch: dropout follows the row.
        """
        return nnx.merge(self._graph, parameters)(tokens_BL.astype(jnp.int32), key, first_row)

    def __call__(
        self, parameters: dict, tokens_BL: jax.Array, key: jax.Array | None = None, first_row: int = 0
    ) -> jax.Array:
        """Float32 logits (B, L, V) of the next token, all in memory; arguments as for `hidden`."""
        x_BLD, head = self.hidden(parameters, tokens_BL, key, first_row)
        return self._parallel.constrain(head(x_BLD), "batch", "length", "vocab")
