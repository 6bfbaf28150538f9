"""The GPT: GPT-2 exactly (Radford et al. 2019), and its modern parts by config field.

Names of arrays carry their dimensions after an underscore:

    B rows (of a micro-step, over the whole job)
    L length    D model    H query heads    J key and value heads    K head size
    F MLP      V vocabulary    N layers    G micro-steps    S keys' length (= L)

Parameters are float32, stacked over the layers: a kernel of all N layers is one array. They are cast to the
compute type where they are used, so that gradients come back in float32. Softmax, norms and logits are
float32.

The code here is written as if all arrays were whole. `parallel/layout.py` says how each parameter is split
over the mesh, `parallel/matmul.py` how kernels, the weight matrices of linear maps, are gathered for it.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from trainit.config import GATED, Config, layers_with_window
from trainit.model.attention import CUDNN_FORWARD, Form, plain
from trainit.model.dropout import dropout
from trainit.model.layers import (
    Documents,
    Embedding,
    Head,
    Linear,
    Norm,
    SoftCap,
    find_documents,
    init_std,
    rope,
)
from trainit.model.precision import PARTS, PartPrecision
from trainit.parallel import sequence
from trainit.parallel.collectives import ONE_DEVICE, MaybeArray, Parallel
from trainit.parallel.cpu_workarounds import keep
from trainit.parallel.embedding import vocab_parallel_embedding
from trainit.parallel.matmul import PRODUCT, column_parallel, row_parallel

Attend = Callable[..., jax.Array]  # with the arguments and the result of `attention.plain`
Parts = Mapping[str, PartPrecision]
Windowed = bool | jax.Array  # whether a layer has the model's window; an array where layers share a program


class Attention(nnx.Module):
    """Causal self-attention, with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) where J < H."""

    def __init__(self, c: Config, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, float8: bool):
        size, std, bias = c.head_dim, init_std(c, c.dim), c.use_bias or c.qkv_bias
        self.c, self.attend, self.parallel, self.float8 = c, attend, parallel, float8
        self.query = Linear((c.dim,), (c.num_heads, size), bias, std, rngs)
        self.key = Linear((c.dim,), (c.num_kv_heads, size), bias, std, rngs)
        self.value = Linear((c.dim,), (c.num_kv_heads, size), bias, std, rngs)
        out_std = init_std(c, c.num_heads * size, output=True)
        self.out = Linear((c.num_heads, size), (c.dim,), c.use_bias, out_std, rngs)

        def norm(heads: int) -> Norm | None:
            shape = (heads, size) if c.qk_norm_over_heads else (size,)
            return Norm(c, shape, center=False, scales=("all",)) if c.qk_norm else None

        self.query_norm, self.key_norm = norm(c.num_heads), norm(c.num_kv_heads)

    def __call__(
        self, x_BLD: jax.Array, key: jax.Array | None, documents: Documents | None, windowed: Windowed
    ) -> jax.Array:
        c = self.c
        order_L = sequence.positions(self.parallel, x_BLD.shape[1])
        number_BL, position = (documents.number_BL, documents.position_BL) if documents else (None, order_L)

        # Queries, keys and values, normalized and turned by their positions.
        weights = (linear.weights for linear in (self.query, self.key, self.value))
        q_BLHK, k_BLJK, v_BLJK = column_parallel(self.parallel, x_BLD, *weights, float8=self.float8)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLJK = self.query_norm(q_BLHK), self.key_norm(k_BLJK)
        if c.positions == "rope":
            q_BLHK, k_BLJK = (rope(x, c, position) for x in (q_BLHK, k_BLJK))

        # What each query takes of the values.
        keys_BH = _keys_of_heads(key, c.num_heads) if key is not None and c.attn_dropout else None

        def attend(window: int) -> Attend:
            form = Form(c.attention_scale, c.attention_softcap, window)
            kernel = functools.partial(self.attend, rate=c.attn_dropout, form=form)
            return jax.checkpoint(kernel) if c.remat == "attention" else kernel

        arrays = q_BLHK, k_BLJK, v_BLJK, number_BL, keys_BH
        if isinstance(windowed, bool):
            y_BLHK = attend(c.window if windowed else 0)(*arrays)
        else:  # layers of both kinds share this program, which has both kernels
            y_BLHK = jax.lax.cond(windowed, attend(c.window), attend(0), *arrays)
        y_BLD = row_parallel(self.parallel, y_BLHK, *self.out.weights, float8=self.float8)
        return dropout(y_BLD, c.attn_linear_dropout, key, 1, order_L)


def _keys_of_heads(key_B: jax.Array, heads: int) -> jax.Array:
    """Dropout keys (B, heads) for attention's weights, site 0 of a layer: each head has its own."""
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, 0)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, jnp.arange(heads))


