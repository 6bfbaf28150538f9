"""The factors of Shampoo and SOAP, of which a matrix G has two: running means of G G^T and of G^T G."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainit.parallel import per_layer
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind
from trainit.parallel.trees import path_name
from trainit.transforms.moments import unzip

KEEP, ITERATE, DECOMPOSE = range(3)  # what is done with a basis


def squares(params: dict, max_size: int, fill: Callable[[int], jax.Array]) -> tuple[dict, dict]:
    """fill(size) for each matrix's left side, and for its right, nested as the parameters, without vectors.

    Sides beyond max_size have none (None), and neither have the vocabulary's and the positions'.
    """

    def side(number: int) -> dict:
        def one(path, p):
            name = path_name(path)
            size = matrix_shape(name, p.shape[1:] if is_stacked(name) else p.shape)[number]
            if size > max_size or {"embedding": 0, "head": 1}.get(parameter_kind(name)) == number:
                return None
            return jnp.broadcast_to(fill(size), (*p.shape[: is_stacked(name)], size, size))

        return jax.tree.map_with_path(one, params)

    return side(0), side(1)


def add(factors: list, g: jax.Array, beta: float) -> list:
    """One matrix's factors with one more gradient."""
    pairs = zip(factors, (g, g.T), strict=True)
    return [None if old is None else beta * old + (1 - beta) * (x @ x.T) for old, x in pairs]


def between(squares: list, x: jax.Array) -> jax.Array:
    """left^T x right, of the sides that there are."""
    left, right = squares
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def map_matrices(function: Callable, mesh, arrays: list[dict], squares: list[dict]) -> tuple[list, list]:
    """Applies function(matrices, squares) -> as many of both to one matrix of a parameter at a time.

    Matrices are (rows, columns), their squares (rows, rows), (columns, columns) or None. `arrays` are trees
    shaped as the parameters, without vectors. Stacked layers are dealt out over the mesh.
    """

    def one(path, *leaves):
        name, first = path_name(path), leaves[0]
        stack = first.shape[: is_stacked(name)]
        shape = (*stack, *matrix_shape(name, first.shape[len(stack) :]))
        own, sides = [x.reshape(shape) for x in leaves[: len(arrays)]], list(leaves[len(arrays) :])
        with jax.default_matmul_precision("float32"):  # GPUs' TF32 would drown small eigenvalues
            if stack:
                own, sides = per_layer.map_layers(name, mesh, function, own, sides)
            else:
                own, sides = function(own, sides)
        return [per_layer.as_parameter(name, x, first.shape, mesh) for x in own], sides

    own, sides = unzip(arrays[0], jax.tree.map_with_path(one, *arrays, *squares), 2)
    return unzip(arrays[0], own, len(arrays)), unzip(arrays[0], sides, len(squares))


class BasisState(NamedTuple):
    """Squares are nested as the parameters, None where a side keeps its own basis."""

    count: jax.Array  # type: ignore[assignment]  # int32: updates seen
    mu: dict  # mean gradient
    nu: dict  # mean square in the bases
    left: dict  # mean of G G^T
    right: dict  # mean of G^T G
    left_basis: dict  # its eigenvectors, nearly: columns, those of large eigenvalues first
    right_basis: dict


def begin_bases(params: dict, max_size: int) -> BasisState:
    """The state before the first gradient."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    factors = squares(params, max_size, lambda size: jnp.zeros((size, size)))
    return BasisState(jnp.int32(0), zeros, zeros, *factors, *squares(params, max_size, jnp.eye))


def update_in_bases(
    function: Callable, config, mesh, gradients: dict, state: BasisState
) -> tuple[dict, BasisState]:
    """function(g, mu, nu, bases) -> direction, mu, nu for one matrix at a time; then the bases follow.

    The first gradient gives them, and every config.precondition_every-th turns them. It belongs to the means
    of factors with 1 - config.shampoo_beta, after its own direction.
    """
    due = jnp.where(state.count % config.precondition_every == 0, ITERATE, KEEP)
    turn = jnp.where(state.count == 0, DECOMPOSE, due)

    def one(matrices, squares):
        factors, bases = squares[:2], squares[2:]
        direction, mu, nu = function(*matrices, bases)
        factors = add(factors, matrices[0], config.shampoo_beta)
        for axis, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
            if basis is not None:
                bases[axis], order = _turned(turn, factor, basis)
                nu = jnp.take(nu, order, axis)
        return [direction, mu, nu], [*factors, *bases]

    arrays = [gradients, state.mu, state.nu]
    (direction, *moments), turned = map_matrices(one, mesh, arrays, list(state[3:]))
    return direction, BasisState(state.count + 1, *moments, *turned)


def _turned(turn: jax.Array, factor: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The basis after KEEP, ITERATE or DECOMPOSE, and the order in which it takes the old one's vectors.

    ITERATE is a step of power iteration (Vyas et al. 2024, arXiv 2409.11321, algorithm 4), for which large
    eigenvalues have to come first.
    """
    as_is = jnp.arange(len(basis))

    def iterate():
        product = factor @ basis
        order = jnp.argsort(-jnp.sum(basis * product, 0))
        return jnp.linalg.qr(product[:, order])[0], order

    def decompose():
        return jnp.flip(jnp.linalg.eigh(factor)[1], 1), as_is

    return jax.lax.switch(turn, [lambda: (basis, as_is), iterate, decompose])
