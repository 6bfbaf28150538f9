"""The token embedding on the mesh, whose table is split over tensor by vocabulary and over fsdp by width.

Tokens travel to the parts of the table, and rows travel back, instead of the table to the tokens: a device
has fewer tokens than the vocabulary has ids. b is a device's part of B, l of L, d of D.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trainit.parallel.collectives import Parallel, exchange, gather, scatter_sum, sum_over

MaybeArray = jax.Array | None


def vocab_parallel_embedding(
    parallel: Parallel,
    dtype: DTypeLike,
    tokens_BL: jax.Array,
    table_VD: jax.Array,
    position_LD: MaybeArray = None,
    position_BL: MaybeArray = None,
) -> jax.Array:
    """Rows of the token embedding, plus those of learned positions (Megatron-LM).

    Args:
        parallel: the mesh.
        dtype: type of the result, in which rows travel.
        tokens_BL: ids.
        table_VD: float32. So is its gradient, in which the many terms of frequent tokens add up.
        position_LD: the table of learned positions; None: there are none.
        position_BL: each token's position; None: its index in the row.

    Returns:
        (B, L, D), with its length split like the residual stream's.
    """
    return _embed(parallel, dtype, table_VD, position_LD, tokens_BL, position_BL)


def _specs(p: Parallel, position_LD: MaybeArray, position_BL: MaybeArray) -> tuple:
    """How table, table of positions, tokens and positions are split."""
    ids = p.spec("batch", "length")
    positions = None if position_LD is None else p.spec(None, "embed")
    return p.spec("vocab", "embed"), positions, ids, None if position_BL is None else ids


def _local_ids(p: Parallel, tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """For each token its row in this device's part of the table, of `rows` rows; and whether it is in it."""
    split = p.axes("vocab")
    local = tokens - (rows * jax.lax.axis_index(split) if split else 0)
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


def _positions(p: Parallel, position_BL: MaybeArray, length: int) -> jax.Array:
    """Positions of this device's part (rows of all fsdp, l) of the residual stream; (l,) if rows have none.

    Args:
        p: the mesh.
        position_BL: this device's rows; None: positions are the same in all rows.
        length: l.
    """
    split = p.axes("residual_length")
    if position_BL is None:
        return jnp.arange(length) + (length * jax.lax.axis_index(split) if split else 0)
    position = gather(position_BL, p.axes("embed"), 0)
    start = length * jax.lax.axis_index(p.sequence_axes) if p.sequence_axes else 0
    return jax.lax.dynamic_slice_in_dim(position, start, length, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embed(p: Parallel, dtype: DTypeLike, *arrays: MaybeArray) -> jax.Array:
    def on_device(table: Any, position_table: Any, tokens: Any, position: MaybeArray) -> jax.Array:
        # Rows of the tokens of all fsdp, of which each device has its part of D; 0 if another one has the id.
        ids, present = _local_ids(p, gather(tokens, p.axes("embed"), 0), len(table))
        rows = jnp.where(present[..., None], table[ids].astype(dtype), 0)
        rows = scatter_sum(rows, p.sequence_axes, 1)
        if position_table is not None:
            added = position_table[_positions(p, position, rows.shape[1])]
            rows = (rows.astype(added.dtype) + added).astype(dtype)
        return exchange(rows, p.axes("embed"), 0, 2)  # (rows of all fsdp, l, d) -> (b, l, D)

    inputs, outputs = _specs(p, arrays[1], arrays[3]), p.spec("batch", "residual_length", None)
    return p.shard_map_if_needed(on_device, inputs, outputs)(*arrays)


def _embed_backward(p: Parallel, dtype: DTypeLike, arrays: tuple, dx_BLD: jax.Array) -> tuple:
    def on_device(table: Any, position_table: Any, tokens: Any, position: MaybeArray, dx_blD: Any) -> tuple:
        dx = exchange(dx_blD, p.axes("embed"), 2, 0)  # (b, l, D) -> (rows of all fsdp, l, d)

        # The gradient of positions: each device adds up its own, and they are summed over the others.
        d_position = None
        if position_table is not None:
            at = _positions(p, position, dx.shape[1])
            terms = jnp.sum(dx, 0, dtype=jnp.float32) if at.ndim == 1 else dx.astype(jnp.float32)
            d_position = jnp.zeros(position_table.shape, jnp.float32).at[at].add(terms)
            others = tuple(a for a in p.axes("batch", "residual_length") if a not in p.axes("embed"))
            d_position = sum_over(d_position, others)

        # The gradient of the table, from the whole length of those tokens whose rows this device has.
        dx = gather(dx, p.sequence_axes, 1)
        ids, present = _local_ids(p, gather(tokens, p.axes("embed"), 0), len(table))
        terms = jnp.where(present[..., None], dx.astype(jnp.float32), 0)
        d_table = jnp.zeros(table.shape, jnp.float32).at[ids].add(terms)
        others = tuple(axis for axis in p.axes("batch", "length") if axis not in p.axes("embed"))
        return sum_over(d_table, others), d_position

    specs = _specs(p, arrays[1], arrays[3])
    inputs = (*specs, p.spec("batch", "residual_length", None))
    d_table, d_position = p.shard_map_if_needed(on_device, inputs, specs[:2])(*arrays, dx_BLD)
    return d_table, d_position, None, None


_embed.defvjp(lambda p, dtype, *arrays: (_embed.fun(p, dtype, *arrays), arrays), _embed_backward)
