"""What is common to trees of arrays that may be split over devices."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp


def inner_product(a: dict, b: dict) -> jax.Array:
    """Unlike optax.tree.vdot it flattens no array, for which XLA would gather one that is split."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return cast(jax.Array, sum(jnp.sum(x * y) for x, y in pairs))


def total_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of their shapes: on all devices together, replicas counted once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as text: blocks/attention/query/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
