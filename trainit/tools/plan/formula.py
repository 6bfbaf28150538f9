"""What a train step should exchange, by formula. `collectives` reads what a compiled one does.

Of each micro-step, on a mesh of data × fsdp × tensor, with w bytes a number of the compute type:

    kernel of n      gathered over fsdp in each pass (w n / tensor); its float32 gradient reduce-scattered
    numbers          over fsdp (4 n / tensor) and summed over data (4 n / (tensor fsdp)): as
                     all gradients once a step, where it has several micro-steps
    residual stream  of a device's b rows, over tensor, w b L D a time: a block gathers it twice and
                     reduce-scatters it twice, and does both for its gradient; what its products have taken
                     is kept in parts and gathered anew
    embedding        ids over fsdp; rows there, their gradients back by all-to-all (w b L D / tensor)
    head             as a kernel, in one pass; x gathered over tensor, its gradient reduce-scattered in
                     float32; three float32 numbers a position summed over tensor

Elementwise optimizers exchange no more than scalars, which are left out, as are those of the loss.
"""

import math
from collections.abc import Iterator, Mapping

import jax

from trainit.config import MESH_AXES, Config
from trainit.parallel.layout import is_stacked, logical_axes, mesh_axes, parameter_kind
from trainit.parallel.mesh import RunShape, chunk_size
from trainit.parallel.trees import path_name
from trainit.tools.plan.hlo import Collective


def predict(config: Config, shape: RunShape, shapes: dict) -> list[Collective]:
    """The collectives of a train step, but for scalars.

    Args:
        config: resolved; without diagnostics, and with an optimizer that is elementwise.
        shape: of the run.
        shapes: the parameters'.
    """
    sizes, (micro_steps, rows, length) = shape.sizes, shape.batch_at(0)
    found: list[Collective] = []

    apart, summed = shape.accumulates_locally(micro_steps), set()

    def add(kind: str, dtype: str, axes: tuple[str, ...], numbers: float, times: int, name: str):
        if apart and "data" in axes:  # a gradient's sum: over data when all micro-steps are done
            put(kind, dtype, ("data",), numbers, times * (name not in summed), name)
            summed.add(name)  # a tied embedding's is one
            axes = tuple(axis for axis in axes if axis != "data")
        put(kind, dtype, axes, numbers, times * micro_steps, name)

    def put(kind: str, dtype: str, axes: tuple[str, ...], numbers: float, times: int, name: str):
        axes = tuple(axis for axis in MESH_AXES if axis in axes and sizes[axis] > 1)
        devices = math.prod(sizes[axis] for axis in axes)
        size = numbers * {"f32": 4, "bf16": 2, "f16": 2, "s32": 4}[dtype]
        if axes and times:
            found.append(Collective(kind, dtype, axes, devices, round(size), times, name))

    own_rows = rows // shape.shares
    for kinds in (_kernels(config, sizes, shapes), _vectors(config, sizes, shapes)):
        for one in kinds:
            add(*one)
    for one in _activations(config, sizes, own_rows, length):
        add(*one)
    return found


def _compute(config: Config) -> str:
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[config.precision]


def _passes(config: Config) -> int:
    """Times a kernel is gathered: unrolled layers are one program, whose backward pass finds it gathered,
    unless what is computed anew stands apart."""
    apart = config.model.scan_layers or config.model.remat not in ("none", "attention")
    return 2 if apart else 1


def _kernels(config: Config, sizes: Mapping[str, int], shapes: dict) -> Iterator[tuple]:
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = path_name(path)
        kind = parameter_kind(name)
        if kind == "vector" or name == "position_embedding/embedding":
            continue
        layers = leaf.shape[0] if is_stacked(name) else 1
        part = math.prod(leaf.shape) / layers / sizes["tensor"]
        if kind == "embedding":
            yield "all-reduce", "f32", ("data",), part / sizes["fsdp"], 1, name
            if not config.model.tied_embeddings:
                continue
        passes = _passes(config) if kind == "matrix" else 1
        yield "all-gather", _compute(config), ("fsdp",), part, layers * passes, name
        yield "reduce-scatter", "f32", ("fsdp",), part, layers, name
        yield "all-reduce", "f32", ("data",), part / sizes["fsdp"], layers, name


def _vectors(config: Config, sizes: Mapping[str, int], shapes: dict) -> Iterator[tuple]:
    """Sums over positions, which are split over data and fsdp, and over tensor where the length is."""
    batch = ("data", "fsdp")
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = path_name(path)
        if name == "position_embedding/embedding":
            yield "all-reduce", "f32", ("data", "tensor"), math.prod(leaf.shape) / sizes["fsdp"], 1, name
        if parameter_kind(name) != "vector":
            continue
        layers = leaf.shape[0] if is_stacked(name) else 1
        numbers = math.prod(leaf.shape) / layers
        if "tensor" in mesh_axes(*logical_axes(name)):
            yield "all-reduce", "f32", batch, numbers / sizes["tensor"], layers, name
        elif name.endswith("bias") and "norm" not in name:
            yield "all-reduce", "f32", (*batch, "tensor"), numbers, layers, name
        else:  # XLA sums over one after the other
            yield "all-reduce", "f32", batch, numbers, layers, name
            yield "all-reduce", "f32", ("tensor",), numbers, layers, name


def _activations(config: Config, sizes: Mapping[str, int], rows: int, length: int) -> Iterator[tuple]:
    m, compute = config.model, _compute(config)
    residual, layers = rows * length * m.dim, m.num_blocks
    ids = 1 + (m.document_mask and m.positions == "learned")
    saved = 2 if _passes(config) == 2 else 0
    yield "all-gather", compute, ("tensor",), residual, layers * (4 + saved), "blocks"
    yield "reduce-scatter", compute, ("tensor",), residual, layers * (4 + (m.remat == "block")), "blocks"
    yield "all-gather", "s32", ("fsdp",), rows * sizes["fsdp"] * length, ids, "ids"
    yield "all-to-all", compute, ("fsdp",), residual / sizes["tensor"], 2, "token_embedding"
    yield "reduce-scatter", compute, ("tensor",), residual, 1, "token_embedding"
    yield "all-gather", compute, ("tensor",), residual, 1, "token_embedding"
    yield "all-gather", compute, ("tensor",), residual, 1, "head"
    yield "reduce-scatter", "f32", ("tensor",), residual, 1, "head"
    chunk = chunk_size(rows * length, m.vocab_size // sizes["tensor"], config.logits_mib)
    yield "all-reduce", "f32", ("tensor",), chunk, 3 * -(-rows * length // chunk), "loss"
