"""The mesh, and the one table that says how every parameter is laid out on it.

Mesh axes: `data` replicates; `fsdp` splits parameters and optimizer state; `tensor` splits heads, MLP width
and vocabulary, and between these the length; `context` splits the sequence. The batch is split over data and
fsdp. The table also names each parameter's kind, by which decay masks, Muon and per-kind logs choose.
"""

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.config import require

# Logical axis -> mesh axes. An axis that is not named here is not split.
RULES = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "residual_length": ("context", "tensor"),  # of the residual stream, between the products
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

BLOCK = 32  # numbers that optimizer state in 8 bits has one scale for, at most

# (path, logical axes, kind); the first match counts, and every parameter has one.
# Vectors are small: they are replicated but where they follow a split activation.
PARAMETERS = (
    ("token_embedding/embedding", ("vocab", "embed"), "embedding"),
    ("position_embedding/embedding", ("position", "embed"), "embedding"),
    ("head/kernel", ("embed", "vocab"), "head"),
    ("head/bias", ("vocab",), "vector"),
    ("final_norm/(scale|bias)", ("norm",), "vector"),
    ("blocks/(attention|mlp)_norm/(scale|bias)", ("layers", "norm"), "vector"),
    ("blocks/attention/query/kernel", ("layers", "embed", "heads", "head_size"), "matrix"),
    ("blocks/attention/(key|value)/kernel", ("layers", "embed", "kv_heads", "head_size"), "matrix"),
    ("blocks/attention/query/bias", ("layers", "heads", "head_size"), "vector"),
    ("blocks/attention/(key|value)/bias", ("layers", "kv_heads", "head_size"), "vector"),
    ("blocks/attention/(query|key)_norm/scale", ("layers", "head_size"), "vector"),
    ("blocks/attention/out/kernel", ("layers", "heads", "head_size", "embed"), "matrix"),
    ("blocks/mlp/(up|gate)/kernel", ("layers", "embed", "mlp"), "matrix"),
    ("blocks/mlp/(up|gate)/bias", ("layers", "mlp"), "vector"),
    ("blocks/mlp/down/kernel", ("layers", "mlp", "embed"), "matrix"),
    ("blocks/(attention/out|mlp/down)/bias", ("layers", "norm"), "vector"),
)


def path_name(path) -> str:
    """A key path of `jax.tree_util` as text: blocks/attention/query/kernel."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _row(path: str) -> tuple[tuple[str, ...], str]:
    for pattern, axes, kind in PARAMETERS:
        if re.fullmatch(pattern, path):
            return axes, kind
    raise KeyError(f"parameter {path!r} is missing in the table trainit.parallel.sharding.PARAMETERS")


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of the parameter with this path. Raises KeyError if the table lacks it."""
    return _row(path)[0]


def kind(path: str) -> str:
    """What the parameter with this path is: embedding, head, matrix or vector."""
    return _row(path)[1]


def is_stacked(path: str) -> bool:
    """Whether the parameter's leading axis counts layers."""
    return logical_axes(path)[0] == "layers"


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of one layer's parameter as the linear map that it is: inputs, outputs.

    Attention's kernels join heads and head size; an embedding is a map from its rows.

    Args:
        path: of a parameter that is no vector.
        shape: without a layers axis.
    """
    axes = [axis for axis in logical_axes(path) if axis != "layers"]
    inputs = 1 if axes[0] == "embed" else len(axes) - 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of an array -> the mesh axes over which each of its dimensions is split."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def matrix_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How matrices that belong to a parameter are split: as its own rows and columns, where that divides.

    Args:
        path: of a parameter that is no vector.
        shape: ([layers,] rows, columns): of its own matrices, or of others such as products of these.
        mesh: with axes `MESH_AXES`.
    """
    axes = [axis for axis in logical_axes(path) if axis != "layers"]
    own = RULES.get(axes[0]), RULES.get(axes[1 if axes[0] == "embed" else -1])
    sizes = zip(own, shape[-2:], strict=True)
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in sizes)
    return PartitionSpec(*[None] * (len(shape) - 2), *fits)


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """All mesh axes over which arrays with these logical axes are split."""
    split = (RULES.get(axis) or () for axis in axes)
    return tuple(axis for one in split for axis in ((one,) if isinstance(one, str) else one))


