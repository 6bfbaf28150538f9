"""Attention where sequences are split over the mesh axis `context`: keys and values travel between devices.

With c devices a row has 2 c chunks of C positions, of which device i has two, chunks i and 2 c - 1 - i
(`parallel.sequence`). Queries see the keys of all chunks before their own, and of a part of their own. So
all devices have equally many pairs of chunks to compute: 2 c + 1. How they come together is a choice:

- `ring`: in c - 1 steps, each device passes the keys and values that it holds to the next one (Liu et al.
  2023, arXiv 2310.01889). While they travel, it computes two pairs with those that came before.
- `gather`: each device gets the keys and values of whole rows at once, in one exchange.

The softmax over all keys is put together pair by pair, from the largest score and the denominator so far
(Milakov & Gimelshein 2018, arXiv 1805.02867). The backward pass computes the pairs again, from logarithms of
the denominators. Gradients of keys and values travel with these around the whole ring, or are summed and
scattered.

Names of arrays carry their dimensions as in `model/attention.py`. Here L counts a device's positions, 2 C; u
its two chunks; and w those of which it holds keys and values: 2, or all 2 c.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trainit.model.attention import BLOCK, Blocks, Form, dropout_keys
from trainit.model.dropout import drop
from trainit.parallel.matmul import PRODUCT


@dataclass(frozen=True)
class Split:
    """How rows are split, and how their attention is computed."""

    axis: str  # of the mesh
    devices: int  # c
    gathers: bool
    on_cpu: bool
    rate: float
    form: Form


class Pair(NamedTuple):
    """One of this device's chunks of queries, and a chunk of keys; numbers, or arrays of several pairs."""

    own: jax.Array  # of the two chunks that this device has: 0 or 1
    device: jax.Array  # that has the keys' chunk in its part of a row
    which: jax.Array  # of that device's two chunks


def attend(*arrays, axis: str, devices: int, gathers: bool, on_cpu: bool, rate: float, form: Form):
    """What `attention.plain` gives, on one device of those that have parts of the rows; inside shard_map.

    Queries, keys and values are this device's part of rows, documents are of whole rows; all are in the order
    of `sequence.positions`.
    """
    return _attend(Split(axis, devices, gathers, on_cpu, rate, form), *arrays)


