"""The step beside other programs' on the same work: a table.

Each turn starts every program anew in a process of its own, one after another, so that all see the machine in
the same state and none another's memory. Compiled programs are not kept between them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from trainit import config as config_lib
from trainit.config import ConfigError
from trainit.tools.benchmark.contender import CONTENDERS, MATMUL, SHAPES
from trainit.train import metrics

# (shape, precision, steps behind the first, programs)
SUITES = {
    "cpu": [
        ("S", "float32", 4, tuple(CONTENDERS)),
        ("M", "float32", 1, tuple(CONTENDERS)),
        ("S", "bfloat16", 4, tuple(CONTENDERS)),
        ("M", "bfloat16", 1, tuple(CONTENDERS)),
    ],
    "gpu": [
        (shape, "bfloat16", 20, ("matmul", "trainit", "torch_compile"))
        for shape in ("124M", "350M", "1.3B", "7B")
    ],
}


def flops(shape: str) -> float:
    """Of a step, by `metrics.flops_per_token`: attention counts whole, whether half of it is made or not."""
    sizes = SHAPES[shape]
    model = config_lib.model(**{name: size for name, size in sizes.items() if name != "batch"})
    model.update(num_kv_heads=model.num_heads, mlp_dim=4 * model.dim)
    return metrics.flops_per_token(model) * sizes["batch"] * sizes["context_length"]


def _run(name: str, shape: str, precision: str, steps: int) -> dict:
    """What one program says of itself; its error, where it ends with one."""
    with tempfile.TemporaryDirectory() as cache:
        command = [
            sys.executable,
            "-m",
            "trainit.tools.benchmark.contender",
            name,
            shape,
            precision,
            str(steps),
        ]
        process = subprocess.run(
            [*command, str(time.time())],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache},
            check=False,
        )
    if process.returncode:
        return {"error": (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def _table(shape: str, precision: str, turns: dict[str, list[dict]], rate: float):
    print(f"\n{shape}, {precision}: {MATMUL}³ product at {rate / 1e9:.0f} GFLOP/s", flush=True)
    print("| program | seconds a step | of the product's rate | first step after | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in turns.items():
        if name == "matmul":
            continue
        failed = [run["error"] for run in runs if "error" in run]
        if failed:
            print(f"| {name} | {failed[0][:100]} | | | |")
            continue
        seconds = [second for run in runs for second in run["seconds"]]
        median, first = statistics.median(seconds), statistics.median(run["first"] for run in runs)
        peak = max(run["peak"] for run in runs) / 1e9
        print(
            f"| {name} | {median:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) "
            f"| {flops(shape) / median / rate:.0%} | {first:.1f} s | {peak:.2f} GB |",
            flush=True,
        )


def measure(name: str, rounds: int) -> int:
    """Prints the suite's tables; the exit code.

    Raises:
        ConfigError: the yardstick cannot be measured here.
    """
    for shape, precision, steps, programs in SUITES[name]:
        turns: dict[str, list[dict]] = {program: [] for program in programs}
        for _ in range(rounds):
            for program, runs in turns.items():
                if program == "matmul":  # on a CPU in float32 for all
                    runs.append(_run(program, shape, "float32" if name == "cpu" else precision, 5))
                else:
                    runs.append(_run(program, shape, precision, steps))
        if failed := [run["error"] for run in turns["matmul"] if "error" in run]:
            raise ConfigError(f"--suite={name}: the product fails: {failed[0]}")
        seconds = statistics.median(second for run in turns["matmul"] for second in run["seconds"])
        _table(shape, precision, turns, 2 * MATMUL**3 / seconds)
    return 0
