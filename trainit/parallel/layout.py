"""How every array lies on the mesh: one table of logical axes, and one of all parameters.

A parameter's dimensions have names, its logical axes: an attention kernel has ("layers", "embed", "heads",
"head_size"). `RULES` says over which axes of the mesh each of them is split. `PARAMETERS` also names each
parameter's kind, by which decay masks, Muon and the logs per kind choose. A new parameter needs a row there.

The two tables are turned into shardings here. The code that exchanges data follows them: `matmul.py` in the
blocks (it says where a kernel is gathered), `embedding.py` for tokens, `model/cross_entropy.py` for the head.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from trainit.config import ConfigError
from trainit.parallel.trees import path_name

AnyMesh = Mesh | AbstractMesh

# Logical axis -> the mesh axes that it is split over. Axes that are not named here are not split.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "residual_length": ("context", "tensor"),  # of the residual stream between attention and MLP
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# (path, logical axes, kind). Paths are regular expressions; the first that matches counts. Vectors are small,
# so that every device has them whole, except those that are added to an activation which is split.
PARAMETERS = (
    ("token_embedding/embedding", ("vocab", "embed"), "embedding"),
    ("position_embedding/embedding", ("position", "embed"), "embedding"),
    ("head/kernel", ("embed", "vocab"), "head"),
    ("head/bias", ("vocab",), "vector"),
    ("(embedding|final)_norm/(scale|bias)", ("norm",), "vector"),
    ("blocks/(attention|mlp)(_out)?_norm/(scale|bias)", ("layers", "norm"), "vector"),
    ("blocks/attention/query/kernel", ("layers", "embed", "heads", "head_size"), "matrix"),
    ("blocks/attention/(key|value)/kernel", ("layers", "embed", "kv_heads", "head_size"), "matrix"),
    ("blocks/attention/query/bias", ("layers", "heads", "head_size"), "vector"),
    ("blocks/attention/(key|value)/bias", ("layers", "kv_heads", "head_size"), "vector"),
    ("blocks/attention/(query|key)_norm/scale", ("layers", "qk_norm"), "vector"),
    ("blocks/attention/out/kernel", ("layers", "heads", "head_size", "embed"), "matrix"),
    ("blocks/mlp/(up|gate)/kernel", ("layers", "embed", "mlp"), "matrix"),
    ("blocks/mlp/(up|gate)/bias", ("layers", "mlp"), "vector"),
    ("blocks/mlp/down/kernel", ("layers", "mlp", "embed"), "matrix"),
    ("blocks/(attention/out|mlp/down)/bias", ("layers", "norm"), "vector"),
)

BLOCK = 32  # optimizer state in 8 bits has one scale for at most this many numbers


def _row(path: str) -> tuple[tuple[str, ...], str]:
    """The logical axes and the kind of the parameter with this path, or KeyError."""
    for pattern, axes, kind in PARAMETERS:
        if re.fullmatch(pattern, path):
            return axes, kind
    raise KeyError(f"parameter {path!r} is missing in the table trainit.parallel.layout.PARAMETERS")


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of the parameter with this path."""
    return _row(path)[0]


def parameter_kind(path: str) -> str:
    """What the parameter with this path is: "embedding", "head", "matrix" or "vector"."""
    return _row(path)[1]


