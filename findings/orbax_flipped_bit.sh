#!/usr/bin/env bash
# One flipped bit in a checkpoint of Orbax comes back as another number, without a word.
#
# Libraries: orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, on a CPU.
# Guess: the arrays are compressed and lie in OCDBT, a database with CRC-32C in its nodes, so that a flipped bit ends
#   the restore with an error in nearly all cases.
# Seen: the checksums are of the database's own nodes. Arrays of more than some KiB lie in data files outside of
#   them, compressed by zstd without its checksum. Of 60 single flipped bits, spread evenly over the data file, most
#   restore without an error, and to other values.
# What to do: keep digests of a checkpoint's files, made when it is saved, and check them before a restore.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 numpy==2.4.6
cat > flip.py <<'PYTHON'
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

values = np.random.default_rng(0).normal(size=(256, 256)).astype("float32")
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(pathlib.Path("saved").absolute(), {"weights": jax.numpy.asarray(values)})
data = max((path for path in pathlib.Path("saved").rglob("d/*")), key=lambda path: path.stat().st_size)
size, counts = data.stat().st_size, {"error": 0, "same": 0, "other": 0}
for byte in np.linspace(64, size - 64, 60).astype(int).tolist():
    shutil.rmtree("copy", ignore_errors=True)
    shutil.copytree("saved", "copy")
    copied = pathlib.Path("copy") / data.relative_to("saved")
    content = bytearray(copied.read_bytes())
    content[byte] ^= 16
    copied.write_bytes(content)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(pathlib.Path("copy").absolute())["weights"]
    except Exception:
        counts["error"] += 1
        continue
    counts["same" if np.array_equal(restored, values) else "other"] += 1
print(f"of 60 flipped bits: {counts}")
raise SystemExit(0 if counts["other"] >= 30 else 1)
PYTHON
env/bin/python flip.py 2> errors.txt || { cat errors.txt; echo "not as described"; exit 1; }
echo "as described: most flipped bits are restored as other numbers, without an error"
