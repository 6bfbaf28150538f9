"""Measures matrix products: how many operations a second, by shape, form and types."""

import functools
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from trainit.cluster.hardware import peak_flops
from trainit.config import GATED, Config
from trainit.parallel.cpu_workarounds import wide
from trainit.parallel.mesh import RunShape
from trainit.tools.timing import in_turn
from trainit.train.automatic import choice

# How the product of x (rows, inner) and a kernel k (inner, columns), and its gradients by both from dy (rows,
# columns), are written: factors, the axis of each that is summed over, whether the result is transposed.
FORMS: dict[str, tuple[str, str, int, int, bool]] = {
    "x k": ("x", "k", 1, 0, False),
    "dy kᵀ": ("dy", "k", 1, 1, False),
    "xᵀ dy": ("x", "dy", 0, 0, False),
    "(dyᵀ x)ᵀ": ("dy", "x", 0, 0, True),
}
HEAD = "head"
GRADIENTS = ("xᵀ dy", "(dyᵀ x)ᵀ")  # two forms of one product
WORK = {"cpu": 2e10, "gpu": 2e13}  # operations between two looks at the clock: some 50 ms
Sizes = tuple[int, int, int]  # rows, inner, columns


class Product(NamedTuple):
    """A product of a step, on one device, with both of its gradients."""

    name: str
    sizes: Sizes
    times: float  # in a step
    last: bool  # whether its inputs are split over tensor, as those of a half block's last product are


def of_step(config: Config, shape: RunShape) -> list[Product]:
    """Returns the products of a settled config's step on a device."""
    m, (micro_steps, rows, length), sizes = config.model, shape.batch_at(0), shape.sizes
    positions, tensor = rows // shape.shares * length // sizes["context"], sizes["tensor"]
    queries, keys = (count * m.head_dim // tensor for count in (m.num_heads, m.num_kv_heads))
    mlp, layers, chunk = m.mlp_dim // tensor, m.num_blocks * micro_steps, min(shape.logits_chunk, positions)
    maps = 2 if m.activation in GATED else 1
    return [
        Product("queries", (positions, m.dim, queries), layers, False),
        Product("keys, values", (positions, m.dim, keys), 2 * layers, False),
        Product("attention", (positions, queries, m.dim), layers, True),
        Product("MLP", (positions, m.dim, mlp), maps * layers, False),
        Product("MLP, second", (positions, mlp, m.dim), layers, True),
        Product(HEAD, (chunk, m.dim, m.vocab_size // tensor), micro_steps * positions / chunk, False),
    ]


def multiply(form: str, a: jax.Array, b: jax.Array, result: DTypeLike) -> jax.Array:
    """Returns the product of the two factors of a form."""
    _, _, left_axis, right_axis, transposed = FORMS[form]
    axes = ((left_axis,), (right_axis,)), ((), ())
    y = jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.dtype(result))
    return y.T if transposed else y


@functools.cache
def rate(sizes: Sizes, form: str, dtype: str, result: str, rounds: int) -> float:
    """Returns the operations a second of a product of factors of one type, with a result of another.

    It is repeated in a loop, so that its start does not count, and the loop in rounds, whose median counts.
    """
    rows, inner, columns = sizes
    shapes = {"x": (rows, inner), "k": (inner, columns), "dy": (rows, columns)}
    operations = 2 * rows * inner * columns
    wanted = WORK.get(jax.devices()[0].platform, WORK["gpu"]) / operations
    count = round(min(max(wanted, 1), 1000))
    draw = jax.random.split(jax.random.key(0))
    names = FORMS[form][:2]
    a, b = (jax.random.normal(key, shapes[name], dtype) for key, name in zip(draw, names, strict=True))

    @jax.jit
    def repeat(a: jax.Array, b: jax.Array) -> jax.Array:
        # Each product needs the one before: XLA keeps 0 * y, since y may be NaN.
        def again(_: int, carry: tuple) -> tuple:
            factor, last = carry
            factor = factor.at[0, 0].add((0 * last[0, 0]).astype(factor.dtype))
            return factor, multiply(form, factor, b, result)

        return jax.lax.fori_loop(0, count, again, (a, jnp.zeros_like(multiply(form, a, b, result))))[1]

    [times] = in_turn([lambda: repeat(a, b)], rounds)
    return count * operations / median(times)


def measure(config: Config, rounds: int) -> Iterator[str]:
    """Yields the rate of each product of a step in each form and type; a star marks the step's own.

    In brackets is its part of the device's peak, or of the fastest product if the peak is not known.
    """
    config, shape, _ = choice.on_devices(config)
    own, products = jnp.dtype(config.precision), of_step(config, shape)
    between = jnp.dtype(wide(own, shape.device_mesh)).name  # layers; logits and what follows are float32
    types = list(dict.fromkeys([(own.name, own.name), (own.name, "float32"), ("float32", "float32")]))
    cells = [(p, form, *pair) for p in products for form in FORMS for pair in types]
    rates = {cell: rate(cell[0].sizes, *cell[1:], rounds) for cell in cells}
    best = peak_flops(jax.devices()[0].device_kind) or max(rates.values())
    titles = [" to ".join(dict.fromkeys(pair)) for pair in types]
    yield f"TFLOP/s  {'rows × inner × columns':>30}  {'form':10}" + "".join(
        f"{title:>24}" for title in titles
    )
    seconds = least = 0.0
    for p in products:
        gradient, result = GRADIENTS[own == jnp.float32 and p.last], "float32" if p.name == HEAD else between
        used = {("x k", result), ("dy kᵀ", result), (gradient, "float32")}
        for form in FORMS:
            line = f"{p.name:13}{' × '.join(map(str, p.sizes)):>26}  {form:10}"
            for pair in types:
                star = "*" if pair[0] == own.name and (form, pair[1]) in used else " "
                line += f"{rates[p, form, *pair] / 1e12:15.4g} ({rates[p, form, *pair] / best:4.0%}){star}"
            yield line
        operations = 2 * p.times * p.sizes[0] * p.sizes[1] * p.sizes[2]
        seconds += sum(operations / rates[p, form, own.name, to] for form, to in used)
        for forms in (("x k",), ("dy kᵀ",), GRADIENTS):
            fastest = max(rates[p, form, *pair] for form in forms for pair in types if pair[0] == own.name)
            least += operations / fastest
    yield f"{1e3 * seconds:.1f} ms for a step's products; {1e3 * least:.1f} ms in the fastest forms"
