"""Optimizer state in fewer bits: kept so between steps, and float32 while an update is computed.

Numbers are rounded to one of their two neighbours at random, so that they are right in the mean: rounded to
the nearest, a mean with decay 0.999 would stand still, since a step changes it by less than half of what
bfloat16 can distinguish.

bfloat16 takes half the memory, int8 9/32 of it: blocks of 32 numbers have one scale, their largest absolute
value, as in Dettmers et al. 2021, arXiv 2110.02861. Codes k stand for scale * (k / K)^4, down to 2e-10 of the
scale: evenly spaced ones would make zeros of most mean squares, by which Adam divides. A block without
negative numbers needs no sign: K is then 255 instead of 127. No number becomes 0 that was not.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from trainit.parallel.layout import owner_path, parameter_kind, quantization_block
from trainit.parallel.trees import path_name
from trainit.transforms.moments import unzip


class NarrowState(NamedTuple):
    """An optimizer's state in three parts, each nested as it is, None standing for what is in another."""

    wide: Any  # what stays as it is
    codes: Any  # arrays shaped as parameters: bfloat16, or int8
    scales: Any  # of int8: float32, of each block, negative where it has no negative number


def narrow(
    optimizer: optax.GradientTransformationExtraArgs, dtype: str, parameters: dict, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, its state kept in bfloat16 or int8 where it is float32 in the shape of a parameter.

    Vectors stay as they are, and so does what is made of the parameters' values at the start: a copy of them
    is to be as exact as they are. `key` is that of the rounding, uint32 (2,).
    """
    owners = _owners(optimizer, parameters)

    def encode(state, step: jax.Array | int) -> NarrowState:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)

        def one(path, leaf, owner: str) -> NarrowState:
            if not owner:
                return NarrowState(leaf, None, None)
            leaf_key = jax.random.fold_in(step_key, zlib.crc32(path_name(path).encode()))
            if dtype == "bfloat16":
                return NarrowState(None, round_to_bfloat16(leaf, leaf_key), None)
            axis, size = quantization_block(owner, leaf.shape)
            return NarrowState(None, *encode_blocks(leaf, axis, size, leaf_key))

        return NarrowState(*unzip(state, jax.tree.map_with_path(one, state, owners), 3))

    def init(params: dict) -> NarrowState:
        # The barrier keeps XLA from computing what becomes of zeros while it compiles, which takes long.
        return encode(jax.lax.optimization_barrier(optimizer.init(params)), 0)

    def update(gradients: dict, state: NarrowState, params: dict | None = None, *, step, **extra_args):
        updates, wide = optimizer.update(gradients, decode(state), params, step=step, **extra_args)
        return updates, encode(wide, step)

    return optax.GradientTransformationExtraArgs(init, update)


def decode(state: NarrowState):
    """The state that the optimizer knows."""

    def one(wide, codes, scales):
        if codes is None:
            return wide
        return codes.astype(jnp.float32) if scales is None else decode_blocks(codes, scales)

    return jax.tree.map(one, *state, is_leaf=lambda leaf: leaf is None)


def _owners(optimizer: optax.GradientTransformation, parameters: dict):
    """For each leaf of the optimizer's state the path of its parameter, "" if it is to stay as it is."""
    state = jax.eval_shape(optimizer.init, parameters)
    program = jax.make_jaxpr(optimizer.init)(parameters).jaxpr
    made = set(program.invars)  # of the parameters' values
    for equation in program.eqns:
        if any(isinstance(v, core.Var) and v in made for v in equation.invars):
            made.update(equation.outvars)
    outvars = iter(program.outvars)  # in the order of the leaves

    def owner(path, leaf: jax.ShapeDtypeStruct) -> str:
        variable, own = next(outvars), owner_path(path, leaf.shape, parameters)
        is_copy = not isinstance(variable, core.Literal) and variable in made
        is_matrix = own and leaf.dtype == jnp.float32 and parameter_kind(own) != "vector"
        return own if is_matrix and not is_copy else ""

    return jax.tree.map_with_path(owner, state)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32, each a hash of the key and of its number in the array.

    Unlike jax.random's it becomes a part of the loop that rounds, on every backend, and takes no memory. The
    hash is twice Wellons's lowbias32.
    """

    def mixed(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return x ^ (x >> 16)

    first, second = jax.random.key_data(key)
    number = jnp.uint32(0)
    for axis, size in enumerate(shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return mixed(mixed(number ^ first) + second)


def round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """One of the two neighbours of each number, at random, so that the mean is the number."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The 16 bits that stay are followed by 16 that say how far it is to the next: adding a random one to
    # these carries over as often as it should.
    rounded = bits + (random_bits(key, x.shape) >> 16)
    rounded = jax.lax.bitcast_convert_type((rounded >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def encode_blocks(x: jax.Array, axis: int, size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes int8 in the shape of x, and scales float32, one for every `size` numbers along `axis`."""
    blocks = _split(x, axis, size)
    scale = jnp.max(jnp.abs(blocks), axis + 1, keepdims=True)
    unsigned = jnp.min(blocks, axis + 1, keepdims=True) >= 0
    y = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1.0)
    most = jnp.where(unsigned, 255.0, 127.0)
    below = jnp.floor(jnp.minimum(most * jnp.sqrt(jnp.sqrt(y)), most - 1))
    at, next_one = (below / most) ** 4, ((below + 1) / most) ** 4
    draw = ((random_bits(key, x.shape) >> 8).astype(jnp.float32) + 0.5) / 2**24
    up = (_split(draw, axis, size) * (next_one - at) < y - at) | ((below == 0) & (y > 0))
    k = below + up
    codes = jnp.where(unsigned, k - 128, jnp.where(blocks < 0, -k, k)).astype(jnp.int8).reshape(x.shape)
    return codes, jnp.where(unsigned, -scale, scale).squeeze(axis + 1)


def decode_blocks(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The numbers, float32, in the shape of their codes."""
    pairs = zip(codes.shape, scales.shape, strict=True)
    axis = next((i for i, (numbers, blocks) in enumerate(pairs) if numbers != blocks), 0)
    blocks = _split(codes.astype(jnp.float32), axis, codes.shape[axis] // scales.shape[axis])
    scale = jnp.expand_dims(scales, axis + 1)
    root = jnp.where(jnp.signbit(scale), (blocks + 128) / 255, blocks / 127)
    return (jnp.sign(root) * jnp.abs(scale) * root**4).reshape(codes.shape)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    """(..., n, ...) -> (..., n / size, size, ...)"""
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
