#!/usr/bin/env bash
# Orbax: a bound on the memory of a save, save_concurrent_gb, refuses any array that is larger than it.
#
# Libraries: orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, on a CPU.
# Guess: the bound limits how much is copied at once, so that an array which is larger than it is saved alone.
# Seen: the save raises ValueError, "Requested more bytes than we reserved space for". The default is 96 GB a process:
#   a stacked array of all layers that one process holds whole, as on a host with CPUs alone, may be larger.
#   The bound counts arrays, not files: one of 1.2 GB fails with 1 GB, and four of 0.3 GB are saved.
# What to do: set the bound to the largest array that a process holds, at least.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 numpy==2.4.6
cat > bound.py <<'PYTHON'
import pathlib

import jax.numpy as jnp
import orbax.checkpoint as ocp


def save(name: str, tree: dict) -> str:
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(pathlib.Path(name).absolute(), args=ocp.args.StandardSave(tree))
    except ValueError as error:
        return str(error)
    return "saved"


one = save("one", {"a": jnp.zeros(300_000_000, jnp.float32)})
four = save("four", {str(i): jnp.zeros(75_000_000, jnp.float32) for i in range(4)})
print(f"one array of 1.2 GB: {one}\nfour of 0.3 GB: {four}")
raise SystemExit(0 if "more bytes than we reserved" in one and four == "saved" else 1)
PYTHON
env/bin/python bound.py 2> errors.txt || { cat errors.txt; echo "not as described"; exit 1; }
echo "as described: an array above the bound is refused, although it would fit alone"
