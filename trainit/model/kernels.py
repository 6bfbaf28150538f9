"""Attention on the mesh: each device computes its own rows, heads and positions."""

import functools
from collections.abc import Callable

import jax

from trainit.model import ring
from trainit.model.attention import Form, blockwise, cudnn, plain
from trainit.parallel.collectives import Parallel


def kernel_on(name: str, platform: str, parallel: Parallel) -> Callable:
    """The kernel of this name (`RunShape.attention`), with the arguments and the result of `attention.plain`.

    Only "gather" and "ring" take sequences that are split, and only these.
    """
    on_cpu, context = platform == "cpu", parallel.axes("length")
    kernels: dict[str, Callable] = {"plain": plain, "cudnn": cudnn}
    kernels["blockwise"] = functools.partial(blockwise, on_cpu=on_cpu)
    if context:
        how: dict = {"axis": context[0], "devices": parallel.parts("length"), "on_cpu": on_cpu}
        split = functools.partial(ring.attend, gathers=name == "gather", **how)
        kernels = dict.fromkeys(("gather", "ring"), split)
    kernel = kernels[name]

    # Every device has the documents of whole rows, since it sees other devices' keys.
    queries = parallel.spec("batch", "length", "heads", None)
    keys = parallel.spec("batch", "length", "kv_heads", None)
    inputs = (queries, keys, keys, parallel.spec("batch", None), parallel.spec("batch", "heads"))

    def attend(*arrays, rate: float, form: Form) -> jax.Array:
        own = functools.partial(kernel, rate=rate, form=form)
        return parallel.shard_map_if_needed(own, inputs, queries)(*arrays)

    return attend
