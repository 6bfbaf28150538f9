"""Predicts what a train step exchanges, by formula. `hlo` reads what a compiled step exchanges.

Each micro-step, on a mesh of data × fsdp × tensor × context, with w bytes in a number of the compute type:

    kernel of n      gathered over fsdp in each pass (w n / tensor); its float32 gradient reduce-scattered
    numbers          over fsdp (4 n / tensor) and summed over data and context (4 n / (tensor fsdp)). With
                     several micro-steps, gradients may be summed over data only once, at the step's end.
    residual stream  b rows of a device, and L of their positions: w b L D each time, over tensor. A block
                     gathers it twice and reduce-scatters it twice, and does both for its gradient; the
                     inputs of its products are kept in parts and gathered again.
    keys, values     over context, gathered or passed on in c - 1 steps in each pass, and their float32
                     gradients: reduce-scattered, or passed on in c steps
    embedding        ids over fsdp; rows there, their gradients back by all-to-all (w b L D / tensor)
    head             like a kernel, in one pass; x gathered over tensor, its gradient reduce-scattered in
                     float32; three float32 numbers for each position summed over tensor

Elementwise optimizers exchange only scalars, which are left out, as are those of the loss.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from trainit.config import MESH_AXES, Config
from trainit.experiments.plan.hlo import Collective
from trainit.parallel.layout import is_stacked, logical_axes, mesh_axes, parameter_kind
from trainit.parallel.mesh import RunShape
from trainit.parallel.trees import path_name

WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4}  # bytes, by XLA's names of types
COMPUTE_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class _Exchange(NamedTuple):
    """A collective of each micro-step, over those axes that the mesh has."""

    kind: str
    dtype: str
    axes: tuple[str, ...]
    numbers: float  # in the whole array
    times: int
    name: str


def predict(config: Config, shape: RunShape, parameters: dict) -> list[Collective]:
    """Predicts the collectives of a train step, except for scalars, from the shapes of the parameters.

    The config is resolved, has no diagnostics, and its optimizer is elementwise.
    """
    sizes, (micro_steps, rows, length) = shape.sizes, shape.batch_at(0)
    once = shape.accumulates_locally(micro_steps)  # gradients are summed over data once a step
    found: list[Collective] = []

    def add(one: _Exchange, axes: tuple[str, ...], times: int):
        axes = tuple(axis for axis in MESH_AXES if axis in axes and sizes[axis] > 1)
        devices = math.prod(sizes[axis] for axis in axes)
        if axes and times:
            size = round(one.numbers * WIDTHS[one.dtype])
            found.append(Collective(one.kind, one.dtype, axes, devices, size, times))

    summed = set()  # names of gradients: that of a tied embedding, which has two terms, is summed once
    activations = _activations(config, shape, rows // shape.shares, length)
    for one in (*_parameters(config, sizes, parameters), *activations):
        axes = one.axes
        if once and "data" in axes:
            if one.name not in summed:
                add(one, ("data",), one.times)
            summed.add(one.name)
            axes = tuple(axis for axis in axes if axis != "data")
        add(one, axes, one.times * micro_steps)
    return found


def _gathers(config: Config) -> int:
    """Returns how often a step gathers each kernel.

    Twice (forward, backward) if layers are scanned or rematerialized; once if they are unrolled, since XLA
    then reuses the gathered copy.
    """
    return 2 if config.model.scan_layers or config.model.remat not in ("none", "attention") else 1


def _parameters(config: Config, sizes: Mapping[str, int], parameters: dict) -> Iterator[_Exchange]:
    """Yields the exchanges of each layer's parameters and of their gradients."""
    batch, tensor = ("data", "fsdp", "context"), ("tensor",)
    for path, leaf in jax.tree.leaves_with_path(parameters):
        name = path_name(path)
        kind, layers = parameter_kind(name), leaf.shape[0] if is_stacked(name) else 1
        numbers = math.prod(leaf.shape) / layers
        part = numbers / sizes["tensor"]
        # Gradients of vectors are summed over positions, which are split over data, fsdp and context, and
        # in the residual stream over tensor as well.
        if name == "position_embedding/embedding":
            yield _Exchange(
                "all-reduce", "f32", ("data", "context", *tensor), numbers / sizes["fsdp"], 1, name
            )
        elif kind == "vector" and "tensor" in mesh_axes(*logical_axes(name)):
            yield _Exchange("all-reduce", "f32", batch, part, layers, name)
        elif kind == "vector" and name.endswith("bias") and "norm" not in name:
            yield _Exchange("all-reduce", "f32", (*batch, *tensor), numbers, layers, name)
        elif kind == "vector":  # XLA sums over rows, then over positions
            yield _Exchange("all-reduce", "f32", ("data", "fsdp"), numbers, layers, name)
            yield _Exchange("all-reduce", "f32", ("tensor", "context"), numbers, layers, name)
        else:
            gradient = _Exchange("all-reduce", "f32", ("data", "context"), part / sizes["fsdp"], layers, name)
            yield gradient
            if kind == "embedding":
                if not config.model.tied_embeddings:
                    continue
                yield gradient  # a tied one is used as the head's kernel, too
            compute, gathers = COMPUTE_TYPES[config.precision], _gathers(config) if kind == "matrix" else 1
            yield _Exchange("all-gather", compute, ("fsdp",), part, gathers * layers, name)
            yield _Exchange("reduce-scatter", "f32", ("fsdp",), part, layers, name)


