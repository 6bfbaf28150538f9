"""Dropout whose masks follow from the keys of rows and the positions of tokens, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p


def dropout(x_BLD: jax.Array, rate: float, key_B: jax.Array | None, site: int, position_L=None) -> jax.Array:
    """Zeroes entries with probability `rate` and scales up the rest; gives x itself without a key.

    Each row has a key, which gives another mask for each `site` (a place in the layer). The positions are by
    default the tokens' indices.
    """
    if not rate or key_B is None:
        return x_BLD
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, site)
    position_L = np.arange(x_BLD.shape[1]) if position_L is None else position_L
    return drop(x_BLD, rate, keys_B[:, None, None], position_L[:, None], np.arange(x_BLD.shape[2]))


def drop(x: jax.Array, rate: float, key: jax.Array | None, row, column) -> jax.Array:
    """Zeroes entries of x with probability `rate` and scales up the rest; gives x itself without a key.

    Whether an entry stays is a hash (Threefry: Salmon et al. 2011) of its key and of the numbers of its row
    and column, and of nothing else. All three have as many dimensions as x, or less, and broadcast to it.
    """
    if key is None:
        return x
    words = jax.random.key_data(key)
    parts = [jnp.asarray(part, jnp.uint32) for part in (words[..., 0], words[..., 1], row, column)]
    zeros = jnp.broadcast_to(sum(0 * part for part in parts), x.shape)
    first, second = threefry2x32_p.bind(*(part + zeros for part in parts))
    return jnp.where(first ^ second >= np.uint32(rate * 2**32), x / (1 - rate), jnp.zeros((), x.dtype))
