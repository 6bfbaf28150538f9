"""Attention kernels of whole sequences: `plain`, `cudnn`, `blockwise`.

Names of arrays carry their dimensions as in `model/gpt.py`. In `blockwise`, the key heads of all rows form m
groups of g heads; the queries of a row form n blocks; X counts a block's queries of all R query heads that
share a key head; S counts the keys that a block may see.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trainit.model.dropout import drop
from trainit.parallel.matmul import PRODUCT

BLOCK = 128  # queries of a block; matrix units like that
STAGES = 8  # parts of a row: the blocks of one all read the same keys, so that they are one program
SCORES_MIB = 1.0  # scores in memory at once: on CPUs they stay in a core's cache; 8 MiB take a third longer
SCORES_MIB_OF_GPUS = 256.0  # which need larger blocks to be busy
# JAX's name for cuDNN's forward pass. Its backward pass takes the results: attention's, and a logarithm for
# each query.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


@dataclass(frozen=True)
class Form:
    """How products of queries and keys become scores, and which keys a query sees."""

    scale: float = 0.0  # of the products; 0: 1 / sqrt(K)
    softcap: float = 0.0  # 0: none
    window: int = 0  # keys that a query sees, its own the last; 0: all up to its own

    def divisor(self, size: int) -> float:
        return 1 / self.scale if self.scale else math.sqrt(size)

    def scores(self, products: jax.Array, size: int) -> jax.Array:
        """Scores of products over a head size."""
        scores = products / self.divisor(size)
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

    def pull(self, d_scores: jax.Array, scores: jax.Array, size: int) -> jax.Array:
        """The gradient by the products. Scores may be -inf, where their gradient is 0."""
        d_products = d_scores / self.divisor(size)
        if not self.softcap:
            return d_products
        return d_products * (1 - jnp.square(jnp.maximum(scores, -self.softcap) / self.softcap))

    def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether a query sees a key, by their positions in the row."""
        visible = query >= key
        return visible & (query - key < self.window) if self.window else visible


