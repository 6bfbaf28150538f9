"""Attention kernels (`plain`, `cudnn`, `blockwise`), and dropout.

Names of arrays carry their dimensions as in `model/gpt.py`. In `blockwise`, the key heads of all rows form m
groups of g heads; the queries of a row form n blocks; X counts a block's queries of all R query heads that
share a key head; S counts the keys that a block may see.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trainit.parallel.collectives import Parallel
from trainit.parallel.matmul import PRODUCT

BLOCK = 128  # queries of a block; matrix units like that
STAGES = 8  # parts of a row: the blocks of one all read the same keys, so that they are one program
SCORES_MIB = 1.0  # scores in memory at once: on CPUs they stay in a core's cache; 8 MiB take a third longer
SCORES_MIB_OF_GPUS = 256.0  # which need larger blocks to be busy


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


def kernel_on(name: str, platform: str, parallel: Parallel) -> Callable:
    """The kernel of this name (`RunShape.attention`), so that each device computes its own rows and heads."""
    blocks = functools.partial(blockwise, on_cpu=platform == "cpu")
    kernels: dict[str, Callable] = {"plain": plain, "blockwise": blocks, "cudnn": cudnn}
    queries = parallel.spec("batch", "length", "heads", None)
    keys = parallel.spec("batch", "length", "kv_heads", None)
    inputs = (queries, keys, keys, parallel.spec("batch", "length"), parallel.spec("batch", "kv_heads"))

    def attend(*arrays, rate: float, form: Form) -> jax.Array:
        kernel = functools.partial(kernels[name], rate=rate, form=form)
        return parallel.shard_map_if_needed(kernel, inputs, queries)(*arrays)

    return attend


def dropout(x: jax.Array, rate: float, key: jax.Array | None, site: jax.Array | int) -> jax.Array:
    """Zeroes entries with probability `rate` and scales up the rest; gives x itself without a key.

    The key is one, or an array of keys for x's first axes: a row's mask then depends on its own key alone.
    For each `site` (a place in the layer, a block of queries) a key gives another mask.
    """
    if not rate or key is None:
        return x
    if key.ndim:
        return jax.vmap(lambda row, row_key: dropout(row, rate, row_key, site))(x, key)
    keep = jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def plain(q_BLHK, k_BSJK, v_BSJK, document_BL=None, key_BJ=None, rate: float = 0.0, form=Form()) -> jax.Array:
    """Causal softmax attention, with all scores in memory: (B, L, H, K).

    H / J query heads share a key head. A token sees only its own document, by number (None: a row is one).
    The weights of each row and key head have a dropout key (None: no dropout).
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
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, key_BJ, 0).astype(v_BSJK.dtype)
    y_BLHK = jnp.einsum("bjrls,bsjk->bljrk", weights, v_BSJK).reshape(B, L, H, K)
    return checkpoint_name(y_BLHK, PRODUCT)


def cudnn(q_BLHK, k_BLJK, v_BLJK, document_BL=None, key_BJ=None, rate: float = 0.0, form=Form()) -> jax.Array:
    """What `plain` gives, without documents, dropout and soft cap, by cuDNN's kernel for NVIDIA GPUs."""
    options: dict[str, Any] = {"is_causal": True, "implementation": "cudnn"}
    options |= {"scale": form.scale} if form.scale else {}
    options |= {"local_window_size": (form.window - 1, 0)} if form.window else {}
    return checkpoint_name(jax.nn.dot_product_attention(q_BLHK, k_BLJK, v_BLJK, **options), PRODUCT)


