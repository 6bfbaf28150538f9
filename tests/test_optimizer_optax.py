"""Optimizers of optax by their names, and Adafactor, which is ours since optax takes layers for one array."""

import jax
import numpy as np
import optax
import optax.contrib
import pytest
import tiny
from optimizer_cases import (
    RATES,
    STEPS,
    build,
    by_path,
    compare,
    draw,
    draw_gradients,
    numpy_updates,
    run,
    some_shapes,
)

from trainit import config as config_lib
from trainit.checkpoints.store import CheckpointStore
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.parallel.trees import path_name
from trainit.train import step

# Each with a part of the model.
GROUPS = {
    "token_embedding/.*": "optax.lion",
    "head/kernel": "optax.contrib.adopt",
    "blocks/attention/.*": "optax.contrib.ademamix",
    "blocks/mlp/.*": "optax.contrib.prodigy",
    "position_embedding/.*": "optax.contrib.dadapt_adamw",
}
NAMES = sorted(GROUPS.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_called_with_the_runs_rate_and_decay(name):
    """The function made again with each step's rate; its own decay, by our mask if it takes one, or ours."""
    parameters, gradients = draw(some_shapes(), 91), draw_gradients(some_shapes())
    learns = name.endswith(("prodigy", "dadapt_adamw"))  # its rate, from a very small one
    changes = {"estim_lr0": 1e-2} if learns else {}
    got = run(build(name, changes, 0.3), parameters, gradients)
    function = getattr(optax.contrib if "contrib" in name else optax, name.split(".")[-1])
    mask = jax.tree.map_with_path(
        lambda path, _: path_name(path).endswith(("kernel", "embedding")), parameters
    )
    decays = {"weight_decay": 0.3} | ({} if learns else {"mask": mask})
    fields = changes | ({} if name.endswith("adopt") else decays)
    make = lambda at: function(learning_rate=float(RATES[at]), **fields)  # noqa: E731
    state, expected, x = make(STEPS[0]).init(parameters), [], parameters
    for at, gradient in zip(STEPS, gradients, strict=True):
        update, state = make(at).update(gradient, state, x)
        if name.endswith("adopt"):
            update = jax.tree.map(lambda u, p, m: u - RATES[at] * 0.3 * p * m, update, x, mask)  # noqa: B023
        x = optax.apply_updates(x, update)
        expected.append(by_path(update))
    for number, (update, want) in enumerate(zip(map(by_path, got), expected, strict=True)):
        for path, value in update.items():
            scale = np.abs(want[path]).max()
            assert number == 0 or scale > 0, path
            np.testing.assert_allclose(value, want[path], rtol=1e-4, atol=1e-5 * scale, err_msg=path)


def test_each_trains_its_part_of_a_model_and_goes_on_where_it_was(tmp_path):
    """On eight devices: the loss falls, state is split as parameters are, and what is restored continues."""
    config = tiny.get_config()
    config.schedule = config_lib.SCHEDULES["constant"]()
    config.schedule.warmup = 2  # begins with a rate of 0, by which some divide
    lines = [f"{pattern} optimizer={name}" for pattern, name in GROUPS.items()]
    config.parameter_groups = tuple(
        line + (" learning_rate=1 estim_lr0=1e-3" if "prodigy" in line or "dadapt" in line else "")
        for line in lines
    )
    config = config_lib.resolve(config, 257)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    steps = step.build(config, shape_on(config, mesh))
    tokens = np.tile(np.random.default_rng(3).integers(0, 256, 33), (2, 8, 1)).astype(np.uint16)
    batch = {"tokens": tokens, "lengths": np.full((2, 8), 32, np.int32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    state, losses, begin = steps.init(), [], by_path(steps.init().params)
    for _ in range(6):
        state, metrics = steps.train(state, batch)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 0.3, losses
    for path, value in by_path(state.params).items():
        assert np.isfinite(value).all() and np.abs(value - begin[path]).max() > 0, path
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        parts = leaf.size / np.prod(leaf.sharding.shard_shape(leaf.shape))
        name = path_name(path)
        assert parts == 4 or not name.endswith(("kernel", "token_embedding/embedding")), name
    checkpoints = CheckpointStore(tmp_path)
    checkpoints.save(6, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(6, steps.abstract_state)
    checkpoints.close()
    after, again = (steps.train(s, batch)[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, after, again)


def test_adafactor():
    """Shazeer & Stern 2018, algorithms 4 and 5, for each layer's matrices with heads joined."""
    parameters, gradients = draw(some_shapes(), 92, 0.02), draw_gradients(some_shapes())
    parameters["head"]["bias"] *= 0  # moves by the floor
    fields = {"beta1": 0.6, "decay_power": 0.7, "eps": 1e-4, "threshold": 0.9, "scale_floor": 0.01}
    got = run(build("adafactor", fields, 0.3, 40.0), parameters, gradients)
    inputs = {"query/kernel": 1, "up/kernel": 1, "head/kernel": 1}  # axes; all but the last for the others
    x, state, mean, clipped = by_path(parameters), {}, {}, []

    def one(key, path, g, x, beta2):
        square = g**2 + 1e-4
        if path.endswith(("bias", "scale")):
            root = state[key] = beta2 * state.get(key, 0.0) + (1 - beta2) * square
        else:
            axes = next((n for end, n in inputs.items() if path.endswith(end)), g.ndim - 1)
            square = square.reshape(int(np.prod(g.shape[:axes])), -1)
            rows, columns = state.get(key, (0.0, 0.0))
            rows = beta2 * rows + (1 - beta2) * square.mean(1)
            columns = beta2 * columns + (1 - beta2) * square.mean(0)
            state[key] = rows, columns
            root = (np.outer(rows, columns) / rows.mean()).reshape(g.shape)
        u = g / np.sqrt(root)
        size = np.sqrt((u**2).mean())
        clipped.append(size > 0.9)
        return max(0.01, np.sqrt((x**2).mean())) * u / max(1, size / 0.9)

    def direction(path, g, t):
        if t > 1:  # the parameters that this step starts from
            x[path] = x[path] + by_path(got[t - 2])[path]
        beta2 = 1 - t**-0.7
        if path.startswith("blocks/"):
            layers = [one((path, n), path[7:], g[n], x[path][n], beta2) for n in range(len(g))]
            u = np.stack(layers)
        else:
            u = one(path, path, g, x[path], beta2)
        mean[path] = 0.6 * mean.get(path, 0.0) + 0.4 * u
        return mean[path]

    compare(got, numpy_updates(direction, parameters, gradients, 0.3, 40.0), rtol=1e-4)
    assert 0.2 < np.mean(clipped) < 0.8
