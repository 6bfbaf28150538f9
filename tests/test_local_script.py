"""launch/local.sh: when it starts a job again. A script stands in for Python, and for the run."""

import os
import subprocess
import sys

import pytest
from processes import ROOT

pytestmark = pytest.mark.evidence(
    "launch/local.sh starts a job again, up to `restart.limit` times; not after exit code 2, a request to "
    "stop, or a fault that has come again at its step"
)

# Each start takes the next line of $STATE/plan: its exit code, and the last step in its metrics.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || { echo 20001; exit; }
[ "$2" != trainit.cluster.restart ] || PYTHONPATH=ROOT exec PYTHON "$@"
echo "$TRAINIT_TOKEN" >>"$STATE/starts"
read -r code step < <(sed -n "$(wc -l <"$STATE/starts")p" "$STATE/plan")
echo "{\\"limit\\": $LIMIT, \\"folder\\": \\"$STATE/a run\\"}" >"$TRAINIT_RUN_FILE"
mkdir -p "$STATE/a run"
[ "$step" = none ] || echo "{\\"step\\": $step, \\"loss\\": 1}" >"$STATE/a run/metrics.jsonl"
[ "$code" != asked ] || { trap '' TERM; kill -TERM $PPID; sleep 0.2; code=1; }
exit "$code"
"""


@pytest.mark.parametrize(
    ("limit", "plan", "starts", "code", "said"),
    [
        (3, ["0 9"], 1, 0, ""),
        (3, ["75 9"], 1, 75, ""),
        (3, ["2 9"], 1, 2, ""),
        (3, ["130 9"], 1, 130, ""),
        (0, ["1 9"], 1, 1, ""),
        (
            3,
            ["1 5", "137 9", "0 20"],
            3,
            0,
            "ended with 137, after step 9: start 3 of at most 4, from the newest",
        ),
        (3, ["1 none", "0 20"], 2, 0, "ended with 1, after step none: start 2 of at most 4"),
        (3, ["1 5", "2 9"], 2, 2, "after step 5: start 2"),
        (3, ["1 5", "75 9"], 2, 75, "after step 5: start 2"),
        (3, ["1 5", "1 5"], 2, 1, "not done: a process ended with 1, after step 5, as at the start before"),
        (3, ["1 none", "1 none"], 2, 1, "after step none, as at the start before"),
        (
            2,
            ["1 5", "1 6", "134 7"],
            3,
            134,
            "not done: a process ended with 134, after step 7, and the run was",
        ),
        (3, ["asked 5"], 1, 1, ""),
    ],
)
def test_when_a_job_is_started_again(limit, plan, starts, code, said, tmp_path):
    (tmp_path / "python3").write_text(
        STAND_IN.replace("PYTHON ", f"{sys.executable} ").replace("ROOT", str(ROOT))
    )
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "plan").write_text("\n".join(plan) + "\n")
    result = subprocess.run(
        [ROOT / "launch/local.sh", "-n", "1", "--config=x"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STATE": tmp_path,
            "LIMIT": str(limit),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    tokens = (tmp_path / "starts").read_text().split()
    assert (len(tokens), result.returncode) == (starts, code), result.stderr
    assert len(set(tokens)) == starts  # each start has a token of its own
    assert said in result.stderr
    assert bool(said) == bool(result.stderr), result.stderr
