"""The token embedding on the mesh, whose table is split over tensor by vocabulary and over fsdp by width.

Tokens travel to the parts of the table, and rows travel back, instead of the table to the tokens: a device
has fewer tokens than the vocabulary has ids. b is a device's part of B, l of L, d of D.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trainit.parallel import sequence
from trainit.parallel.collectives import MaybeArray, Parallel, exchange, gather, scatter_sum, sum_over


def _specs(p: Parallel) -> tuple:
    """How table, table of positions, tokens and positions are split."""
    ids = p.spec("batch", "length")
    return p.spec("vocab", "embed"), p.spec(None, "embed"), ids, ids


def _local_ids(p: Parallel, tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """For each token its row in this device's part of the table, of `rows` rows; and whether it is in it."""
    split = p.axes("vocab")
    local = tokens - (rows * jax.lax.axis_index(split) if split else 0)
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


def _positions(p: Parallel, position_BL: MaybeArray, length: int) -> jax.Array:
    """Positions (rows of all fsdp, l) of this device's part of the residual; (l,) if rows have none."""
    split = p.axes("residual_length")
    if position_BL is None:
        own = jnp.arange(length) + (length * jax.lax.axis_index(split) if split else 0)
        if p.axes("length"):
            return jnp.asarray(sequence.positions(p, length * p.parts("residual_length")))[own]
        return own
    position = gather(position_BL, p.axes("embed"), 0)
    start = length * jax.lax.axis_index(p.sequence_axes) if p.sequence_axes else 0
    return jax.lax.dynamic_slice_in_dim(position, start, length, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def vocab_parallel_embedding(
    p: Parallel,
    dtype: DTypeLike,
    tokens_BL: jax.Array,
    table_VD: jax.Array,
    position_LD: MaybeArray = None,
    position_BL: MaybeArray = None,
) -> jax.Array:
    """Rows (B, L, D) of the embedding's table for token ids (Megatron-LM), plus those of learned positions.

    Rows travel in `dtype`, and their length is split like the residual stream's. Tables are float32; so are
    their gradients, in which the many terms of frequent tokens add up. Without a table of positions there are
    none; without positions, each token's is that of `sequence.positions`.
    """

    def on_device(table: Any, position_table: Any, tokens: Any, position: MaybeArray) -> jax.Array:
        # Rows of the tokens of all fsdp, of which each device has its part of D; 0 if another one has the id.
        ids, present = _local_ids(p, gather(tokens, p.axes("embed"), 0), len(table))
        rows = jnp.where(present[..., None], table[ids].astype(dtype), 0)
        rows = scatter_sum(rows, p.sequence_axes, 1)
        if position_table is not None:
            added = position_table[_positions(p, position, rows.shape[1])]
            rows = (rows.astype(added.dtype) + added).astype(dtype)
        return exchange(rows, p.axes("embed"), 0, 2)  # (rows of all fsdp, l, d) -> (b, l, D)

    mapped = p.shard_map_if_needed(on_device, _specs(p), p.spec("batch", "residual_length"))
    return mapped(table_VD, position_LD, tokens_BL, position_BL)


def _embed_backward(p: Parallel, dtype: DTypeLike, arrays: tuple, dx_BLD: jax.Array) -> tuple:
    def on_device(table: Any, position_table: Any, tokens: Any, position: MaybeArray, dx_blD: Any) -> tuple:
        dx = exchange(dx_blD, p.axes("embed"), 2, 0)  # (b, l, D) -> (rows of all fsdp, l, d)

        # The gradient of positions: each device adds up its own, and they are summed over the others.
        d_position = None
        if position_table is not None:
            at = _positions(p, position, dx.shape[1])
            terms = jnp.sum(dx, 0, dtype=jnp.float32) if at.ndim == 1 else dx.astype(jnp.float32)
            d_position = jnp.zeros(position_table.shape, jnp.float32).at[at].add(terms)
            d_position = sum_over(d_position, p.axes("batch", "residual_length", but=p.axes("embed")))

        # The gradient of the table, from the whole length of those tokens whose rows this device has.
        dx = gather(dx, p.sequence_axes, 1)
        ids, present = _local_ids(p, gather(tokens, p.axes("embed"), 0), len(table))
        terms = jnp.where(present[..., None], dx.astype(jnp.float32), 0)
        d_table = jnp.zeros(table.shape, jnp.float32).at[ids].add(terms)
        return sum_over(d_table, p.axes("batch", "length", but=p.axes("embed"))), d_position

    inputs = (*_specs(p), p.spec("batch", "residual_length"))
    tokens_BL, table_VD, position_LD, position_BL = arrays
    mapped = p.shard_map_if_needed(on_device, inputs, inputs[:2])
    return None, *mapped(table_VD, position_LD, tokens_BL, position_BL, dx_BLD), None


vocab_parallel_embedding.defvjp(
    lambda p, dtype, *arrays: (vocab_parallel_embedding.fun(p, dtype, *arrays), arrays), _embed_backward
)
