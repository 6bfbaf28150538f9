"""Measures forms of a matrix product on this machine's first device: types of results, transposed factors.

`parallel/cpu_workarounds.py` takes the forms that are fast on CPUs. The products are those of an MLP at
P positions: x (P, F) by a kernel k (F, D), its gradient dy (P, D) by k, and the kernel's, x by dy.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from tabulate import tabulate

from trainit.tools.timing import in_turn

SIZES = ((4096, 384, 1536), (4096, 1536, 384), (4096, 768, 3072))


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], result, rounded: bool = False) -> jax.Array:
    contract = ((axes[:1], axes[1:]), ((), ()))
    y = jax.lax.dot_general(a, b, contract, preferred_element_type=result)
    return y.astype(a.dtype) if rounded else y


def _forms(dtype) -> dict[str, Callable]:
    """Forms of products by what the table calls them; each takes x and, by its name, a kernel or dy."""
    return {
        "x k": partial(_product, axes=(1, 0), result=dtype),
        "x k, float32, rounded": partial(_product, axes=(1, 0), result=jnp.float32, rounded=True),
        "dy kT": partial(_product, axes=(1, 1), result=dtype),
        "dy kT, float32, rounded": partial(_product, axes=(1, 1), result=jnp.float32, rounded=True),
        "xT dy, float32": partial(_product, axes=(0, 0), result=jnp.float32),
        "(dyT x)T, float32": lambda x, dy: _product(dy, x, (0, 0), jnp.float32).T,
    }


def measure(rounds: int, sizes: tuple = SIZES) -> Iterator[str]:
    """Yields the lines of a table: 1e9 operations a second of each form, by type and sizes, at best."""
    rows, headers = [], [""]
    for dtype in (jnp.dtype("bfloat16"), jnp.dtype("float32")):
        for P, F, D in sizes:
            shapes = {"x k": ((P, F), (F, D)), "dy kT": ((P, D), (F, D)), "T": ((P, F), (P, D))}
            forms, calls = _forms(dtype), []
            for name, form in forms.items():
                shape = next(shapes[start] for start in shapes if start in name)
                keys = jax.random.split(jax.random.key(0))
                factors = [jax.random.normal(key, of, dtype) for key, of in zip(keys, shape, strict=True)]
                calls.append(partial(jax.jit(form), *factors))
            speeds = [2e-9 * P * F * D / min(times) for times in in_turn(calls, rounds)]
            rows.append([f"{dtype.name}, {P} × {F} × {D}", *(f"{speed:.0f}" for speed in speeds)])
            headers = ["1e9 operations a second", *forms]
    yield from tabulate(rows, headers, "github", disable_numparse=True).splitlines()
