"""Traces of a run's steps: which steps, on which processes, and what they say."""

import gzip
import json
import re
import signal
import types

import jax
import pytest
import tiny
from processes import ROOT, TWO, Fork, end, last_step, wait_for

from trainit.cluster.watchdog import Watchdog
from trainit.config import ConfigError, resolve
from trainit.train.profiling.tracer import Tracer, ranges


def steps_of(folder) -> list[int]:
    """The numbers of the steps that a trace has."""
    (file,) = folder.rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert [event for event in events if "hlo_op" in dict(event.stats)]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


@pytest.mark.evidence(
    "a running job traces steps that the config names, and others when a signal or a file asks for it"
)
def test_a_run_traces_the_steps_it_is_asked_for(random_dataset, tmp_path):
    run = tmp_path / "run"
    process = Fork(
        f"--config={ROOT}/tests/tiny.py",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={run}",
        *TWO,
        "--config.steps=100_000",
        "--config.checkpoint.save_steps=0",
        "--config.eval.every_steps=0",
        "--config.profile.steps=1:3, 4:5",
        "--config.profile.count=3",
    )

    def traces() -> list[int]:
        return sorted(int(path.name.split("_")[1]) for path in run.glob("profile/step_*"))

    assert wait_for(process, lambda: len(traces()) == 2)
    (run / "trace_1").touch()  # another process's
    (run / "trace_0").touch()
    assert wait_for(process, lambda: len(traces()) == 3)
    process.send_signal(signal.SIGURG)
    assert wait_for(process, lambda: len(traces()) == 4)
    assert wait_for(process, lambda: last_step(run) > traces()[-1])
    process.send_signal(signal.SIGTERM)
    output = end(process, 75)
    assert [path.name for path in run.glob("trace_*")] == ["trace_1"]

    found = sorted((int(path.parent.name.split("_")[1]), path) for path in run.glob("profile/*/process_0"))
    assert [last for last, _ in found[:2]] == [3, 5]
    for (last, folder), count in zip(found, (2, 1, 3, 3), strict=True):
        assert steps_of(folder) == [*range(last - count + 1, last + 1)]
        (file,) = folder.rglob("perfetto_trace.json.gz")
        assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        (line,) = re.findall(rf"profile +steps {last - count + 1} to {last}: (.*)", output)
        shares = {name: int(share[:-1]) for name, share in (part.rsplit(" ", 1) for part in line.split(", "))}
        assert {"attention", "MLP", "head and loss", "optimizer", "idle"} <= shares.keys()
        assert abs(sum(shares.values()) - 100) <= len(shares) / 2
    assert output.count("profile ") == 4


def tracer_of(tmp_path, **fields) -> Tracer:
    config = tiny.get_config()
    config.profile.update(fields)
    return Tracer(resolve(config, 257), tmp_path, Watchdog())


def test_a_process_that_is_not_chosen_traces_nothing(tmp_path, caplog):
    tracer = tracer_of(tmp_path, steps="0:2", processes=(1, 3))
    signal.raise_signal(signal.SIGURG)
    assert [tracer.run(step, {}, lambda step=step: step, lambda: "") for step in range(3)] == [0, 1, 2]
    assert not list(tmp_path.iterdir())
    assert "process 0 is not in profile.processes=(1, 3)" in caplog.text


def test_a_trace_that_cannot_be_ends_nothing(tmp_path, caplog):
    """Somebody else is tracing already; and its folder is a file."""
    with jax.profiler.trace(str(tmp_path / "other")):
        assert tracer_of(tmp_path, steps="0:1").run(0, {}, lambda: "done", lambda: "") == "done"
    (tmp_path / "else").touch()
    assert tracer_of(tmp_path / "else", steps="0:1").run(0, {}, lambda: "done", lambda: "") == "done"
    reasons = [re.match(r"profile +no trace: (\w+)", message)[1] for message in caplog.messages]
    assert reasons == ["RuntimeError", "NotADirectoryError"]


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "1:3, 2:4", "a:b", "1:41", "3:4;5:6"])
def test_steps_that_are_no_ranges(text):
    message = re.escape(f"profile.steps={text!r} must be rising ranges of steps up to steps=40")
    with pytest.raises(ConfigError, match=message):
        ranges(types.SimpleNamespace(steps=40, profile=types.SimpleNamespace(steps=text)))