def blockwise(
    q_BLHK, k_BLJK, v_BLJK, document_BL=None, key_BJ=None, rate=0.0, form=Form(), block=BLOCK, on_cpu=True
) -> jax.Array:
    """What `plain` gives, except for other dropout masks, in memory linear in L.

    Only the scores of `block` queries and some heads are in memory at once. They are computed again for the
    gradient, from the logarithm of each softmax's denominator, as in FlashAttention (Dao et al. 2022, arXiv
    2205.14135). A row is divided into up to STAGES parts; the queries of one see the keys up to its end, so
    that little more than half of all products are computed; with a window, only those that one of them sees.
    On CPUs, less is in memory at once, and blocks are put together in float32 (`cpu_workarounds.wide`).
    """
    if q_BLHK.shape[1] <= block:
        return plain(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, rate, form)
    return _blockwise(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, rate, form, block, on_cpu)


@dataclass(frozen=True)
class _Blocks:
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

    def of_stage(self, stage: int, arrays):
        """The blocks (n, ...) of one stage, from a tree of arrays of all blocks."""
        first, last = stage * self.per_stage, (stage + 1) * self.per_stage
        return jax.tree.map(lambda array: array[first:last], arrays)

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

    def scores(self, q_gXK, kt_gKS, first, index, query_gX, key_gL) -> jax.Array:
        """Float32 scores (g, X, S) of the block with this index; -inf for keys it must not see.

        The first key is the row's `first`.
        """
        X, S = q_gXK.shape[1], kt_gKS.shape[2]
        products = jnp.matmul(q_gXK, kt_gKS, preferred_element_type=jnp.float32)
        query_X = index * self.block + jnp.arange(X) % self.block
        if self.form.window:  # what pads the last block sees as much as the row's last query
            query_X = jnp.minimum(query_X, self.shape[1] - 1)
        visible = self.form.visible(query_X[:, None], first + jnp.arange(S))
        if query_gX is not None:
            visible = visible & (query_gX[:, :, None] == key_gL[:, None, first : first + S])
        return jnp.where(visible, self.form.scores(products, q_gXK.shape[2]), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _blockwise(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, rate: float, *cut):
    return _forward(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, rate, *cut)[0]


def _forward(q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, rate: float, *how):
    """The result, and what the backward pass needs: the inputs, the result, logarithms of denominators."""
    cut = _Blocks(q_BLHK.shape, k_BLJK.shape[2], *how)
    indices = jnp.arange(cut.stages * cut.per_stage)

    # One group of heads after the other, then one stage, in it one block of queries.
    def group(arrays):
        q_ngXK, k_gLK, v_gLK, (query_ngX, key_gL), key_g = arrays
        kt_gKL, parts = jnp.swapaxes(k_gLK, 1, 2), []
        for stage in range(cut.stages):
            start, end = cut.seen_keys(stage)
            kt_gKS, v_gSK = kt_gKL[..., start:end], v_gLK[:, start:end]

            def attend(indexed, kt_gKS=kt_gKS, v_gSK=v_gSK, start=start):
                index, q_gXK, query_gX = indexed
                # Softmax with the largest score subtracted, divided by its denominator after the product.
                scores = cut.scores(q_gXK, kt_gKS, start, index, query_gX, key_gL)
                top = jnp.max(scores, axis=-1, keepdims=True)
                weights = jnp.exp(scores - top)
                total = jnp.sum(weights, axis=-1, keepdims=True)
                weights = dropout(weights, rate, key_g, index).astype(v_gSK.dtype)
                y = jnp.matmul(weights, v_gSK, preferred_element_type=jnp.float32) / total
                return y.astype(jnp.float32 if cut.on_cpu else q_gXK.dtype), (top + jnp.log(total))[..., 0]

            parts.append(jax.lax.map(attend, cut.of_stage(stage, (indices, q_ngXK, query_ngX))))
        return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))

    keys_mg = None if key_BJ is None else key_BJ.reshape(-1, cut.group)
    arrays = (cut.queries(q_BLHK), cut.keys(k_BLJK), cut.keys(v_BLJK), cut.documents(document_BL), keys_mg)
    y_mngXK, log_mngX = jax.lax.map(group, arrays)
    y_BLHK, log_mngX = (checkpoint_name(x, PRODUCT) for x in (cut.join_queries(y_mngXK), log_mngX))
    y_BLHK = y_BLHK.astype(q_BLHK.dtype)
    return y_BLHK, (q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, y_BLHK, log_mngX)


