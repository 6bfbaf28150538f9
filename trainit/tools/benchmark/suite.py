"""Compares the step with other programs' on the same work, in tables.

In each round every program starts in a new process, one after another, so that each finds the machine in the
same state and its memory free of the others. Compiled programs are not kept between them.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from tabulate import tabulate

from trainit import config as config_lib
from trainit.config import ConfigError
from trainit.tools.benchmark.contender import CONTENDERS, MATMUL, SHAPES
from trainit.train.reports import metrics

# (shape, precision, steps after the first, programs)
SUITES: dict[str, list[tuple[str, str, int, tuple[str, ...]]]] = {
    "cpu": [(s, p, n, tuple(CONTENDERS)) for p in ("float32", "bfloat16") for s, n in (("S", 4), ("M", 1))],
    "gpu": [
        (s, "bfloat16", 20, ("matmul", "trainit", "torch_compile")) for s in ("124M", "350M", "1.3B", "7B")
    ],
}
HEADER = ["program", "seconds a step", "of the product's rate", "first step after", "peak memory"]


def flops(shape: str) -> float:
    """Returns the FLOPs of a step by `metrics.flops_per_token`: all of attention, even if half is skipped."""
    sizes = SHAPES[shape]
    model = config_lib.model(**{name: size for name, size in sizes.items() if name != "batch"})
    model.update(num_kv_heads=model.num_heads, mlp_dim=4 * model.dim, head_dim=model.dim // model.num_heads)
    return metrics.flops_per_token(model) * sizes["batch"] * sizes["context_length"]


def _run(name: str, shape: str, precision: str, steps: int) -> dict:
    """Runs a program once; returns what it prints, or {"error": its last line}."""
    command = [sys.executable, "-m", "trainit.tools.benchmark.contender", name, shape, precision, str(steps)]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
        command.append(str(time.time()))
        process = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if process.returncode:
        return {"error": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return json.loads(process.stdout.splitlines()[-1])


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


def measure(name: str, rounds: int) -> int:
    """Prints the tables of a suite; returns the exit code.

    Raises ConfigError if the matrix product that gives the scale cannot be measured here.
    """
    for shape, precision, steps, programs in SUITES[name]:
        work = dict.fromkeys(programs, (precision, steps))
        work["matmul"] = ("float32" if name == "cpu" else precision, 5)  # on a CPU, the same for all
        turns = [{program: _run(program, shape, *work[program]) for program in work} for _ in range(rounds)]
        runs = {program: [turn[program] for turn in turns] for program in work}
        products = runs.pop("matmul")
        if failed := [run["error"] for run in products if "error" in run]:
            raise ConfigError(f"--suite={name}: the product fails: {failed[0]}")
        rate = 2 * MATMUL**3 / median(_seconds(products))
        rows = [_row(program, shape, own, rate) for program, own in runs.items()]
        print(f"\n{shape}, {precision}: {MATMUL}³ product at {rate / 1e9:.0f} GFLOP/s")
        alignment = ("left", *["right"] * (len(HEADER) - 1))
        print(tabulate(rows, HEADER, "github", colalign=alignment, disable_numparse=True), flush=True)
    return 0
