"""A checkpoint's parameters as they are used for texts: on a mesh for this, one tree for each layer."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from trainit.checkpoints.finished_run import FinishedRun, PretrainedModel
from trainit.config import Config
from trainit.model.gpt import GPT
from trainit.model.precision import PARTS
from trainit.parallel.collectives import Parallel
from trainit.parallel.layout import is_stacked, logical_axes, parameter_kind, partition_spec, state_shardings
from trainit.parallel.mesh import make_mesh
from trainit.parallel.trees import path_name

# A part of a block, and its kernels that have the same input.
TOGETHER = ("attention", "query", "key", "value"), ("mlp", "up", "gate")


def mesh_for(model: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The devices as a mesh: over tensor as many as its sizes allow, the others over fsdp, or else data."""
    names = ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "context_length")
    count = len(devices)
    fits = [n for n in range(1, count + 1) if count % n == 0 and not any(model[name] % n for name in names)]
    rest = count // max(fits)
    fsdp = rest if model.dim % rest == 0 else 1
    return make_mesh({"data": rest // fsdp, "fsdp": fsdp, "tensor": max(fits), "context": 1}, devices)


def restore(run: FinishedRun | PretrainedModel, model: GPT, mesh: Mesh) -> dict:
    """The parameters of a run or of another program, as they are in training."""
    abstract = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        model.shapes,
        state_shardings(model.shapes, model.shapes, mesh),
    )
    return run.parameters(abstract)


def apart(params: dict, parallel: Parallel, types: Mapping, keep: bool) -> dict:
    """The parameters with "blocks" as a list; kernels in the type of their part, in which they are used.

    A program that took one layer of a stacked array would copy it first, in each step. Kernels that are read
    in parts have their inputs last, and those of a line of `TOGETHER` are one array, in place of the first;
    see `in_model`. Unless they are to be kept, arrays are given up one after the other.
    """
    mesh = parallel.mesh
    assert mesh is not None

    def lists(path: tuple, array: jax.Array) -> list[jax.Array]:
        name = path_name(path)
        part = next((part for part in PARTS if part in name.split("/")), "")
        dtype = types[part] if part and parameter_kind(name) != "vector" else array.dtype
        stacked, axes = is_stacked(name), logical_axes(name)
        layout = NamedSharding(mesh, partition_spec(axes[1:] if stacked else axes))
        turned = _inputs(name) if parallel.kernel_parts > 1 else 0
        result = _split(array if stacked else array[None], dtype, layout, turned)
        if not keep:
            array.delete()
        return result

    tree = jax.tree.map_with_path(lists, params)

    def next_layer(part: dict) -> dict:
        """Takes a layer from the lists, so that nothing holds the arrays that `_joined` puts together."""
        return jax.tree.map(lambda arrays: arrays.pop(0), part, is_leaf=lambda x: isinstance(x, list))

    join = _joined if parallel.kernel_parts > 1 else dict
    layers = len(jax.tree.leaves(tree["blocks"], is_leaf=lambda x: isinstance(x, list))[0])
    blocks = [join(next_layer(tree["blocks"])) for _ in range(layers)]
    return {name: next_layer(part) for name, part in tree.items() if name != "blocks"} | {"blocks": blocks}


def in_model(params: dict, parallel: Parallel, shapes: dict) -> dict:
    """Inside a program: the parameters of `apart` as the model knows them, whose `shapes` are given."""

    def turn(path: tuple, array: jax.Array) -> jax.Array:
        last = range(array.ndim - _inputs(path_name(path)), array.ndim)
        return jnp.moveaxis(array, last, range(len(last)))

    if parallel.kernel_parts == 1:
        return params
    blocks = [_separate(block, shapes["blocks"]) for block in params["blocks"]]
    turned = [jax.tree.map_with_path(turn, {"blocks": block})["blocks"] for block in blocks]
    rest = jax.tree.map_with_path(turn, {name: part for name, part in params.items() if name != "blocks"})
    return {**rest, "blocks": turned}


def _joined(block: dict) -> dict:
    """A block whose kernels with the same input are one array, their outputs one after the other."""
    block = {name: dict(part) for name, part in block.items()}
    for part, first, *others in _together(block):
        kernels = [block[part][name]["kernel"] for name in (first, *others)]
        block[part][first] = {**block[part][first], "kernel": jnp.concatenate(kernels)}
        for name in others:
            block[part][name] = {key: value for key, value in block[part][name].items() if key != "kernel"}
    return block


def _separate(block: dict, shapes: dict) -> dict:
    """The block of `_joined` with a kernel of each name again; `shapes` are of stacked layers."""
    block = {name: dict(part) for name, part in block.items()}
    for part, *names in _together(block):
        sizes = [shapes[part][name]["kernel"].shape[2] for name in names]
        ends = list(itertools.accumulate(sizes[:-1]))
        kernels = jnp.split(block[part][names[0]]["kernel"], ends)
        for name, kernel in zip(names, kernels, strict=True):
            block[part][name] = {**block[part][name], "kernel": kernel}
    return block


def _together(block: dict) -> list[tuple[str, ...]]:
    """The lines of `TOGETHER` that a block has."""
    return [(part, *names) for part, *names in TOGETHER if set(names) <= block.get(part, {}).keys()]


def _inputs(path: str) -> int:
    """How many of the first axes of a layer's parameter are a kernel's inputs; 0 if it is no kernel."""
    axes = [axis for axis in logical_axes(path) if axis != "layers"]
    return (1 if axes[0] == "embed" else len(axes) - 1) if parameter_kind(path) in ("matrix", "head") else 0


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _split(stacked: jax.Array, dtype: jnp.dtype, layout: NamedSharding, turned: int) -> list[jax.Array]:
    """Each layer in another type, and with its first axes last."""
    layers = (jnp.moveaxis(layer.astype(dtype), range(turned), range(-turned, 0)) for layer in stacked)
    return [jax.lax.with_sharding_constraint(layer, layout) for layer in layers]