def _activations(config: Config, shape: RunShape, rows: int, length: int) -> Iterator[_Exchange]:
    """Yields the exchanges of activations: the blocks', the embedding's, the head's, the loss's."""
    m, compute, tensor = config.model, COMPUTE_TYPES[config.precision], ("tensor",)
    sizes, c = shape.sizes, shape.sizes["context"]
    length //= c
    residual = rows * length * m.dim
    # Blocks: twice forward, twice backward, and twice more where inputs are gathered again.
    gathers = m.num_blocks * (6 if m.scan_layers or m.remat != "attention" else 4)
    scatters = m.num_blocks * (5 if m.remat == "block" else 4)
    yield _Exchange("all-gather", compute, tensor, residual, gathers, "blocks")
    yield _Exchange("reduce-scatter", compute, tensor, residual, scatters, "blocks")
    # Keys and values, where sequences are split.
    keys, context = rows * length * m.num_kv_heads * m.head_dim / sizes["tensor"], ("context",)
    if shape.attention == "gather":
        yield _Exchange("all-gather", compute, context, c * keys, 4 * m.num_blocks, "keys")
        yield _Exchange("reduce-scatter", "f32", context, 2 * c * keys, m.num_blocks, "keys")
    elif c > 1:
        steps = 2 * (c - 1) + (c - 2) * (m.remat in ("block", "attention"))
        yield _Exchange("collective-permute", compute, context, keys, 2 * m.num_blocks * steps, "keys")
        yield _Exchange("collective-permute", "f32", context, 2 * keys, m.num_blocks * c, "keys")
    # The embedding; learned positions of documents are looked up by ids, too.
    ids = 1 + (m.document_mask and m.positions == "learned")
    yield _Exchange("all-gather", "s32", ("fsdp",), rows * sizes["fsdp"] * length, ids, "ids")
    yield _Exchange("all-to-all", compute, ("fsdp",), residual / sizes["tensor"], 2, "token_embedding")
    yield _Exchange("reduce-scatter", compute, tensor, residual, 1, "token_embedding")
    yield _Exchange("all-gather", compute, tensor, residual, 1, "token_embedding")
    # The head and the loss, which goes through the positions in chunks.
    yield _Exchange("all-gather", compute, tensor, residual, 1, "head")
    yield _Exchange("reduce-scatter", "f32", tensor, residual, 1, "head")
    chunk = shape.logits_chunk
    yield _Exchange("all-reduce", "f32", tensor, chunk, 3 * -(-rows * length // chunk), "loss")
