"""Mango: for each kind of parameter its own normalization, rate, betas and scaling by the weight's norm.

The second version of the optimizer of that name in github.com/ZQZCalin/trainit. It joins the division
of LaProp (Ziyin et al. 2020, arXiv 2002.04839), the orthogonalized momentum of Muon (Jordan et al. 2024)
and the trust in the weight's norm of LAMB (You et al. 2020, arXiv 1904.00962), and adds a running mean of
its updates to them.
"""

import math

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field, require
from trainit.parallel.layout import matrix_shape, parameter_kind
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import add_mean, map_layers, scale_by_moments
from trainit.transforms.newton_schulz import scale_by_newton_schulz, spectral_norm

NORMALIZE = ("none", "l2", "l2_row", "l2_split", "inf", "inf_row", "inf_split", "ns", "ns_split")
SCALE = ("none", "l2", "l2_row", "inf", "inf_row", "op")
# What each kind is normalized and scaled by; `kind` says which parameters it has.
KINDS = {
    "matrix": ("ns", "op"),
    "attention_kernel": ("ns", "op"),
    "head": ("ns", "op"),
    "embedding": ("none", "none"),
    "attention_bias": ("l2", "l2"),
    "scale": ("none", "none"),
    "bias": ("l2", "l2"),
}


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=0.01, weight_decay=0.0, ns_steps=6, ns_precision="bfloat16")
    config.eps = field(1e-8, "added to each divisor", above=0)
    config.offset_beta = field(0.95, "decay of the mean update that is added; 0: none", at_least=0, below=1)
    config.scale_floor = field(0.1, "least that a weight's norm counts as, so that zeros move", above=0)
    for kind, (normalize, scale) in KINDS.items():
        config[kind] = field(_kind_config(normalize, scale), f"settings of parameters of kind {kind}")
    return config


def _kind_config(normalize: str, scale: str) -> ConfigDict:
    config = ConfigDict()
    config.rate = field(1.0, "learning rate, in units of the scheduled one", at_least=0)
    config.beta1 = field(0.95, "decay of the momentum", at_least=0, below=1)
    config.beta2 = field(0.95, "decay of the squared gradients; 0: no division", at_least=0, below=1)
    config.nesterov = field(True, "the momentum looks one step ahead")
    config.use_adam = field(False, "both moments as in Adam: debiased means, divided at the end")
    # l2, inf: the norm of the whole; l2_row, inf_row: that of each unit; ns: Newton-Schulz. Attention's
    # queries, keys and values also have l2_split, inf_split and ns_split, for each head.
    config.normalize = field(normalize, "what divides the update: a norm, or Newton-Schulz", one_of=NORMALIZE)
    config.scale = field(scale, "norm of the weight that multiplies; _row: each unit's own", one_of=SCALE)
    config.scale_power = field(1.0, "power of that norm")
    return config


def kind(path: str) -> str:
    """Which of `KINDS` the parameter with this path is."""
    if parameter_kind(path) in ("embedding", "head"):
        return parameter_kind(path)
    is_attention = any(f"attention/{name}/" in path for name in ("query", "key", "value"))
    if parameter_kind(path) == "matrix":
        return "attention_kernel" if is_attention else "matrix"
    if path.endswith("scale"):
        return "scale"
    return "attention_bias" if is_attention else "bias"


def make(config, context) -> optax.GradientTransformation:
    directions = {name: _direction(name, config, context) for name in KINDS}
    direction = optax.partition(directions, context.by_path(lambda path, _: kind(path)))
    offset = add_mean(config.offset_beta) if config.offset_beta else optax.identity()
    return context.descend(optax.chain(direction, offset))


def _direction(name: str, config, context) -> optax.GradientTransformation:
    c = config[name]
    power, flat = c.scale_power, name in ("attention_bias", "scale", "bias")
    for key, for_matrices in (("normalize", c.normalize.startswith("ns")), ("scale", c.scale == "op")):
        wrong = f"optimizer.{name}.{key}={c[key]} is for matrices, which {name} is not"
        require(not (flat and for_matrices), wrong)
    wrong = f"optimizer.{name}.normalize={c.normalize} is for attention's queries, keys and values"
    require(not c.normalize.endswith("split") or name.startswith("attention"), wrong)

    def normalized(path, u):
        return u / (size(path, u, c.normalize) + config.eps)

    def scaled(path, u, x):
        return u * jnp.maximum(size(path, x, c.scale), config.scale_floor) ** power

    normalize = optax.stateless(lambda updates, params: map_layers(normalized, updates))
    scale = optax.stateless(lambda updates, params: map_layers(scaled, updates, params))
    if c.normalize.startswith("ns"):
        options = {"steps": config.ns_steps, "dtype": config.ns_precision, "eps": config.eps}
        normalize = scale_by_newton_schulz(context.mesh, split_heads=c.normalize == "ns_split", **options)
    return optax.chain(
        _moments(c, config.eps),
        normalize if c.normalize != "none" else optax.identity(),
        scale if c.scale != "none" else optax.identity(),
        optax.scale(c.rate),
    )


def _moments(c, eps: float) -> optax.GradientTransformation:
    """Momentum of divided gradients: v <- beta2 v + g^2, m <- beta1 m + g / (sqrt(v) + eps); or Adam's."""
    if c.use_adam and c.beta2:
        return scale_by_moments(c.beta1, c.beta2, eps, nesterov=c.nesterov)
    momentum = optax.trace(c.beta1, c.nesterov)
    if not c.beta2:
        return momentum
    root = math.sqrt(1 - c.beta2)  # turns the root of a mean square into that of a sum
    divide = scale_by_moments(beta2=c.beta2, eps=eps * root, debias_beta2=False, use_momentum=False)
    return optax.chain(divide, optax.scale(root), momentum)


def size(path: str, x: jax.Array, name: str) -> jax.Array:
    """A norm of one layer's parameter: a scalar, or one of each unit, in a shape that broadcasts with x.

    A matrix's units are its outputs, an embedding's are its rows, a vector's are its entries. inf is the
    largest sum of a unit's absolute entries; inf_row a unit's largest absolute entry; op the spectral norm;
    l2_split and inf_split are those of each head.
    """
    if name.endswith("split"):  # x: ([embed,] heads, head size)
        heads = jnp.moveaxis(x, -2, 0).reshape(x.shape[-2], -1, x.shape[-1])
        largest = jnp.max(jnp.sum(jnp.abs(heads), 1), 1)
        return (largest if name == "inf_split" else jax.vmap(jnp.linalg.norm)(heads))[:, None]
    if parameter_kind(path) == "vector":
        own, whole = jnp.abs(x), {"l2": jnp.linalg.norm(x), "inf": jnp.max(jnp.abs(x))}
        return whole.get(name, own)
    matrix = x.reshape(matrix_shape(path, x.shape))
    inputs = 1 if parameter_kind(path) == "embedding" else 0
    match name:
        case "l2":
            return jnp.linalg.norm(matrix)
        case "inf":
            return jnp.max(jnp.sum(jnp.abs(matrix), inputs))
        case "op":
            return spectral_norm(matrix)
        case "l2_row":
            units = jnp.sqrt(jnp.sum(matrix * matrix, inputs, keepdims=True))
        case "inf_row":
            units = jnp.max(jnp.abs(matrix), inputs, keepdims=True)
    return jnp.broadcast_to(units, matrix.shape).reshape(x.shape)