def gelu(x: jax.Array, approximate: bool = True) -> jax.Array:
    """GELU (Hendrycks & Gimpel, arXiv 1606.08415), approximately with tanh, or exactly."""
    # In 16 bits each operation would round, and float16's cube overflows from 41 on: the slope is NaN then.
    wide = x.astype(jnp.float32)
    if not approximate or x.dtype == jnp.float32:
        return jax.nn.gelu(wide, approximate).astype(x.dtype)
    # The same as with tanh, which XLA writes to a GPU's memory where it is needed twice.
    slope = 2 * math.sqrt(2 / math.pi)
    return (wide * jax.nn.sigmoid(slope * (wide + 0.044715 * wide**3))).astype(x.dtype)


class MLP(nnx.Module):
    """GELU, squared ReLU (So et al., arXiv 2109.08668), SwiGLU or GEGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, c: Config, parallel: Parallel, rngs: nnx.Rngs, float8: bool):
        self.c, self.parallel, self.float8 = c, parallel, float8
        into = (c.dim,), (c.mlp_dim,), c.use_bias, init_std(c, c.dim), rngs
        self.up = Linear(*into)
        self.gate = Linear(*into) if c.activation in GATED else None
        down_std = init_std(c, c.mlp_dim, output=True)
        self.down = Linear((c.mlp_dim,), (c.dim,), c.use_bias, down_std, rngs)

    def __call__(self, x_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        weights = (linear.weights for linear in (self.up, self.gate) if linear is not None)
        h_BLF, *gate_BLF = column_parallel(self.parallel, x_BLD, *weights, float8=self.float8)
        match self.c.activation:
            case "gelu" | "gelu_exact":
                h_BLF = gelu(h_BLF, self.c.activation == "gelu")
            case "relu2":
                h_BLF = jnp.square(jax.nn.relu(h_BLF))
            case "swiglu":
                h_BLF = h_BLF * jax.nn.silu(*gate_BLF)
            case "geglu":
                h_BLF = h_BLF * gelu(gate_BLF[0])
        y_BLD = row_parallel(self.parallel, h_BLF, *self.down.weights, float8=self.float8)
        return dropout(
            y_BLD, self.c.transformer_dropout, key, 2, sequence.positions(self.parallel, x_BLD.shape[1])
        )


class Block(nnx.Module):
    """One layer: attention and MLP, each of the residual stream, and added to it; norms before or after."""

    def __init__(self, c: Config, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, parts: Parts):
        self.c, self.parallel = c, parallel
        # The residual stream has the model's precision; norms round what each half reads to its own.
        self.types = parts["attention"].dtype, parts["mlp"].dtype

        def norm(unless: str) -> Norm | None:
            return None if c.norm_placement == unless else Norm(c, (c.dim,), c.norm == "layernorm")

        self.attention_norm, self.attention_out_norm = norm("after"), norm("before")
        self.attention = Attention(c, attend, parallel, rngs, parts["attention"].float8)
        self.mlp_norm, self.mlp_out_norm = norm("after"), norm("before")
        self.mlp = MLP(c, parallel, rngs, parts["mlp"].float8)

    def __call__(
        self, x_BLD: jax.Array, key: jax.Array | None, documents: Documents | None, windowed: Windowed = False
    ) -> jax.Array:
        with jax.named_scope("attention"):
            read_BLD = _normalized(self.attention_norm, x_BLD, self.types[0])
            y_BLD = self.attention(read_BLD, key, documents, windowed)
            sum_BLD = x_BLD + _normalized(self.attention_out_norm, y_BLD, x_BLD.dtype)
            sum_BLD = keep(sum_BLD, SUM, self.parallel.mesh)
        with jax.named_scope("mlp"):
            read_BLD = x_BLD if self.c.parallel_residual else sum_BLD
            y_BLD = self.mlp(_normalized(self.mlp_norm, read_BLD, self.types[1]), key)
            sum_BLD = sum_BLD + _normalized(self.mlp_out_norm, y_BLD, x_BLD.dtype)
        return self.parallel.constrain(sum_BLD, "batch", "residual_length", None)


def _normalized(norm: Norm | None, x: jax.Array, dtype) -> jax.Array:
    return x.astype(dtype) if norm is None else norm(x, dtype)


SUM = "sum"  # the checkpoint name of the residual stream between attention and MLP


def _keep_results(*names: str) -> Callable:
    """A policy that keeps what has these names, and what cuDNN's kernel needs of its forward pass."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive, *args, **params):
        return primitive.name == CUDNN_FORWARD or named(primitive, *args, **params)

    return policy


