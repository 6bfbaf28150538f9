"""What tests of optimizers share: a small tree of every kind of parameter, gradients, and NumPy's side."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict

import trainit.config
from trainit import optimizers
from trainit.model.gpt import GPT

# Not in order and not from 0, so that a count of updates gives other rates.
STEPS = (4, 9, 2, 2, 7)
RATES = np.array([0.0, 0.5, 0.02, 0.9, 0.1, 0.6, 0.3, 0.07, 0.8, 0.4])


def model(num_blocks: int = 2) -> GPT:
    """A GPT that has every kind of parameter."""
    config = trainit.config.defaults()
    config.model = trainit.config.model(
        dim=16,
        num_heads=2,
        num_blocks=num_blocks,
        context_length=8,
        vocab_size=128,
        head_bias=True,
        qk_norm=True,
    )
    config.optimizer = optimizers.choices()["adamw"]()
    return GPT(trainit.config.resolve(config, 100).model)


@functools.cache
def parameter_shapes(num_blocks: int = 2) -> dict:
    return model(num_blocks).shapes


@functools.cache
def some_shapes(num_blocks: int = 2) -> dict:
    """One parameter of each kind and layout, so that an update is compiled fast."""
    whole = parameter_shapes(num_blocks)
    attention, mlp = whole["blocks"]["attention"], whole["blocks"]["mlp"]
    blocks = {
        "attention": {"query": attention["query"], "out": {"kernel": attention["out"]["kernel"]}},
        "attention_norm": whole["blocks"]["attention_norm"],
        "mlp": {"up": {"kernel": mlp["up"]["kernel"]}, "down": {"kernel": mlp["down"]["kernel"]}},
    }
    return {"blocks": blocks, "head": whole["head"], "token_embedding": whole["token_embedding"]}


def by_path(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def flat(tree: dict) -> np.ndarray:
    """All parameters as one vector."""
    return np.concatenate([leaf.ravel() for leaf in by_path(tree).values()])


def unflat(vector: np.ndarray, like: dict) -> dict:
    """{path: array}"""
    arrays = by_path(like)
    ends = np.cumsum([leaf.size for leaf in arrays.values()])[:-1]
    parts = np.split(vector, ends)
    return {path: part.reshape(leaf.shape) for (path, leaf), part in zip(arrays.items(), parts, strict=True)}


def decay_mask(tree: dict) -> np.ndarray:
    """Of `flat`: where weights decay."""
    return np.concatenate([np.full(leaf.size, decays(path)) for path, leaf in by_path(tree).items()])


class Adam:
    """Kingma & Ba 2014, algorithm 1, of one array; `square` is what the second moment averages."""

    def __init__(self, beta1, beta2, eps):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.m = self.v = self.t = 0

    def __call__(self, g, square=None):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * (g**2 if square is None else square)
        mean, square = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return mean / (np.sqrt(square) + self.eps)


def draw(shapes: dict, seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (scale * rng.standard_normal(s.shape)).astype(np.float32), shapes)


def draw_gradients(shapes: dict) -> list[dict]:
    """Of five steps, with global norms below and above 40, and some parameters' small."""
    gradients = [draw(shapes, seed, scale) for seed, scale in enumerate((0.1, 3.0, 1.0, 0.01, 2.0))]
    for gradient in gradients:
        gradient["blocks"]["mlp"]["up"]["kernel"] *= 1e-2
        gradient["head"]["bias"] *= 1e-3
    return gradients


def sides(path: str, shape: tuple, max_size: int) -> tuple[int, int, bool, bool]:
    """Rows and columns of one layer's matrix, and which of them have a factor in SOAP and Shampoo."""
    inputs = 1 if path.endswith(("query/kernel", "up/kernel", "head/kernel")) else len(shape) - 1
    rows, columns = int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))
    left = rows <= max_size and not path.endswith("embedding")
    return rows, columns, left, columns <= max_size and path != "head/kernel"


