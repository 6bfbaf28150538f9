"""The order in which a model on a mesh has the tokens of a row, where `context` splits it.

With c devices along `context`, a row has 2 c chunks. Device i has chunk i and its mirror image, chunk
2 c - 1 - i, so that the queries of all devices see equally many keys.
"""

from typing import Any

import jax
import numpy as np

from trainit.parallel.collectives import Parallel


def positions(parallel: Parallel, length: int) -> np.ndarray:
    """The positions of a row's tokens in the model's order: (length,)."""
    order, devices = np.arange(length), parallel.parts("length")
    if devices == 1:
        return order
    front, back = np.split(order.reshape(2 * devices, -1), 2)
    return np.stack([front, back[::-1]], axis=1).ravel()


def arrange(parallel: Parallel, tree: Any) -> Any:
    """Arrays (B, L, ...) whose tokens are in their own order, in the model's."""
    if not parallel.axes("length"):
        return tree
    return jax.tree.map(lambda x: x[:, positions(parallel, x.shape[1])], tree)


def restore(parallel: Parallel, x_BL: jax.Array) -> jax.Array:
    """What `arrange` gives, in the tokens' own order again."""
    if not parallel.axes("length"):
        return x_BL
    return x_BL[:, np.argsort(positions(parallel, x_BL.shape[1]))]