# What a block keeps for its backward pass in addition to its input, by model.remat. The rest is recomputed.
POLICIES = {
    "none": _keep_results(PRODUCT, SUM),  # norms and activations are recomputed, where they are needed
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": _keep_results(PRODUCT),  # products except some of `row_parallel`
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        **{"names_which_can_be_saved": [], "names_which_can_be_offloaded": [PRODUCT]},
        **{"offload_src": "device", "offload_dst": "pinned_host"},
    ),
}


class Network(nnx.Module):
    """The modules of a GPT, with all parameters; `GPT` makes pure functions of it."""

    def __init__(self, c: Config, dtype, attend: Attend, parallel: Parallel, rngs: nnx.Rngs, parts: Parts):
        self.c, self.dtype, self.parallel, self.head_dtype = c, dtype, parallel, parts["head"].dtype
        std, head_std = (c.init_std, c.init_std) if c.init == "gpt2" else (1.0, 0.0)
        self.token_embedding = Embedding(c.vocab_size, c.dim, std, rngs)
        learned = c.positions == "learned"
        table = c.context_length, c.dim, std, rngs
        self.position_embedding = Embedding(*table) if learned else None
        # All layers are created at once, each with a key of its own, and their parameters are stacked.
        keys = jax.random.split(rngs.params(), c.num_blocks)
        self.blocks = nnx.vmap(lambda key: Block(c, attend, parallel, nnx.Rngs(params=key), parts))(keys)
        norm = c, (c.dim,), c.norm == "layernorm"
        self.embedding_norm = Norm(*norm) if c.embedding_norm else None
        self.final_norm = Norm(*norm)
        head = (c.dim,), (c.vocab_size,), c.head_bias, head_std, rngs
        self.head = None if c.tied_embeddings else Linear(*head)

    def __call__(self, tokens_BL: jax.Array, key: MaybeArray, first_row, ends_BL) -> tuple[jax.Array, Head]:
        c = self.c
        # Each row has its own dropout key, by its place in the global batch.
        if key is not None:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(len(tokens_BL)))
        documents = find_documents(tokens_BL, c.end_of_text, ends_BL) if c.document_mask else None
        tokens_BL, documents = sequence.arrange(self.parallel, (tokens_BL, documents))
        order_L = sequence.positions(self.parallel, tokens_BL.shape[1])
        x_BLD = dropout(self.embed(tokens_BL, documents), c.gpt_dropout, key, 0, order_L)

        # All blocks: one compiled loop over the stacked parameters (scan_layers), or one after the other,
        # which compiles longer and runs faster. `graph` is what layers have in common.
        graph, layers = nnx.split(self.blocks)
        has_window = layers_with_window(c)
        differ = len(set(has_window)) > 1

        def block(x_BLD, layer):
            index, parameters = layer
            layer_key = None if key is None else jax.vmap(jax.random.fold_in, (0, None))(key, index + 1)
            windowed = jnp.array(has_window)[index] if differ else has_window[0]
            return nnx.merge(graph, parameters)(x_BLD, layer_key, documents, windowed), None

        # A barrier keeps XLA from merging what is recomputed with what was computed before; in a loop it
        # cannot. With "none", kernels in the compute type may be merged, and so gathered once.
        if c.remat in POLICIES:
            prevent_cse = False if c.scan_layers else (True, c.remat != "none")
            block = jax.checkpoint(block, prevent_cse=prevent_cse, policy=POLICIES[c.remat])
        unroll = 1 if c.scan_layers else c.num_blocks
        x_BLD, _ = jax.lax.scan(block, x_BLD, (jnp.arange(c.num_blocks), layers), unroll=unroll)
        return self.read_out(x_BLD)

    @jax.named_scope("embedding")
    def embed(self, tokens_BL: jax.Array, documents: Documents | None) -> jax.Array:
        """What the first block reads, without dropout."""
        table_VD = self.token_embedding.embedding[...]
        learned = None if self.position_embedding is None else self.position_embedding.embedding[...]
        positions = learned, documents.position_BL if documents else None
        x_BLD = vocab_parallel_embedding(self.parallel, self.dtype, tokens_BL, table_VD, *positions)
        x_BLD = x_BLD if self.c.embedding_scale == 1 else x_BLD * self.c.embedding_scale
        return x_BLD if self.embedding_norm is None else self.embedding_norm(x_BLD)

    @jax.named_scope("head")
    def read_out(self, x_BLD: jax.Array) -> tuple[jax.Array, Head]:
        """The last hidden states, from what the last block gives, and the head that makes logits of them."""
        x_BLD = self.final_norm(x_BLD, self.head_dtype)
        weights = self.head.weights if self.head else (self.token_embedding.embedding[...].T, None)
        softcap = SoftCap(self.c.logit_softcap, self.c.softcap_form)
        return x_BLD, Head(*weights, softcap, self.parallel.kernel_parts)


