"""Runs with one checkpoint, for what is made of finished runs."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tiny

from trainit.checkpoints.store import CheckpointStore
from trainit.config import resolve
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step


def make_run(folder: Path, data: Path, vocab_size: int, end_of_text: int, **model) -> tuple[dict, dict]:
    """A run with one checkpoint, of parameters that are all drawn, also biases; they, and the config."""
    config = tiny.get_config()
    config.dataset.path = str(data)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.model.update_from_flattened_dict(model)
    config = resolve(config, vocab_size, end_of_text)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    state = step.build(config, shape_on(config, make_mesh(sizes, jax.devices()[:1]))).init()
    params = random_params(state.params)
    store = CheckpointStore(folder)
    state = dataclasses.replace(state, params=jax.tree.map(jax.numpy.asarray, params))
    store.save(7, state, {"config": config.to_dict(), "version": "0", "tokens": 99})
    store.wait()
    store.close()
    return params, config


def random_params(params: dict) -> dict:
    """Parameters near these, none of which is 0 or 1."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + draw.normal(0, 0.2, x.shape).astype("f4"), params)
