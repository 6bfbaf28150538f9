"""The start of a process in parts: what is counted, from when on, and the line that a run prints."""

import re
import subprocess
import sys
import time

import pytest
from processes import ROOT, run_imported

from trainit.train.reports import startup_timer

LINE = re.compile(r"start      to the end of step (\d+): ([\d.]+) s: (.*)")


def seconds(text: str) -> tuple[float, dict[str, float]]:
    """The total and the parts of what `over` returns."""
    total, _, parts = text.partition(" s: ")
    pairs = [part.rsplit(" ", 1) for part in parts.split(", ")]
    assert len({name for name, _ in pairs}) == len(pairs)
    return float(total), {name: float(value) for name, value in pairs}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, in a process that is 20 s old."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(startup_timer, "age", lambda: 20.0)
    return now


@pytest.mark.evidence("the parts of a start add up to the time since the launch")
def test_parts_add_up_to_the_total(clock):
    """Parts of one name are one; time between parts is `other`; an error in a part does not lose it."""
    begun = startup_timer.StartupTimer()
    assert begun.launched == 980.0
    for name, inside, after in (("data", 3.0, 0.5), ("init", 2.0, 0.25), ("data", 4.0, 0.0)):
        with begun.part(name):
            clock[0] += inside
        clock[0] += after
    with pytest.raises(KeyError), begun.part("step"):
        clock[0] += 1.5
        raise KeyError
    clock[0] += 1.25
    assert not begun.is_over
    expected = {"import": 20.0, "data": 7.0, "init": 2.0, "step": 1.5, "other": 2.0}
    assert seconds(begun.over()) == (32.5, expected)
    assert begun.is_over


def test_it_counts_from_the_launch_of_the_process():
    """Half a second of sleep before the timer is made, no processor time, counts as import."""
    code = (
        "import time; time.sleep(0.5); begun = time.time()\n"
        "from trainit.train.reports.startup_timer import StartupTimer\n"
        "start = StartupTimer(); print(time.monotonic() - start.launched, time.time(), start.over())"
    )
    before = time.time()
    words = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split(maxsplit=2)
    age, (total, parts) = float(words[0]), seconds(words[2])
    # The kernel reports the launch in ticks, and a busy machine may halt the process between two clocks.
    assert 0.5 <= age <= float(words[1]) - before + 1
    assert total + 0.05 >= age
    assert parts["import"] >= 0.5


def test_a_run_tells_its_start_and_its_step_once(random_dataset, tmp_path):
    """Only the first step of a run with more; the line's parts add up to the total, except for rounding."""
    small = {"dataset.path": random_dataset, "steps": 2, "batch_size": 2, "model.num_blocks": 1}
    small |= {"cpu_devices": 1, "mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "eval.sequences": 2}
    small |= {"logits_mib": "auto"}
    fields = [f"--config.{name}={value}" for name, value in small.items()]
    log = run_imported(f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}", *fields)
    ((step, total, parts),) = LINE.findall(log)
    total, parts = seconds(f"{total} s: {parts}")
    assert step == "1"
    names = "import data processes shapes init trackers validation compile step other"
    assert set(parts) == set(names.split())
    assert total == pytest.approx(sum(parts.values()), abs=0.05 * (len(parts) + 1) + 1e-9)
    assert min(parts.values()) >= 0
    assert re.search(
        r"computing  remat=none, scan_layers=True, logits_mib=64 \(auto\): some 0\.0 of [\d.]+ GiB", log
    )
    assert len(re.findall(r"program    train: [\d.]+ s, ", log)) == 1
    assert (tmp_path / "logs/process_0.log").read_text().count("start      to the end of step") == 1