def plain(q_BLHK, k_BSJK, v_BSJK, document_BL=None, key_BH=None, rate: float = 0.0, form=Form()) -> jax.Array:
    """Causal softmax attention, with all scores in memory: (B, L, H, K).

    H / J query heads share a key head. A token sees only its own document, by number (None: a row is one).
    The weights of each row and query head have a dropout key (None: no dropout).
    """
    B, L, H, K = q_BLHK.shape
    S, J = k_BSJK.shape[1:3]
    q_BLJRK = q_BLHK.reshape(B, L, J, H // J, K)
    # Query heads that share a key head are one axis. Scores are float32, and -inf where nothing may be seen.
    scores = jnp.einsum("bljrk,bsjk->bjrls", q_BLJRK, k_BSJK, preferred_element_type=jnp.float32)
    visible = form.visible(jnp.arange(L)[:, None], jnp.arange(S))
    if document_BL is not None:
        visible = visible & (document_BL[:, None, None, :, None] == document_BL[:, None, None, None, :])
    scores = jnp.where(visible, form.scores(scores, K), -jnp.inf)
    # Weights are rounded to the values' type only after softmax and dropout.
    weights = jax.nn.softmax(scores, axis=-1)
    keys = None if key_BH is None else key_BH.reshape(B, J, -1, 1, 1)
    weights = drop(weights, rate, keys, jnp.arange(L)[:, None], jnp.arange(S)).astype(v_BSJK.dtype)
    y_BLHK = jnp.einsum("bjrls,bsjk->bljrk", weights, v_BSJK).reshape(B, L, H, K)
    return checkpoint_name(y_BLHK, PRODUCT)


def cudnn(q_BLHK, k_BLJK, v_BLJK, document_BL=None, key_BH=None, rate: float = 0.0, form=Form()) -> jax.Array:
    """What `plain` gives, without dropout and soft cap, by cuDNN's kernel for NVIDIA GPUs.

    It reads documents as a mask (B, 1, L, L), which JAX turns into what is added to scores, in their type.
    """
    options: dict[str, Any] = {"is_causal": True, "implementation": "cudnn"}
    if document_BL is not None:
        options["mask"] = (document_BL[:, :, None] == document_BL[:, None])[:, None]
    options |= {"scale": form.scale} if form.scale else {}
    options |= {"local_window_size": (form.window - 1, 0)} if form.window else {}
    return jax.nn.dot_product_attention(q_BLHK, k_BLJK, v_BLJK, **options)


def blockwise(
    q_BLHK, k_BLJK, v_BLJK, document_BL=None, key_BH=None, rate=0.0, form=Form(), block=BLOCK, on_cpu=True
) -> jax.Array:
    """What `plain` gives, in memory linear in L.

    Only the scores of `block` queries and some heads are in memory at once. They are computed again for the
    gradient, from the logarithm of each softmax's denominator, as in FlashAttention (Dao et al. 2022, arXiv
    2205.14135). A row is divided into up to STAGES parts; the queries of one see the keys up to its end, so
    that little more than half of all products are computed; with a window, only those that one of them sees.
    On CPUs, less is in memory at once, and blocks are put together in float32 (`cpu_workarounds.wide`).
    """
    if q_BLHK.shape[1] <= block:
        return plain(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, rate, form)
    return _blockwise(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, rate, form, block, on_cpu)


@dataclass(frozen=True)
class Blocks:
    """How queries (B, L, H, K) and keys of J heads are divided into groups of heads and blocks of queries."""

    shape: tuple[int, int, int, int]
    key_heads: int  # J
    form: Form
    block: int
    on_cpu: bool

    @property
    def shared(self) -> int:
        """R: how many query heads share a key head."""
        return self.shape[2] // self.key_heads

    @property
    def group(self) -> int:
        """g: how many key heads are computed at once; the most whose scores fit, or one."""
        heads = self.shape[0] * self.key_heads
        widest = max(end - start for start, end in map(self.seen_keys, range(self.stages)))
        scores_mib = SCORES_MIB if self.on_cpu else SCORES_MIB_OF_GPUS
        maximum = scores_mib * 2**20 / (4 * self.shared * self.block * widest)
        return max(g for g in range(1, heads + 1) if heads % g == 0 and g <= max(maximum, 1))

    @property
    def per_stage(self) -> int:
        """Blocks of a stage."""
        return -(-self.shape[1] // (self.block * STAGES))

    @property
    def stages(self) -> int:
        return -(-self.shape[1] // (self.block * self.per_stage))

    def seen_keys(self, stage: int) -> tuple[int, int]:
        """Between which keys all lie that the queries of a stage see."""
        size = self.per_stage * self.block
        first = max(stage * size - self.form.window + 1, 0) if self.form.window else 0
        return first - first % self.block, min((stage + 1) * size, self.shape[1])

    def keys(self, x_BLJK: jax.Array) -> jax.Array:
        """Keys or values (B, L, J, K) in groups (m, g, L, K)."""
        x = jnp.swapaxes(x_BLJK, 1, 2)
        return x.reshape(-1, self.group, *x.shape[2:])

    def join_keys(self, x_mgKL: jax.Array) -> jax.Array:
        """Keys or values (B, L, J, K) from groups of their transposes."""
        B, L, _, K = self.shape
        return jnp.transpose(x_mgKL.reshape(B, self.key_heads, K, L), (0, 3, 1, 2))

    def queries(self, x_BLHK: jax.Array) -> jax.Array:
        """Queries (B, L, H, K) in groups and blocks (m, n, g, X, K); the last block is padded with 0."""
        B, L, _, K = x_BLHK.shape
        more = self.stages * self.per_stage * self.block - L
        x = jnp.pad(x_BLHK, ((0, 0), (0, more), (0, 0), (0, 0)))
        x = x.reshape(B, -1, self.block, self.key_heads, self.shared, K)
        x = jnp.transpose(x, (0, 3, 1, 4, 2, 5))
        return jnp.swapaxes(x.reshape(-1, self.group, x.shape[2], self.shared * self.block, K), 1, 2)

    def join_queries(self, x_mngXK: jax.Array) -> jax.Array:
        """Queries (B, L, H, K) from groups and blocks, without the padding."""
        B, L, H, K = self.shape
        x = jnp.swapaxes(x_mngXK, 1, 2).reshape(B, self.key_heads, -1, self.shared, self.block, K)
        return jnp.transpose(x, (0, 2, 4, 1, 3, 5)).reshape(B, -1, H, K)[:, :L]

    def documents(self, document_BL: jax.Array | None) -> tuple:
        """Numbers of documents of queries (m, n, g, X), padded with the last, and of keys (m, g, L)."""
        if document_BL is None:
            return None, None
        L = document_BL.shape[1]
        keys = jnp.repeat(document_BL, self.key_heads, axis=0).reshape(-1, self.group, L)
        more = self.stages * self.per_stage * self.block - L
        rows = jnp.pad(keys, ((0, 0), (0, 0), (0, more)), mode="edge")
        rows = jnp.swapaxes(rows.reshape(len(keys), self.group, -1, self.block), 1, 2)
        return jnp.tile(rows, self.shared), keys

    def positions(self, index: jax.Array) -> jax.Array:
        """Positions (X,) of the queries of the block with this index; those that pad it have the last."""
        position_X = index * self.block + jnp.arange(self.shared * self.block) % self.block
        return jnp.minimum(position_X, self.shape[1] - 1)

    def scores(self, q_gXK, kt_gKS, query_X, key_S, query_gX, key_gS) -> jax.Array:
        """Float32 scores (g, X, S); -inf for keys that queries do not see, by positions and documents."""
        products = jnp.matmul(q_gXK, kt_gKS, preferred_element_type=jnp.float32)
        visible = self.form.visible(query_X[:, None], key_S)
        if query_gX is not None:
            visible = visible & (query_gX[:, :, None] == key_gS[:, None])
        return jnp.where(visible, self.form.scores(products, q_gXK.shape[2]), -jnp.inf)


def dropout_keys(cut: Blocks, key_BH: jax.Array | None) -> jax.Array | None:
    """Keys (m, g, X, 1) of dropout, each for the queries of a head."""
    if key_BH is None:
        return None
    return jnp.repeat(key_BH.reshape(-1, cut.group, cut.shared), cut.block, axis=2)[..., None]


def _of_stage(cut: Blocks, stage: int, arrays):
    """The blocks (n, ...) of one stage, from a tree of arrays of all blocks."""
    first, last = stage * cut.per_stage, (stage + 1) * cut.per_stage
    return jax.tree.map(lambda array: array[first:last], arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _blockwise(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, rate: float, *cut):
    return _forward(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, rate, *cut)[0]


def _forward(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, rate: float, *how):
    """The result, and what the backward pass needs: the inputs, the result, logarithms of denominators."""
    cut = Blocks(q_BLHK.shape, k_BLJK.shape[2], *how)
    indices = jnp.arange(cut.stages * cut.per_stage)

    # One group of heads after the other, then one stage, in it one block of queries.
    def group(arrays):
        q_ngXK, k_gLK, v_gLK, (query_ngX, key_gL), key_gX1 = arrays
        kt_gKL, parts = jnp.swapaxes(k_gLK, 1, 2), []
        for stage in range(cut.stages):
            start, end = cut.seen_keys(stage)
            kt_gKS, v_gSK, key_S = kt_gKL[..., start:end], v_gLK[:, start:end], jnp.arange(start, end)
            key_gS = None if key_gL is None else key_gL[:, start:end]

            def attend(indexed, kt_gKS=kt_gKS, v_gSK=v_gSK, key_S=key_S, key_gS=key_gS):
                index, q_gXK, query_gX = indexed
                query_X = cut.positions(index)
                # Softmax with the largest score subtracted, divided by its denominator after the product.
                scores = cut.scores(q_gXK, kt_gKS, query_X, key_S, query_gX, key_gS)
                top = jnp.max(scores, axis=-1, keepdims=True)
                weights = jnp.exp(scores - top)
                total = jnp.sum(weights, axis=-1, keepdims=True)
                weights = drop(weights, rate, key_gX1, query_X[:, None], key_S).astype(v_gSK.dtype)
                y = jnp.matmul(weights, v_gSK, preferred_element_type=jnp.float32) / total
                return y.astype(jnp.float32 if cut.on_cpu else q_gXK.dtype), (top + jnp.log(total))[..., 0]

            parts.append(jax.lax.map(attend, _of_stage(cut, stage, (indices, q_ngXK, query_ngX))))
        return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))

    arrays = (
        cut.queries(q_BLHK),
        cut.keys(k_BLJK),
        cut.keys(v_BLJK),
        cut.documents(document_BL),
        dropout_keys(cut, key_BH),
    )
    y_mngXK, log_mngX = jax.lax.map(group, arrays)
    y_BLHK, log_mngX = (checkpoint_name(x, PRODUCT) for x in (cut.join_queries(y_mngXK), log_mngX))
    y_BLHK = y_BLHK.astype(q_BLHK.dtype)
    return y_BLHK, (q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, y_BLHK, log_mngX)


def _backward(rate: float, form: Form, block: int, on_cpu: bool, residuals, dy_BLHK):
    """The gradients of queries, keys and values.

    Each product takes its large matrix as it lies in memory, because on CPUs others take up to three times as
    long. So the gradients of keys and values are summed in transposed form.
    """
    q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, y_BLHK, log_mngX = residuals
    cut = Blocks(q_BLHK.shape, k_BLJK.shape[2], form, block, on_cpu)
    indices = jnp.arange(cut.stages * cut.per_stage)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def group(arrays):
        *of_queries, k_gLK, v_gLK, key_gL, key_gX1 = arrays
        kt_gKL, vt_gKL = jnp.swapaxes(k_gLK, 1, 2), jnp.swapaxes(v_gLK, 1, 2)
        # `zeros_like` of what is summed, so that shard_map takes them to differ between devices as well.
        totals, parts = jnp.zeros_like(jnp.stack([kt_gKL, vt_gKL]), jnp.float32), []
        for stage in range(cut.stages):
            start, end = cut.seen_keys(stage)
            kt_gKS, vt_gKS, k_gSK = kt_gKL[..., start:end], vt_gKL[..., start:end], k_gLK[:, start:end]
            key_S, key_gS = jnp.arange(start, end), None if key_gL is None else key_gL[:, start:end]

            def pull(total, indexed, kt_gKS=kt_gKS, vt_gKS=vt_gKS, k_gSK=k_gSK, key_S=key_S, key_gS=key_gS):
                index, (q_gXK, query_gX, dy_gXK, delta_gX1, log_gX) = indexed
                query_X = cut.positions(index)
                # The softmax again, the gradient by its inputs (the scores), and by keys and values.
                scores = cut.scores(q_gXK, kt_gKS, query_X, key_S, query_gX, key_gS)
                weights = jnp.exp(scores - log_gX[..., None])
                d_weights = drop(product(dy_gXK, vt_gKS), rate, key_gX1, query_X[:, None], key_S)
                d_scores = form.pull(weights * (d_weights - delta_gX1), scores, q_gXK.shape[2])
                d_scores = d_scores.astype(q_gXK.dtype)
                weights = drop(weights, rate, key_gX1, query_X[:, None], key_S).astype(q_gXK.dtype)
                d_keys = product(jnp.swapaxes(q_gXK, 1, 2), d_scores)
                d_values = product(jnp.swapaxes(dy_gXK, 1, 2), weights)
                dtype = jnp.float32 if cut.on_cpu else q_gXK.dtype
                return total + jnp.stack([d_keys, d_values]), product(d_scores, k_gSK).astype(dtype)

            zeros = jnp.zeros_like(totals[..., start:end])
            # Gradients of keys and values add up over all blocks that saw them.
            total, dq_ngXK = jax.lax.scan(pull, zeros, _of_stage(cut, stage, (indices, tuple(of_queries))))
            # `at[...].add` would bring an array of constants, with which `jax.checkpoint` of JAX 0.10 fails.
            total += totals[..., start:end]
            totals = jax.lax.dynamic_update_slice_in_dim(totals, total, start, axis=-1)
            parts.append(dq_ngXK)
        return jnp.concatenate(parts), *totals.astype(jnp.float32 if cut.on_cpu else k_gLK.dtype)

    # The softmax's gradient needs sum(y * dy) for each query (FlashAttention, section 3.1).
    delta_BLH1 = jnp.sum(y_BLHK.astype(jnp.float32) * dy_BLHK, axis=-1, keepdims=True)
    queries, keys = cut.documents(document_BL)
    of_queries = (cut.queries(q_BLHK), queries, cut.queries(dy_BLHK), cut.queries(delta_BLH1), log_mngX)
    arrays = (*of_queries, cut.keys(k_BLJK), cut.keys(v_BLJK), keys, dropout_keys(cut, key_BH))
    dq, dk, dv = jax.lax.map(group, arrays)
    gradients = cut.join_queries(dq), cut.join_keys(dk), cut.join_keys(dv)
    return *(gradient.astype(q_BLHK.dtype) for gradient in gradients), None, None


_blockwise.defvjp(_forward, _backward)
