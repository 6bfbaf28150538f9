"""Parts of `--suite=gpu` that need JAX, each in a process of its own that prints its rows as a line of JSON.

    python -m trainit.tools.benchmark.card_parts PART SIZE KIND [RUN]

SIZE is a key of `contender.SHAPES`, KIND the driver's name of the GPU, empty on a CPU. A row has what was
measured, the figure, what it is compared with, and a goal with whether it was reached.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

from trainit import config as config_lib
from trainit.cluster import devices, hardware
from trainit.cluster.place import Place
from trainit.experiments.plan import gpu
from trainit.experiments.plan import plan as planning
from trainit.experiments.plan.targets import TARGETS
from trainit.model import attention as kernels
from trainit.tools.benchmark import contender, products
from trainit.tools.timing import in_turn

Rows = Iterator[tuple[str, ...]]
ROUNDS, CALLS, STEPS = 10, 20, 50
LOSS_APART = 0.01  # how far apart the losses with two kernels may be, in parts of them
ENVIRONMENT = dict(os.environ)  # without what is set for this process's own devices


def product(size: str, kind: str) -> Rows:
    """A square product in bfloat16, against the peak."""
    side, peak = 8192 if kind else 256, hardware.peak_flops(kind)
    rate = products.rate((side, side, side), "x k", "bfloat16", "bfloat16", ROUNDS if kind else 1)
    compared = f"{rate / peak:.1%} of {peak / 1e12:.0f} (data sheet)" if peak else ""
    yield f"{side}³, bfloat16", f"{rate / 1e12:.4g} TFLOP/s", compared


def attention(size: str, kind: str) -> Rows:
    """cuDNN's attention and blockwise, without a GPU blockwise and plain: alone, and in a run's losses."""
    shape = contender.SHAPES[size]
    block = kernels.BLOCK if kind else shape["context_length"] // 4  # several of them
    blockwise = partial(kernels.blockwise, block=block, on_cpu=not kind)
    names = ("cudnn", "blockwise") if kind else ("blockwise", "plain")
    functions: list[Callable] = [kernels.cudnn, blockwise] if kind else [blockwise, kernels.plain]
    array = shape["batch"], shape["context_length"], shape["num_heads"], shape["dim"] // shape["num_heads"]
    draw = jax.random.split(jax.random.key(0), 4)
    q, k, v, dy = (jax.random.normal(key, array, jnp.bfloat16) for key in draw)

    def pull(function: Callable) -> Callable:
        return lambda q, k, v: jax.vjp(function, q, k, v)[1](dy)

    for what, both in (("forward", functions), ("gradient", [pull(function) for function in functions])):
        compiled = [jax.jit(function) for function in both]
        results = [[y.astype(jnp.float32) for y in jax.tree.leaves(one(q, k, v))] for one in compiled]
        pairs = zip(*results, strict=True)
        apart = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
        calls = [lambda one=one: [one(q, k, v) for _ in range(CALLS)][-1] for one in compiled]
        one, other = (1e3 * median(times) / CALLS for times in in_turn(calls, ROUNDS))
        ratio = f"{names[1]} takes {other / one:.2f} times as long; {apart:.1g} of the largest number apart"
        yield what, f"{names[0]} {one:.3f} ms, {names[1]} {other:.3f} ms", ratio

    # One after the other: both may not fit into memory at once.
    losses = []
    for name in names:
        config = contender.config_of(shape, "bfloat16")
        config.model.attention = name
        train = contender.step_of(config, shape)
        losses.append([train() for _ in range(STEPS)])
        del train
    apart = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    ends = f"from {losses[0][0]:.4f} to {losses[0][-1]:.4f} and {losses[1][-1]:.4f}"
    goal = judged(f"at most {LOSS_APART:.0%}", apart <= LOSS_APART)
    yield f"losses of {STEPS} steps", ends, f"{apart:.3%} apart at most", goal


def plan(size: str, kind: str, run: str) -> Rows:
    """The plan's time and memory against those of a run: JSON with "step" and "peak"."""
    shape, known = contender.SHAPES[size], hardware.find_accelerator(kind)
    fitting = [name for name, target in TARGETS.items() if kind == target.kind]
    fitting += [name for name, target in TARGETS.items() if known and target.accelerator.name == known.name]
    name = next(iter(fitting), "") if kind else "H100"
    config_lib.require(name != "", f"a plan knows {', '.join(TARGETS)}, and not {kind}")
    compiles = "GPU" if kind and not gpu.missing() else "CPU"
    config = config_lib.resolve(contender.config_of(shape, "bfloat16"), shape["vocab_size"])
    found, measured = planning.plan(config, 1, name, 0.6, compiles, ENVIRONMENT), json.loads(run)
    predicted = {"step": found.seconds[0], "peak": found.state + found.temporaries}
    for key, what, scale, unit in (("step", "time", 1e3, "ms"), ("peak", "memory", 1e-9, "GB")):
        off = predicted[key] / measured[key] - 1
        compared = f"predicted {scale * predicted[key]:.2f}, {off:+.1%}, as compiled for a {compiles}"
        yield f"{size}, {what}", f"{scale * measured[key]:.2f} {unit}", compared


def judged(goal: str, reached: bool) -> str:
    """Returns a goal and whether it is reached."""
    return f"{goal}: {'reached' if reached else 'missed'}"


PARTS: dict[str, Callable[..., Rows]] = {f.__name__: f for f in (product, attention, plan)}

if __name__ == "__main__":
    platform = os.environ.get("JAX_PLATFORMS", "")
    devices.configure(platform, 1, Path())  # JAX_COMPILATION_CACHE_DIR names the cache
    devices.initialize(platform, Place("alone"))
    print(json.dumps(list(PARTS[sys.argv[1]](*sys.argv[2:]))))
