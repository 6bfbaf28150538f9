#!/usr/bin/env bash
# A Llama that transformers 5 saves has another RoPE base in transformers 4.57, and nobody is told.
#
# Libraries: transformers 5.24.0 writes, transformers 4.57.6 reads (also other programs that know the old field).
# Guess: both know the field rope_theta, since every Llama folder has had it for years, and 4.57 warns of a field that
#   it does not know.
# Seen: 5.24 writes {"rope_parameters": {"rope_theta": 500000.0, ...}} and no rope_theta. 4.57.6 keeps the unknown
#   field, finds no rope_theta, and takes its default, 10000.0: no warning, no error. Rotations, and with them the
#   logits, are those of another model. The same with GPT-NeoX, whose rotary fraction becomes 0.25 instead of 1.
# What to do: a program that writes such folders writes both forms.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 5.24.0 4.57.6; do
  python3 -m venv "$version"
  "$version/bin/pip" install --quiet "transformers==$version"
done
cat > write.py <<'PYTHON'
from transformers import GPTNeoXConfig, LlamaConfig

rope = {"rope_type": "default", "rope_theta": 500_000.0}
LlamaConfig(rope_parameters=rope).save_pretrained("llama")
GPTNeoXConfig(rope_parameters=rope | {"partial_rotary_factor": 1.0}).save_pretrained("neox")
PYTHON
cat > read.py <<'PYTHON'
import warnings

from transformers import AutoConfig

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    llama, neox = AutoConfig.from_pretrained("llama"), AutoConfig.from_pretrained("neox")
print("warnings that name rope:", sum("rope" in str(one.message) for one in told))
print("Llama's base:", llama.rope_theta)
print("GPT-NeoX's base and fraction:", neox.rotary_emb_base, neox.rotary_pct)
PYTHON
5.24.0/bin/python write.py 2> /dev/null
grep -q '"rope_theta": 500000.0' llama/config.json
4.57.6/bin/python read.py > seen.txt 2> errors.txt
cat seen.txt
diff seen.txt - <<'EXPECTED'
warnings that name rope: 0
Llama's base: 10000.0
GPT-NeoX's base and fraction: 10000 0.25
EXPECTED
if grep -qi rope errors.txt; then
  echo "it is told now:"
  cat errors.txt
  exit 1
fi
echo "as described: the base of 500000 has become 10000"
