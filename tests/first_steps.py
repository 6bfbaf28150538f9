"""The first steps of a run, for tests that compare ways to compute them."""

import jax
import numpy as np

from trainit.config import Config
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step


def losses_and_norms(config: Config, sizes: dict[str, int], below: int, count: int) -> np.ndarray:
    """Loss and gradient norm of `count` steps (2 * count,), on a mesh of these sizes.

    All take the same batch, in one micro-step: ids below a number, drawn from a seed.
    """
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    steps = step.build(config, shape_on(config, mesh))
    rows, length = config.batch_size, config.model.context_length
    ids = np.random.default_rng(0).integers(0, below, (1, rows, length + 1))
    batch = {"tokens": ids.astype(np.uint16), "lengths": np.full((1, rows), length, np.int32)}
    batch, state, found = jax.device_put(batch, batch_sharding(mesh)), steps.init(), []
    for _ in range(count):
        state, result = steps.train(state, batch)
        found += [float(result["train/loss"]), float(result["train/grad_norm"])]
    return np.array(found)
