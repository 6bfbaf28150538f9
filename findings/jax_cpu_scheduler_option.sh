#!/usr/bin/env bash
# JAX on CPUs: an option of one program chooses no schedule, though it is checked and others have an effect.
#
# Libraries: jax and jaxlib 0.10.2, on a CPU (0.12.0.1 does the same).
# Guess: jax.jit(..., compiler_options={"xla_cpu_enable_concurrency_optimized_scheduler": True}) does for one
#   program what XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=true does for all. It matters: where many
#   small products are ready at once, a program that is scheduled for memory has them wait for each other.
# Seen: XLA_FLAGS changes the order of the compiled program. The option leaves it as XLA_FLAGS has it, with True and
#   with False, and says nothing. A value of a wrong type is refused, so the option is read; and another
#   option, xla_disable_hlo_passes, does change the same program.
# What to do: set it in XLA_FLAGS, before JAX starts, in a process whose programs all want it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet jax==0.10.2 jaxlib==0.10.2
cat > order.py <<'PYTHON'
import hashlib
import json
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


def rows(x, matrices):
    def step(_, x):
        products = [x[i : i + 1] @ matrix for i, matrix in enumerate(matrices)]
        return x + jnp.concatenate(products)[..., :64]

    return jax.lax.fori_loop(0, 4, step, x)


def order(**options):
    shapes = jax.ShapeDtypeStruct((16, 1, 64), jnp.float32), [jax.ShapeDtypeStruct((1, 64, 512), jnp.float32)] * 16
    text = jax.jit(rows).lower(*shapes).compile(compiler_options=options).as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:12]


try:
    order(**{FLAG: "no"})
    refused = False
except jax.errors.JaxRuntimeError:
    refused = True
found = {"none": order(), "true": order(**{FLAG: True}), "false": order(**{FLAG: False})}
print(json.dumps(found | {"passes": order(xla_disable_hlo_passes="fusion"), "refused": refused}))
PYTHON
for value in true false; do
  XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=$value env/bin/python order.py | tee "$value.json"
done
env/bin/python - <<'PYTHON' || { echo "not as described"; exit 1; }
import json
from pathlib import Path

on, off = (json.loads(Path(f"{value}.json").read_text()) for value in ("true", "false"))
assert on["none"] != off["none"]
for found in (on, off):
    assert found["true"] == found["false"] == found["none"] != found["passes"]
    assert found["refused"]
PYTHON
echo "as described: XLA_FLAGS chooses the order, the option does not"
