"""The order of events in training."""

import contextlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from trainit.train import loop
from trainit.train.recorder import StepRecorder


@pytest.mark.evidence(
    "metrics of a step are read, and data for a later one fetched, while the next step runs"
)
def test_the_devices_do_not_wait_for_what_the_host_reads(monkeypatch):
    """The loop's order of events: a step is started, the next data are fetched, and then comes a read."""
    events = []

    def train(step, state, batch):
        events.append(("start", step + 1))
        sums = {name: np.float32(1) for name in ("tokens", "rows_tokens", "train/loss")}
        return state, sums | {
            "skipped_in_a_row": np.int32(0),
            "diagnostics": {},
            "number": np.int32(step + 1),
        }

    def read(metrics):
        events.append(("read", int(metrics["number"])))
        return metrics

    monkeypatch.setattr(jax, "device_get", read)
    config = tiny.get_config()
    config.steps = 4
    quiet = SimpleNamespace(
        **{"stop_reason": lambda: "", "step_done": lambda: None, "step": lambda tokens: {}},
        **{"log": lambda *_: None, "close": lambda code: None},
        agreement=SimpleNamespace(must_save_again=lambda: False),
    )
    job = SimpleNamespace(
        **{"config": config, "monitor": quiet, "logger": quiet, "train": train, "open": lambda: None},
        **{"is_complete": lambda: False, "validate_and_save": lambda step, state, reason: reason},
        **{"report_end": lambda step, reason: None, "timer": SimpleNamespace(part=contextlib.nullcontext)},
        **{"keep_snapshot": lambda step, state: None, "snapshots": SimpleNamespace(close=lambda: None)},
        start=SimpleNamespace(state=None, step=0),
        feed=SimpleNamespace(next=dict, advance=lambda: events.append("fetch")),
        saves=SimpleNamespace(check=lambda: None, settle=lambda step, state: None),
        recorder=StepRecorder(
            config, 0, quiet, quiet, quiet, None, SimpleNamespace(add=lambda *_, now: None)
        ),
    )
    assert loop.run(job) == 0
    steps = [[("start", n), "fetch", *([("read", n - 1)] if n > 1 else [])] for n in range(1, 5)]
    assert events == [event for step in steps for event in step]