class _Pairs:
    """Computes pairs of chunks, of queries of this device."""

    def __init__(self, split: Split, q_BLHK, k_BLJK, document_BL, key_BH):
        (B, L, H, K), self.split = q_BLHK.shape, split
        # Positions depend on this 0 of the queries, which XLA removes. Without it, JAX computes the masks of
        # all pairs and blocks apart from the queries, and keeps them: 14 GiB for 131,072 tokens on 8 H100s.
        zero = 0 * jax.lax.bitcast_convert_type(q_BLHK[0, 0, 0, 0].astype(jnp.float32), jnp.int32)
        self.device = jax.lax.axis_index(split.axis) + zero
        # A chunk is cut into blocks of queries as a whole row would be; each looks at all keys of a chunk.
        whole, block = replace(split.form, window=0), min(BLOCK, L // 2)
        self.cut = Blocks((B, L // 2, H, K), k_BLJK.shape[2], whole, block, split.on_cpu)
        self.scored = replace(self.cut, form=split.form)
        self.q_umngXK, self.key_mgX1 = self.chunks(self.cut.queries, q_BLHK), dropout_keys(self.cut, key_BH)
        self.documents: tuple | None = None
        if document_BL is not None:  # of all 2 c chunks, of queries (m, n, g, X) and of keys (m, g, C)
            parts = jnp.split(document_BL, 2 * split.devices, axis=1)
            self.documents = jax.tree.map(lambda *x: jnp.stack(x), *map(self.cut.documents, parts))

    def chunks(self, function: Callable, x_BL: jax.Array) -> jax.Array:
        """function(chunk) of each of the two chunks (B, C, ...) of this device's part of rows, stacked."""
        return jnp.stack([function(chunk) for chunk in jnp.split(x_BL, 2, axis=1)])

    def joined(self, function: Callable, x_u: jax.Array) -> jax.Array:
        """The part of rows (B, L, ...) whose two chunks are function(x_u[i])."""
        return jnp.concatenate([function(x_u[0]), function(x_u[1])], axis=1)

    def of_step(self, step: jax.Array | int) -> Pair:
        """The pairs with the keys of the device that is `step` before this one; those of 0 are its own."""
        if isinstance(step, int) and step == 0:  # first each chunk with its own keys: all queries see some
            # Arrays of constants would make `jax.checkpoint` of JAX 0.10 fail in layers that are unrolled.
            number = jnp.arange(3)
            return Pair((number > 0).astype(jnp.int32), jnp.stack([self.device] * 3), number % 2)
        # The second chunk of queries sees the first chunk of keys of each device. If that device comes before
        # this one, so does the first chunk of queries; else, the second one sees both chunks of keys.
        device = (self.device - step) % self.split.devices
        other = (device > self.device).astype(jnp.int32)
        own, which = jnp.stack([jnp.ones_like(other), other]), jnp.stack([jnp.zeros_like(other), other])
        return Pair(own, jnp.stack([device, device]), which)

    def of_row(self) -> Pair:
        """All pairs of this device: each chunk of queries with its own keys, then with those before."""
        c, number = self.split.devices, jnp.arange(2 * self.split.devices + 1)
        own = (number > self.device).astype(jnp.int32)
        chunk = jnp.where(own == 1, 2 * c - number, self.device - number)
        which = (chunk >= c).astype(jnp.int32)
        return Pair(own, jnp.where(which == 1, 2 * c - 1 - chunk, chunk), which)

    def held(self, pair: Pair) -> jax.Array:
        """Where a pair's keys are among those that this device holds."""
        return 2 * pair.device + pair.which if self.split.gathers else pair.which

    def see(self, kv_wmgCK: tuple, state: tuple, pair: Pair) -> tuple[tuple, None]:
        """The state of queries that have seen a pair's keys, too.

        That is the sum of values (u, m, n, g, X, K), weighted by exp(score - top); top, the largest score
        (u, m, n, g, X); and the sum of weights (u, m, n, g, X). All are float32.
        """
        query, key_C, marks = self._beside(pair)

        def group(arrays):
            (k_gCK, v_gCK), q_ngXK, of_queries, (query_ngX, key_gC, key_gX1) = arrays
            kt_gKC = jnp.swapaxes(k_gCK, 1, 2)

            def block(indexed):
                index, q_gXK, query_gX, (y_gXK, top_gX, total_gX) = indexed
                scores = self.scored.scores(q_gXK, kt_gKC, query(index), key_C, query_gX, key_gC)
                new_gX = jnp.maximum(top_gX, jnp.max(scores, axis=-1))
                weights, shrink_gX = jnp.exp(scores - new_gX[..., None]), jnp.exp(top_gX - new_gX)
                total_gX = total_gX * shrink_gX + jnp.sum(weights, axis=-1)
                weights = drop(weights, self.split.rate, key_gX1, query(index)[:, None], key_C)
                added = jnp.matmul(weights.astype(v_gCK.dtype), v_gCK, preferred_element_type=jnp.float32)
                return y_gXK * shrink_gX[..., None] + added, new_gX, total_gX

            return jax.lax.map(block, (jnp.arange(len(q_ngXK)), q_ngXK, query_ngX, of_queries))

        def update(*part):
            kv = jax.tree.map(lambda x: x[self.held(pair)], kv_wmgCK)
            return jax.lax.map(group, (kv, self.q_umngXK[pair.own], part, marks))

        part = self._if_seen(pair, update, *(x[pair.own] for x in state))
        return tuple(x.at[pair.own].set(new) for x, new in zip(state, part, strict=True)), None

    def pull(self, kv_wmgCK: tuple, of_queries: tuple, sums: tuple, pair: Pair) -> tuple[tuple, None]:
        """Adds a pair's part of the gradients, of queries (as queries) and of keys and values.

        The last are (w, 2, m, g, K, C): transposed, as in `attention.blockwise`. `of_queries` are the
        gradient dy by the result, sum(y * dy), and the logarithms of the denominators.
        """
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        query, key_C, marks = self._beside(pair)

        def group(arrays):
            (k_gCK, v_gCK), of_queries, (query_ngX, key_gC, key_gX1) = arrays
            kt_gKC, vt_gKC = jnp.swapaxes(k_gCK, 1, 2), jnp.swapaxes(v_gCK, 1, 2)

            def block(total, indexed):
                # The softmax again, the gradient by its inputs (the scores), and by keys and values.
                index, query_gX, (q_gXK, dy_gXK, delta_gX1, log_gX) = indexed
                dropout = self.split.rate, key_gX1, query(index)[:, None], key_C
                scores = self.scored.scores(q_gXK, kt_gKC, query(index), key_C, query_gX, key_gC)
                weights = jnp.exp(scores - log_gX[..., None])
                d_scores = weights * (drop(product(dy_gXK, vt_gKC), *dropout) - delta_gX1)
                d_scores = self.split.form.pull(d_scores, scores, q_gXK.shape[2]).astype(q_gXK.dtype)
                weights = drop(weights, *dropout).astype(q_gXK.dtype)
                d_keys = product(jnp.swapaxes(q_gXK, 1, 2), d_scores)
                d_values = product(jnp.swapaxes(dy_gXK, 1, 2), weights)
                return total + jnp.stack([d_keys, d_values]), product(d_scores, k_gCK)

            zeros = jnp.zeros_like(jnp.stack([kt_gKC, vt_gKC]), jnp.float32)
            blocks = jnp.arange(len(of_queries[0])), query_ngX, of_queries
            d_kv, dq_ngXK = jax.lax.scan(block, zeros, blocks)
            return dq_ngXK, d_kv

        def update(dq_mngXK, d_kv_2mgKC):
            kv = jax.tree.map(lambda x: x[held], kv_wmgCK)
            mine = tuple(x[pair.own] for x in (self.q_umngXK, *of_queries))
            dq, d_kv = jax.lax.map(group, (kv, mine, marks))
            return dq_mngXK + dq, d_kv_2mgKC + jnp.swapaxes(d_kv, 0, 1)

        (dq_umngXK, d_kv_w2mgKC), held = sums, self.held(pair)
        dq, d_kv = self._if_seen(pair, update, dq_umngXK[pair.own], d_kv_w2mgKC[held])
        return (dq_umngXK.at[pair.own].set(dq), d_kv_w2mgKC.at[held].set(d_kv)), None

    def _first(self, device: jax.Array, which: jax.Array) -> jax.Array:
        """The position with which a device's chunk begins."""
        return self.cut.shape[1] * jnp.where(which == 1, 2 * self.split.devices - 1 - device, device)

    def _beside(self, pair: Pair) -> tuple[Callable, jax.Array, tuple]:
        """What belongs to a pair's queries and keys.

        A function of a block's index that gives positions (X,) of its queries; positions (C,) of the keys;
        and documents of queries (m, n, g, X) and keys (m, g, C), and the keys of dropout.
        """
        first, marks = self._first(self.device, pair.own), (None, None)
        if self.documents is not None:
            own, others = 2 * self.device + pair.own, 2 * pair.device + pair.which
            marks = self.documents[0][own], self.documents[1][others]
        key_C = self._first(pair.device, pair.which) + jnp.arange(self.cut.shape[1])
        return (lambda index: first + self.cut.positions(index)), key_C, (*marks, self.key_mgX1)

    def _if_seen(self, pair: Pair, function: Callable, *arrays: jax.Array) -> tuple:
        """function(*arrays), or the arrays themselves if a window hides all of the keys from the queries."""
        if not self.split.form.window:
            return function(*arrays)
        last = self._first(pair.device, pair.which) + self.cut.shape[1] - 1
        seen = self._first(self.device, pair.own) - last < self.split.form.window
        return jax.lax.cond(seen, function, lambda *same: same, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(split: Split, q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH):
    return _forward(split, q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH)[0]


def _forward(split: Split, q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH):
    """The result, and what the backward pass needs: the inputs, the result, logarithms of denominators."""
    pairs = _Pairs(split, q_BLHK, k_BLJK, document_BL, key_BH)
    y = jnp.zeros_like(pairs.q_umngXK, jnp.float32)
    state, kv = (y, y[..., 0] - jnp.inf, y[..., 0]), _held(pairs, k_BLJK, v_BLJK)

    def see(kv: tuple, state: tuple, chosen: Pair) -> tuple:
        return jax.lax.scan(functools.partial(pairs.see, kv), state, chosen)[0]

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        kv, state = carry
        return (_pass_on(split, kv), see(kv, state, pairs.of_step(number))), None

    if split.gathers:
        state = see(kv, state, pairs.of_row())
    else:  # what comes next travels while these pairs are computed
        carry = _pass_on(split, kv), see(kv, state, pairs.of_step(0))
        kv, state = jax.lax.scan(step, carry, jnp.arange(1, split.devices - 1))[0]
        state = see(kv, state, pairs.of_step(jnp.int32(split.devices - 1)))
    y, top, total = state
    y_BLHK = checkpoint_name(pairs.joined(pairs.cut.join_queries, y / total[..., None]), PRODUCT)
    log_umngX = checkpoint_name(top + jnp.log(total), PRODUCT)
    y_BLHK = y_BLHK.astype(q_BLHK.dtype)
    return y_BLHK, (q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, y_BLHK, log_umngX)


def _backward(split: Split, residuals: tuple, dy_BLHK: jax.Array) -> tuple:
    q_BLHK, k_BLJK, v_BLJK, document_BL, key_BH, y_BLHK, log_umngX = residuals
    pairs = _Pairs(split, q_BLHK, k_BLJK, document_BL, key_BH)
    kv, queries = _held(pairs, k_BLJK, v_BLJK), functools.partial(pairs.chunks, pairs.cut.queries)
    # The softmax's gradient needs sum(y * dy) for each query (FlashAttention, section 3.1).
    delta_BLH1 = jnp.sum(y_BLHK.astype(jnp.float32) * dy_BLHK, axis=-1, keepdims=True)
    of_queries = queries(dy_BLHK), queries(delta_BLH1), log_umngX

    def pull(kv: tuple, sums: tuple, chosen: Pair) -> tuple:
        return jax.lax.scan(functools.partial(pairs.pull, kv, of_queries), sums, chosen)[0]

    def step(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        kv, sums = carry
        dq, d_kv = pull(kv, sums, pairs.of_step(number))
        return (_pass_on(split, kv), (dq, _pass_on(split, d_kv))), None

    zeros = jnp.zeros_like(jnp.stack([jnp.swapaxes(x, -1, -2) for x in kv], axis=1), jnp.float32)
    sums = jnp.zeros_like(pairs.q_umngXK, jnp.float32), zeros
    if split.gathers:
        dq, d_kv = pull(kv, sums, pairs.of_row())
        d_kv = jax.lax.psum_scatter(d_kv, split.axis, scatter_dimension=0, tiled=True)
    else:  # gradients of keys and values travel with these, and at last to where they belong
        dq, d_kv = pull(kv, sums, pairs.of_step(0))
        carry = _pass_on(split, kv), (dq, _pass_on(split, d_kv))
        kv, sums = jax.lax.scan(step, carry, jnp.arange(1, split.devices - 1))[0]
        dq, d_kv = pull(kv, sums, pairs.of_step(jnp.int32(split.devices - 1)))
        d_kv = _pass_on(split, d_kv)
    d_keys = (pairs.joined(pairs.cut.join_keys, d_kv[:, i]) for i in range(2))
    gradients = pairs.joined(pairs.cut.join_queries, dq), *d_keys
    return *(gradient.astype(q_BLHK.dtype) for gradient in gradients), None, None


_attend.defvjp(_forward, _backward)


def _held(pairs: _Pairs, *arrays_BLJK: jax.Array) -> tuple:
    """The keys and values (w, m, g, C, K) that a device holds at first, or of all devices."""
    held = tuple(pairs.chunks(pairs.cut.keys, x) for x in arrays_BLJK)
    if not pairs.split.gathers:
        return held
    return tuple(jax.lax.all_gather(x, pairs.split.axis, axis=0, tiled=True) for x in held)


def _pass_on(split: Split, tree: Any) -> Any:
    """Each device's arrays go to the next one, and the last one's to the first."""
    to = [(device, (device + 1) % split.devices) for device in range(split.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, split.axis, to), tree)