def draw_gradients_with_a_basis(shapes: dict) -> list[dict]:
    """As `draw_gradients`, but SOAP's updates for them do not depend on how rounding falls.

    A factor's eigenvectors are defined only where its eigenvalues are well apart, and SOAP's first directions
    are signs of what a gradient is in that basis. So all five gradients of a matrix, U A V^T, have U and V in
    common. The factors of the first one, which give the basis, have squares of whole numbers as eigenvalues.
    In the others no entry of A is near 0 or changes its sign. A side that is longer than the other has
    eigenvalues 0, whose eigenvectors are not defined, but no gradient has a part there.
    """
    gradients = draw_gradients(shapes)

    def matrices(path: str, shape: tuple, layer: int, scales: list[float]) -> list[np.ndarray]:
        rng = np.random.default_rng([zlib.crc32(path.encode()), layer])
        rows, columns, left, right = sides(path, shape, 10_000)
        rank = min(rows, columns)
        u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (rows, columns))
        first = u * np.arange(1, rank + 1) @ v.T
        u, v = u if left else np.eye(rows), v if right else np.eye(columns)
        signs = rng.choice([-1.0, 1.0], (u.shape[1], v.shape[1]))
        others = [u @ (signs * rng.uniform(0.5, 1.5, signs.shape)) @ v.T for _ in scales[1:]]
        return [
            (scale * m).reshape(shape).astype(np.float32)
            for scale, m in zip(scales, [first, *others], strict=True)
        ]

    def replaced(path, *leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        scales = [float(np.sqrt((leaf**2).mean())) for leaf in leaves]
        if name.endswith(("bias", "scale")):
            return leaves
        if not name.startswith("blocks/"):
            return matrices(name, leaves[0].shape, 0, scales)
        layers = [matrices(name, leaf.shape, layer, scales) for layer, leaf in enumerate(leaves[0])]
        return [np.stack(step) for step in zip(*layers, strict=True)]

    made = jax.tree.map_with_path(replaced, *gradients)
    return [jax.tree.map(lambda _, leaves, i=i: leaves[i], shapes, made) for i in range(len(gradients))]


def build(
    name: str,
    changes: dict,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    schedule=None,
    shapes: dict | None = None,
    mesh=None,
):
    """An optimizer, the way `step` builds it; by default with RATES and for `some_shapes`."""
    config = optimizers.choices()[name]()
    config.update(changes)
    context = optimizers.Context(
        schedule=schedule or (lambda step: jnp.asarray(RATES, jnp.float32)[step]),
        steps=len(RATES),
        parameters=shapes or some_shapes(),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        key=jax.random.key_data(jax.random.key(0)),
        mesh=mesh,
    )
    return optimizers.build(FrozenConfigDict(config), context)


def run(optimizer, parameters: dict, gradients: list[dict]) -> list[dict]:
    """The updates at STEPS, each applied before the next."""
    update = jitted(optimizer)
    state, updates = jax.jit(optimizer.init)(parameters), []
    for step, gradient in zip(STEPS, gradients, strict=True):
        change, state, parameters = update(gradient, state, parameters, np.int32(step))
        updates.append(change)
    return updates


CURVATURE = 0.1  # of the loss whose gradients `jitted` gives elsewhere


def jitted(optimizer, gradient=None):
    """(gradients, state, parameters, step) -> update, state, updated parameters.

    gradient: parameters -> gradients; by default those given, plus CURVATURE times the way from there.
    """

    def update(gradients, state, parameters, step):
        def near(elsewhere):
            return jax.tree.map(lambda g, x, p: g + CURVATURE * (x - p), gradients, elsewhere, parameters)

        change, state = optimizer.update(
            gradients, state, parameters, step=step, gradient_at=gradient or near
        )
        return change, state, optax.apply_updates(parameters, change)

    return jax.jit(update)


def decays(path: str) -> bool:
    return path.endswith(("kernel", "embedding"))


def numpy_updates(
    direction, parameters, gradients, weight_decay=0.0, clip_norm=0.0, coupled=False, rates=lambda path: 1.0
) -> list[dict]:
    """Clip by global norm, `direction`(path, gradient, t) with decay after it or before, minus the rate.

    rates: path -> in units of the step's.
    """
    parameters, updates = by_path(parameters), []
    for t, (step, gradient) in enumerate(zip(STEPS, map(by_path, gradients), strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        clip = min(1.0, clip_norm / norm) if clip_norm else 1.0
        update = {}
        for path, g in gradient.items():
            decay = weight_decay * parameters[path] if decays(path) else 0.0
            if coupled:
                update[path] = -rates(path) * RATES[step] * direction(path, clip * g + decay, t)
            else:
                update[path] = -rates(path) * RATES[step] * (direction(path, clip * g, t) + decay)
            parameters[path] = parameters[path] + update[path]
        updates.append(update)
    return updates


def compare(updates: list[dict], expected: list[dict], rtol: float = 1e-5):
    """Entry by entry; sums of opposite terms round at the size of the largest."""
    for number, (update, want) in enumerate(zip(map(by_path, updates), expected, strict=True)):
        assert update.keys() == want.keys()
        for path, value in update.items():
            where = f"{path} at update {number}"
            assert np.abs(want[path]).max() > 0, where
            atol = 0.1 * rtol * np.abs(want[path]).max()
            np.testing.assert_allclose(value, want[path], rtol=rtol, atol=atol, err_msg=where)