def is_stacked(path: str) -> bool:
    """Whether the parameter's leading axis counts layers."""
    return logical_axes(path)[0] == "layers"


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The size (inputs, outputs) of one layer's parameter, no vector, as the linear map that it is.

    Attention's kernels join heads and head size; an embedding maps from its rows. `shape` has no layers axis.
    """
    axes = [axis for axis in logical_axes(path) if axis != "layers"]
    inputs = 1 if axes[0] == "embed" else len(axes) - 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
    """All mesh axes over which an array with these logical axes is split."""
    split = (RULES.get(axis, ()) if axis else () for axis in axes)
    return tuple(name for names in split for name in ((names,) if isinstance(names, str) else names))


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """For each dimension of an array with these logical axes, the mesh axes over which it is split."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def matrix_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """How matrices that belong to a parameter are split: like its rows and columns, where that divides them.

    `shape` is ([layers,] rows, columns) of its own matrices, or of others such as products of these.
    """
    axes = [axis for axis in logical_axes(path) if axis != "layers"]
    # A matrix has an axis for its inputs and one for its outputs: heads stand for heads * head size.
    own = RULES.get(axes[0]), RULES.get(axes[1 if axes[0] == "embed" else -1])
    sizes = zip(own, shape[-2:], strict=True)
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in sizes)
    return PartitionSpec(*[None] * (len(shape) - 2), *fits)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The sharding of arrays (micro-steps, rows, ...): rows are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, parameters: Mapping, mesh: AnyMesh) -> Any:
    """The sharding of every leaf of a train state: split like the parameter that the leaf belongs to.

    A leaf belongs to the parameter whose path ends the leaf's own path: optimizer state repeats the tree of
    parameters. With the parameter's shape (the parameter itself, a moment, the sum of gradients), or with one
    number for each of its blocks, it is split like the parameter; with a square matrix for each of its
    matrices, as `matrix_spec` says; otherwise not at all. The longest end that fits counts.
    """
    shapes = _shapes(parameters)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        for suffix in _suffixes(path):
            if suffix not in shapes:
                continue
            if leaf.shape in (shapes[suffix], _blocks_shape(suffix, shapes[suffix], mesh)):
                return NamedSharding(mesh, partition_spec(logical_axes(suffix)))
            square = len(leaf.shape) == 2 + is_stacked(suffix) and leaf.shape[-1] == leaf.shape[-2]
            if square and parameter_kind(suffix) != "vector":
                return NamedSharding(mesh, matrix_spec(suffix, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(sharding, state)


def owner_path(path: tuple, shape: tuple[int, ...], parameters: Mapping) -> str:
    """The path of the parameter that a leaf with this key path belongs to and has the shape of; or ""."""
    shapes = _shapes(parameters)
    return next((suffix for suffix in _suffixes(path) if shapes.get(suffix) == shape), "")


def _shapes(parameters: Mapping) -> dict[str, tuple[int, ...]]:
    return {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(parameters)}


def _suffixes(path: tuple) -> list[str]:
    """A leaf's path, the path without its first key, and so on."""
    keys = path_name(path).split("/")
    return ["/".join(keys[start:]) for start in range(len(keys))]


def quantization_block(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The axis along which a parameter's numbers form blocks with one scale each, and the size of a block.

    No block lies on several devices, unless `check_blocks` raises. The parameter is not a vector.
    """
    axes = logical_axes(path)
    axis = axes.index(next(name for name in ("head_size", "mlp", "embed") if name in axes))
    return axis, math.gcd(shape[axis], BLOCK)


def check_blocks(parameters: Mapping, mesh: AnyMesh) -> None:
    """Raises ConfigError where a block of a parameter's numbers would lie on several devices."""
    for path, shape in _shapes(parameters).items():
        if parameter_kind(path) != "vector" and _blocks_shape(path, shape, mesh) is None:
            axis, size = quantization_block(path, shape)
            name, split = logical_axes(path)[axis], RULES.get(logical_axes(path)[axis])
            raise ConfigError(
                f"optimizer_state=int8: {path} has {shape[axis] // size} blocks of {size} numbers along its "
                f"axis {name!r}, which mesh.{split}={mesh.shape[split]} does not divide; take a smaller one, "
                f"or bfloat16"
            )


def _blocks_shape(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> tuple[int, ...] | None:
    """The shape of an array with one number for each block; None where the mesh would split blocks."""
    if parameter_kind(path) == "vector":
        return None
    axis, size = quantization_block(path, shape)
    count, axes = shape[axis] // size, mesh_axes(logical_axes(path)[axis])
    devices = math.prod(mesh.shape[name] for name in axes)
    return None if count % devices else (*shape[:axis], count, *shape[axis + 1 :])
