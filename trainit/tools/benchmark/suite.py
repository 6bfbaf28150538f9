"""Compares the step with other programs' on the same work, in tables.

In each round every program starts in a new process, one after another, so that each finds the machine in the
same state and its memory free of the others. Compiled programs are not kept between them.
"""

import json
import tempfile
import time
from statistics import median

from tabulate import tabulate

from trainit import config as config_lib
from trainit.config import ConfigError
from trainit.tools.benchmark import children, contender
from trainit.tools.benchmark.contender import MATMUL, SHAPES
from trainit.train.reports import metrics

PROGRAMS = ("matmul", "trainit", "trainit_by_hand", "flax", "torch", "torch_compile")
# (shape, precision, steps after the first)
WORK = [(shape, precision, n) for precision in ("float32", "bfloat16") for shape, n in (("S", 4), ("M", 1))]
HEADER = ["program", "seconds a step", "of the product's rate", "first step after", "peak memory"]


def flops(shape: str) -> float:
    """Returns the FLOPs of a step by `metrics.flops_per_token`: all of attention, even if half is skipped."""
    sizes = SHAPES[shape]
    model = config_lib.model(**{name: size for name, size in sizes.items() if name != "batch"})
    model.update(num_kv_heads=model.num_heads, mlp_dim=4 * model.dim, head_dim=model.dim // model.num_heads)
    return metrics.flops_per_token(model) * sizes["batch"] * sizes["context_length"]


def _run(name: str, shape: str, precision: str, steps: int) -> dict:
    """Runs a program once; returns what it prints, or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as cache:
        settings = dict.fromkeys(("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), cache)
        arguments = name, shape, precision, str(steps), str(time.time())
        try:
            return json.loads(children.run(contender.__name__, *arguments, settings=settings))
        except ChildProcessError as error:
            return {"error": str(error)}


def _row(name: str, shape: str, runs: list[dict], rate: float) -> list[str]:
    """Returns a program's row of the table: medians over the rounds, the maximum of the memory."""
    if failed := [run["error"] for run in runs if "error" in run]:
        return [name, failed[0][:100], "", "", ""]
    seconds, first = _seconds(runs), median(run["first"] for run in runs)
    step = f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
    share, peak = flops(shape) / median(seconds) / rate, max(run["peak"] for run in runs)
    return [name, step, f"{share:.0%}", f"{first:.1f} s", f"{peak / 1e9:.2f} GB"]


def _seconds(runs: list[dict]) -> list[float]:
    return [second for run in runs for second in run["seconds"]]


def measure(rounds: int) -> int:
    """Prints a table for each shape and precision; returns the exit code.

    Raises ConfigError if the matrix product that gives the scale cannot be measured here.
    """
    for shape, precision, steps in WORK:
        work = dict.fromkeys(PROGRAMS, (precision, steps)) | {"matmul": ("float32", 5)}  # the same for all
        turns = [{program: _run(program, shape, *work[program]) for program in work} for _ in range(rounds)]
        runs = {program: [turn[program] for turn in turns] for program in work}
        products = runs.pop("matmul")
        if failed := [run["error"] for run in products if "error" in run]:
            raise ConfigError(f"--suite=cpu: the product fails: {failed[0]}")
        rate = 2 * MATMUL**3 / median(_seconds(products))
        rows = [_row(program, shape, own, rate) for program, own in runs.items() if any(own)]
        print(f"\n{shape}, {precision}: {MATMUL}³ product at {rate / 1e9:.0f} GFLOP/s")
        alignment = ("left", *["right"] * (len(HEADER) - 1))
        print(tabulate(rows, HEADER, "github", colalign=alignment, disable_numparse=True), flush=True)
    return 0