def block(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Along which axis a parameter's numbers are put into blocks, and how many are in one.

    Along heads, MLPs and the width, so that no block lies on several devices if `check_blocks` agrees.

    Args:
        path: of a parameter that is no vector.
        shape: its own.
    """
    axes = logical_axes(path)
    axis = axes.index(next(name for name in ("head_size", "mlp", "embed") if name in axes))
    return axis, math.gcd(shape[axis], BLOCK)


def check_blocks(parameters: Mapping, mesh: Mesh):
    """Raises ConfigError where a block of a parameter's numbers would lie on several devices."""
    for path, leaf in jax.tree.leaves_with_path(parameters):
        if kind(name := path_name(path)) == "vector":
            continue
        axis, size = block(name, leaf.shape)
        logical = logical_axes(name)[axis]
        mesh_axis = RULES.get(logical)
        count, parts = leaf.shape[axis] // size, mesh.shape[mesh_axis] if mesh_axis else 1
        require(
            count % parts == 0,
            f"optimizer_state=int8: {name} has {count} blocks of {size} numbers along its axis {logical!r}, "
            f"which mesh.{mesh_axis}={parts} does not divide; take a smaller one, or bfloat16",
        )


def owner(path, shape: tuple[int, ...], parameters: Mapping) -> str:
    """The path of the parameter whose shape a leaf of a state has, and whose path ends its own; or "".

    Args:
        path: the leaf's key path.
        shape: the leaf's.
        parameters: the tree of parameters, or of their shapes.
    """
    shapes = {path_name(key): leaf.shape for key, leaf in jax.tree.leaves_with_path(parameters)}
    return next((suffix for suffix in _suffixes(path) if shapes.get(suffix) == shape), "")


def _suffixes(path) -> list[str]:
    keys = path_name(path).split("/")
    return ["/".join(keys[start:]) for start in range(len(keys))]


def state_shardings(state, parameters: Mapping, mesh: Mesh):
    """A sharding for every leaf of a train state.

    A leaf is split as the parameter whose path is the leaf's suffix and whose shape is its own:
    the parameter itself, its moments, its gradient's sum. So are numbers of which it has one for each block.
    A square matrix for each of a parameter's own, under its path, is split as far as `matrix_spec` can. Any
    other leaf is replicated.

    Args:
        state: a tree of arrays or of their shapes.
        parameters: the tree of parameters, or of their shapes.
        mesh: with axes `MESH_AXES`.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(parameters)}

    def sharding(path, leaf) -> NamedSharding:
        for suffix in _suffixes(path):
            if shapes.get(suffix) == leaf.shape:
                return NamedSharding(mesh, spec(logical_axes(suffix)))
            if suffix in shapes and leaf.shape == _blocks_shape(suffix, shapes[suffix], mesh):
                return NamedSharding(mesh, spec(logical_axes(suffix)))
            if suffix in shapes and _is_square(suffix, leaf.shape):
                return NamedSharding(mesh, matrix_spec(suffix, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, state)


def _blocks_shape(path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...] | None:
    """The shape of what there is one of for each block, None where the mesh would split blocks."""
    if kind(path) == "vector":
        return None
    axis, size = block(path, shape)
    count, split = shape[axis] // size, RULES.get(logical_axes(path)[axis])
    return None if split and count % mesh.shape[split] else (*shape[:axis], count, *shape[axis + 1 :])


def _is_square(path: str, shape: tuple[int, ...]) -> bool:
    return kind(path) != "vector" and len(shape) == 2 + is_stacked(path) and shape[-1] == shape[-2]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays (micro-steps, rows, ...): rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
