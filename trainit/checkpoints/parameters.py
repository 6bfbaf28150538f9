"""Single parameters of a checkpoint, where the whole model need not fit the memory."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from trainit.checkpoints.store import CheckpointStore
from trainit.parallel.trees import path_name


def parameter_shapes(store: CheckpointStore, step: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters in the checkpoint of `step`, by their paths."""
    with store.reading(step):
        tree = store.opened.item_metadata(step)["state"].tree["params"]
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def read_parameters(store: CheckpointStore, step: int, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Some parameters of the checkpoint of `step`, whole, by their paths; nothing else is read."""
    item: dict = {}
    for path in paths:
        *groups, leaf = ["params", *path.split("/")]
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), groups, item)[leaf] = 0
    numpy_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item, restore_args=numpy_arrays, partial_restore=True)
    with store.reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(store.folder / str(step) / "state", args=args)["params"]
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