class GPT:
    """A model as pure functions of its parameters: a nested dict with paths such as blocks/mlp/up/kernel."""

    def __init__(
        self,
        config: Config,  # resolved, the part `model`
        precision: str = "float32",  # of matrix products and activations; or "bfloat16", "float16"
        attend: Attend = plain,
        parallel: Parallel = ONE_DEVICE,
        parts: Parts | None = None,  # the precision of "attention", "mlp" and "head"; None: `precision`
    ):
        dtype = jnp.dtype(precision)
        parts = parts or dict.fromkeys(PARTS, PartPrecision(dtype))
        self._parallel = parallel
        self._build = lambda key: Network(config, dtype, attend, parallel, nnx.Rngs(params=key), parts)
        self._graph, state = nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))
        self.shapes: dict = nnx.to_pure_dict(state)  # of `init`, as jax.eval_shape gives them

    def init(self, key: jax.Array) -> dict:
        """Float32 parameters: kernels as `init_std` says, biases 0, scales 1."""
        return nnx.to_pure_dict(nnx.state(self._build(key), nnx.Param))

    def hidden(
        self, params: dict, tokens_BL: jax.Array, key: MaybeArray = None, first_row=0, ends_BL=None
    ) -> tuple[jax.Array, Head]:
        """The last hidden states (B, L, D) in the head's type, and the head that makes logits of them.

        They are in the order of `sequence.positions`, but the tokens and `ends_BL`, which says what else ends
        a document, in their own. The key is for this step's dropout (None: no dropout), whose masks depend on
        the place of each row, counted from `first_row`, in the global batch.
        """
        return nnx.merge(self._graph, params)(tokens_BL.astype(jnp.int32), key, first_row, ends_BL)

    def hidden_of_layers(
        self, params: dict, tokens_BL: jax.Array, documents: Documents | None = None
    ) -> tuple[jax.Array, Head]:
        """What `hidden` gives without dropout, where the parameters' "blocks" is a list of each layer's.

        While JAX traces it, `attend` is called once for each layer, in their order. The documents are given.
        """
        layers = params["blocks"]
        network = nnx.merge(self._graph, {**params, "blocks": layers[0]})
        graph, _ = nnx.split(network.blocks)
        x_BLD = network.embed(tokens_BL, documents)
        for parameters, windowed in zip(layers, layers_with_window(network.c), strict=True):
            x_BLD = nnx.merge(graph, parameters)(x_BLD, None, documents, windowed)
        return network.read_out(x_BLD)

    def __call__(self, params: dict, tokens_BL: jax.Array, key: MaybeArray = None, first_row=0) -> jax.Array:
        """Float32 logits (B, L, V) of the next token, all in memory; arguments as for `hidden`."""
        x_BLD, head = self.hidden(params, tokens_BL, key, first_row)
        return self._parallel.constrain(
            head(sequence.restore(self._parallel, x_BLD)), "batch", "length", "vocab"
        )
