"""The benchmark runs and measures what it says; its times are for people, not for tests.

All parts of a run are measured in tests/commands/test_commands.py.
"""

import json
import re

import numpy as np
from processes import ROOT, start


def test_unknown_part(random_dataset):
    args = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}", "--only=loder"
    process = start(*args, module="trainit.benchmark")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        output.strip()
        == "trainit: error: --only=loder: there are loader, step, save, processes, optimizer, loss, prepare"
    )


def test_preparing_reports(tmp_path):
    words = (ROOT / "README.md").read_text().split(" ")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 400)) for _ in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = "--only=prepare", f"--corpus={tmp_path}/*.jsonl", "--rounds=1"
    process = start(*command, module="trainit.benchmark")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    for pattern in ("of the speed of bare encode_ordinary_batch", "of the speed of bare sentencepiece"):
        assert re.search(r"prepare +[\d.]+% " + pattern, output), output
    assert re.search(r"prepare +[1-9]\d+ MB  peak memory", output)


def test_preparing_needs_a_corpus(tmp_path):
    for given, message in (("", "needs --corpus"), (f"--corpus={tmp_path}/none", "there are no documents")):
        process = start("--only=prepare", *[given] * bool(given), module="trainit.benchmark")
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 2, output
        assert message in output