def _backward(rate: float, form: Form, block: int, on_cpu: bool, residuals, dy_BLHK):
    """The gradients of queries, keys and values.

    Each product takes its large matrix as it lies in memory, because on CPUs others take up to three times as
    long. So the gradients of keys and values are summed in transposed form.
    """
    q_BLHK, k_BLJK, v_BLJK, document_BL, key_BJ, y_BLHK, log_mngX = residuals
    cut = _Blocks(q_BLHK.shape, k_BLJK.shape[2], form, block, on_cpu)
    indices = jnp.arange(cut.stages * cut.per_stage)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def group(arrays):
        *of_queries, k_gLK, v_gLK, key_gL, key_g = arrays
        kt_gKL, vt_gKL = jnp.swapaxes(k_gLK, 1, 2), jnp.swapaxes(v_gLK, 1, 2)
        # `zeros_like` of what is summed, so that shard_map takes them to differ between devices as well.
        totals, parts = jnp.zeros_like(jnp.stack([kt_gKL, vt_gKL]), jnp.float32), []
        for stage in range(cut.stages):
            start, end = cut.seen_keys(stage)
            kt_gKS, vt_gKS, k_gSK = kt_gKL[..., start:end], vt_gKL[..., start:end], k_gLK[:, start:end]

            def pull(total, indexed, kt_gKS=kt_gKS, vt_gKS=vt_gKS, k_gSK=k_gSK, start=start):
                index, (q_gXK, query_gX, dy_gXK, delta_gX1, log_gX) = indexed
                # The softmax again, the gradient by its inputs (the scores), and by keys and values.
                scores = cut.scores(q_gXK, kt_gKS, start, index, query_gX, key_gL)
                weights = jnp.exp(scores - log_gX[..., None])
                d_weights = dropout(product(dy_gXK, vt_gKS), rate, key_g, index)
                d_scores = form.pull(weights * (d_weights - delta_gX1), scores, q_gXK.shape[2])
                d_scores = d_scores.astype(q_gXK.dtype)
                weights = dropout(weights, rate, key_g, index).astype(q_gXK.dtype)
                d_keys = product(jnp.swapaxes(q_gXK, 1, 2), d_scores)
                d_values = product(jnp.swapaxes(dy_gXK, 1, 2), weights)
                dtype = jnp.float32 if cut.on_cpu else q_gXK.dtype
                return total + jnp.stack([d_keys, d_values]), product(d_scores, k_gSK).astype(dtype)

            zeros = jnp.zeros_like(totals[..., start:end])
            # Gradients of keys and values add up over all blocks that saw them.
            total, dq_ngXK = jax.lax.scan(pull, zeros, cut.of_stage(stage, (indices, tuple(of_queries))))
            totals = totals.at[..., start:end].add(total)
            parts.append(dq_ngXK)
        return jnp.concatenate(parts), *totals.astype(jnp.float32 if cut.on_cpu else k_gLK.dtype)

    # The softmax's gradient needs sum(y * dy) for each query (FlashAttention, section 3.1).
    delta_BLH1 = jnp.sum(y_BLHK.astype(jnp.float32) * dy_BLHK, axis=-1, keepdims=True)
    queries, keys = cut.documents(document_BL)
    keys_mg = None if key_BJ is None else key_BJ.reshape(-1, cut.group)
    of_queries = (cut.queries(q_BLHK), queries, cut.queries(dy_BLHK), cut.queries(delta_BLH1), log_mngX)
    arrays = (*of_queries, cut.keys(k_BLJK), cut.keys(v_BLJK), keys, keys_mg)
    dq, dk, dv = jax.lax.map(group, arrays)
    gradients = cut.join_queries(dq), cut.join_keys(dk), cut.join_keys(dv)
    return *(gradient.astype(q_BLHK.dtype) for gradient in gradients), None, None


_blockwise.defvjp(_forward, _backward)
