"""Newton-Schulz on the matrices that parameters are, and their largest singular value."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from trainit.parallel import per_layer
from trainit.parallel.layout import is_stacked, matrix_shape, parameter_kind
from trainit.parallel.trees import path_name

# Of the quintic in each iteration; the last ones are repeated.
COEFFICIENTS = {
    "jordan": [(3.4445, -4.7750, 2.0315)],  # singular values end in about [0.7, 1.2]
    "convergent": [(2.0, -1.5, 0.5)],  # they end at 1, as under those that follow
    # Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932: the best for singular values in [0.001, 1], with
    # the authors' margin of 1 % in all iterations except the last.
    "polar_express": [
        *(
            (a / 1.01, b / 1.01**3, c / 1.01**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    ],
    "dion": [  # of Dion's authors, as optax has them
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}
# What an orthogonal update of a matrix with these inputs and outputs is multiplied by.
SCALES: dict[str, Callable[[float, float], float]] = {
    "jordan": lambda inputs, outputs: math.sqrt(max(1.0, outputs / inputs)),  # kellerjordan.github.io
    "moonlight": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),  # arXiv 2502.16982: AdamW's
    "spectral": lambda inputs, outputs: math.sqrt(outputs / inputs),  # arXiv 2310.17813: for all widths
    "none": lambda inputs, outputs: 1.0,
}
POWER_STEPS = 12


def newton_schulz(x: jax.Array, steps: int, dtype: str, eps: float, coefficients="jordan") -> jax.Array:
    """Nearly the orthogonal factor U V^T of the float32 matrix x = U S V^T.

    `steps` times the quintic, with products in `dtype` (Jordan 2024, kellerjordan.github.io/posts/muon).
    """
    *first, last = COEFFICIENTS[coefficients]
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = (wide / (jnp.linalg.norm(wide) + eps)).astype(dtype)
    for a, b, c in [*first, *[last] * steps][:steps]:
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.astype(x.dtype)
    return y.T if x.shape[0] > x.shape[1] else y


def spectral_norm(x: jax.Array) -> jax.Array:
    """The largest singular value of a matrix, by POWER_STEPS power iterations from a fixed start.

    They cost two products with a vector each, where an SVD would take longer than the step. Too small by a
    few percent where the largest values are close to each other.
    """
    v = jax.random.normal(jax.random.key(0), (x.shape[1],))
    for _ in range(POWER_STEPS):
        v = x.T @ (x @ (v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(x.dtype).tiny)))
    return jnp.linalg.norm(x @ (v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(x.dtype).tiny)))


def unit_norms(x: jax.Array, of: str, eps: float) -> jax.Array:
    """x (inputs, outputs) with the Euclidean norm 1 for each of its inputs or outputs; "none": x itself."""
    axis = {"inputs": 1, "outputs": 0}
    return x if of == "none" else x / (jnp.linalg.norm(x, axis=axis[of], keepdims=True) + eps)


def orthogonalize(
    path: str,
    x: jax.Array,
    mesh: Mesh | None,
    blocks: int = 1,
    scale: str = "jordan",
    before: str = "none",
    after: str = "none",
    **options,
) -> jax.Array:
    """`newton_schulz` of a parameter's matrix, times what SCALES says for its inputs and outputs.

    An embedding counts as its table is stored: its width over its rows. Stacked layers in x are dealt out
    over the mesh. With several blocks of columns, each is a matrix by itself. `before` and `after` name what
    gets unit norms: "inputs", "outputs" or "none".
    """
    rows, columns = matrix_shape(path, x.shape[1:] if is_stacked(path) else x.shape)
    is_table = parameter_kind(path) == "embedding"
    factor = SCALES[scale](*((columns, rows) if is_table else (rows, columns / blocks)))

    def part(matrix):
        done = newton_schulz(unit_norms(matrix, before, options["eps"]), **options)
        return unit_norms(done, after, options["eps"])

    def one(matrix):
        parts = jnp.moveaxis(matrix.reshape(rows, blocks, -1), 1, 0)
        done = jax.vmap(part)(parts)
        return jnp.moveaxis(done, 0, 1).reshape(rows, columns)

    if is_stacked(path):
        done = per_layer.map_layers(path, mesh, one, x.reshape(-1, rows, columns))
    else:
        done = one(per_layer.constrain(x.reshape(rows, columns), mesh, PartitionSpec()))
    return per_layer.as_parameter(path, done * factor, x.shape, mesh)


def scale_by_newton_schulz(
    mesh: Mesh | None, split_heads: bool = False, **options
) -> optax.GradientTransformation:
    """`orthogonalize` for every parameter that the updates have, whole or for each head."""

    def one(path, u):
        return orthogonalize(path_name(path), u, mesh, u.shape[-2] if split_heads else 1, **options)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates))
