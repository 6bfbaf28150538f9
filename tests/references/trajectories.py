"""The same problem for an optimizer of ours and one of torch's kind, and their parameters at every step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optimizer_cases import build, by_path, decays, draw, some_shapes

from trainit import optimizers
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind

STEPS = 40
RATES = 0.02 + 0.01 * np.sin(np.arange(STEPS))


def slope(curvature, target, noise, x):
    """Of a loss that is no quadratic, and not convex everywhere; entry by entry, in either library."""
    return curvature * (x - target) + x / (1 + x * x) + noise


def split(tree: dict) -> dict[str, np.ndarray]:
    """Each layer's parameters as torch has them: the kernel of a linear map is (outputs, inputs)."""
    parts = {}
    for path, x in by_path(tree).items():
        kind = parameter_kind(path)
        for number, layer in enumerate(x if is_stacked(path) else [x]):
            shape = -1 if kind == "vector" else matrix_shape(path, layer.shape)
            part = layer.reshape(shape)
            parts[f"{path}/{number}"] = np.ascontiguousarray(part.T if kind in ("matrix", "head") else part)
    return parts


class Problem:
    """A start, and gradients at every point that change with the step."""

    def __init__(self, shapes: dict):
        self.start = jax.tree.map(np.float64, draw(shapes, 1, 0.5))
        self.curvature = jax.tree.map(lambda x: 0.1 + np.abs(x, dtype=np.float64), draw(shapes, 2))
        self.target = jax.tree.map(np.float64, draw(shapes, 3))
        self.noise = [jax.tree.map(np.float64, draw(shapes, 10 + t, 0.3)) for t in range(STEPS)]

    def ours(self, optimizer):
        """Parameters and state after each step."""

        @jax.jit
        def update(x, state, step, noise):
            def gradient_at(p):
                return jax.tree.map(slope, self.curvature, self.target, noise, p)

            change, state = optimizer.update(
                gradient_at(optimizers.training_point(state, x)),
                state,
                x,
                step=step,
                gradient_at=gradient_at,
                sampled_gradient_at=lambda p, key: (gradient_at(p), 7.0),
            )
            return optax.apply_updates(x, change), state

        x, state = self.start, optimizer.init(self.start)
        for step, noise in enumerate(self.noise):
            x, state = update(x, state, step, noise)
            yield x, state

    def theirs(self):
        """The parameters by name, and what fills in their gradients of a step."""
        named = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in split(self.start).items()}
        constants = [split(tree) for tree in (self.curvature, self.target)]
        noise = [split(tree) for tree in self.noise]

        def fill(step: int):
            for name, p in named.items():
                known = (torch.tensor(x[name]) for x in (*constants, noise[step]))
                p.grad = slope(*known, p.detach())

        return named, fill


def plain_step(optimizer, fill: Callable, step: int):
    fill(step)
    optimizer.step()


def compare(
    optimizer,
    reference: Callable,
    weight_decay: float = 0.0,
    rates: np.ndarray = RATES,
    shapes: dict | None = None,
    step: Callable = plain_step,
    read: Callable = lambda reference, p: p,
    rtol: float = 1e-9,
):
    """Runs both, and compares how far parameters are from where they began.

    Args:
        optimizer: ours.
        reference: (torch's parameter groups, parameters by name) -> the package's.
        weight_decay: for matrices and embeddings.
        rates: one for every step; those of the package are multiplied by what it begins with.
        shapes: those of the parameters.
        step: (package's optimizer, fill(step), number) makes its step.
        read: (package's optimizer, its parameter) -> what corresponds to our parameter.
        rtol: relative to the largest way of an array; float64 leaves 1e-16 of a parameter, which grows.
    """
    problem = Problem(shapes or some_shapes())
    named, fill = problem.theirs()
    groups = [
        {"params": [p for name, p in named.items() if decays(name.rpartition("/")[0]) == on], **decay}
        for on, decay in ((True, {"weight_decay": weight_decay}), (False, {"weight_decay": 0.0}))
    ]
    theirs = reference([group for group in groups if group["params"]], named)
    units = [group["lr"] for group in theirs.param_groups]
    start, moved = split(problem.start), 0.0
    for number, (x, _) in enumerate(problem.ours(optimizer)):
        for group, unit in zip(theirs.param_groups, units, strict=True):
            group["lr"] = float(unit * rates[number])
        step(theirs, fill, number)
        for name, value in split(x).items():
            want = read(theirs, named[name]).detach().numpy()
            way = np.abs(want - start[name]).max()
            worst = np.abs(value - want).max()
            assert worst <= rtol * way + 1e-14, f"{name} at step {number}: {worst / max(way, 1e-300):.1e}"
            moved = max(moved, way)
    assert moved > 0.01


def ours(name: str, changes: dict, weight_decay: float = 0.0, rates: np.ndarray = RATES, shapes=None):
    return build(name, changes, weight_decay, schedule=lambda s: jnp.asarray(rates)[s], shapes=shapes)
