"""metrics.jsonl, TensorBoard and W&B, the progress display."""

import json
import re
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import tiny
from processes import ROOT, TWO, end, last_step, metrics, on_a_terminal, run_imported, start, wait_for
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
from tensorboard.summary.writer import record_writer
from tensorboard.util.tensor_util import make_ndarray

from trainit.cluster.logs import quantity
from trainit.config import ConfigError, resolve
from trainit.train.diagnostics import histogram_edges
from trainit.train.reports import background, trackers
from trainit.train.reports.trackers import JsonLines, Progress, RunLogger, usable_trackers


def test_jsonl_drops_what_a_resume_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, keep_through=-1)
    for step in range(1, 6):
        first.log({"step": step, "train/loss": step / 3})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')  # a crash in the middle of a line
    lines = path.read_text().splitlines()
    second = JsonLines(path, keep_through=3)
    second.log({"step": 4, "train/loss": float("nan")})
    second.sync()
    assert path.read_text().splitlines() == [*lines[:3], '{"step": 4, "train/loss": null}']
    assert JsonLines(path, keep_through=-1) and path.read_text() == ""


def test_lines_that_are_no_steps_are_dropped(tmp_path):
    """As edits by hand or a crash of the machine leave them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n5\nnull\n{}\n{"step": 2}\n{"step": null}\n{"step": "x"}\n\0\0\n\xff\n')
    lines = JsonLines(path, keep_through=3)
    assert (path.read_text(), lines.newest) == ('{"step": 2}\n', 2)
    lines.close()


def written(path: Path, steps: int) -> tuple[list[str], dict]:
    """A file of steps from 1 on, and what a checkpoint after them keeps of it."""
    lines = JsonLines(path, keep_through=-1)
    for step in range(1, steps + 1):
        lines.log({"step": step, "train/loss": step / 3})
    saved = json.loads(json.dumps(lines.sync()))
    lines.close()
    return path.read_text().splitlines(keepends=True), saved


@pytest.mark.evidence(
    "lines of metrics.jsonl that were torn, changed or lost are found again in the checkpoint"
)
@pytest.mark.parametrize("damage", ["torn", "changed", "lost", "file lost"])
def test_lines_before_a_checkpoint_are_found_again(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines, saved = written(path, 9)
    damaged = {
        "torn": [*lines[:3], lines[3][:9] + "\n", *lines[4:]],
        "changed": [*lines[:3], lines[3].replace("1.3", "1.4"), *lines[4:]],
        "lost": [*lines[:3], *lines[4:]],
        "file lost": [],
    }[damage]
    path.write_text("".join(damaged) + '{"step": 10}\n{"st')  # of steps that a resume does again
    if damage == "file lost":
        path.unlink()
    JsonLines(path, 9, saved).close()
    assert path.read_text() == "".join(lines)
    count = 9 if damage == "file lost" else 1
    assert (
        f"{path} lacked {count} of 9 lines or had others: {count} are written again, 0 are lost"
        in caplog.text
    )
    caplog.clear()
    JsonLines(path, 9, saved).close()
    assert (path.read_text(), caplog.text) == ("".join(lines), "")


def test_lines_that_nobody_has_are_reported_as_lost(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "SAVED_LINES", 4)
    path = tmp_path / "metrics.jsonl"
    lines, saved = written(path, 9)
    assert saved == {"lines": 9, "newest": lines[5:]}
    path.write_text("".join([lines[0], *lines[2:7]]))
    again = JsonLines(path, 9, saved)
    assert path.read_text() == "".join([lines[0], *lines[2:]])
    assert f"{path} lacked 3 of 9 lines or had others: 2 are written again, 1 are lost" in caplog.text
    assert again.sync()["lines"] == 8  # so that it is reported once
    again.close()


@pytest.mark.evidence("metrics.jsonl that is deleted, replaced or cut off during a run is written again")
@pytest.mark.parametrize("damage", ["deleted", "replaced", "cut off"])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_file_that_goes_during_a_run_is_noticed(damage, at_end, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, keep_through=-1)
    for step in range(1, 6):
        lines.log({"step": step})
    assert not caplog.text
    if damage == "cut off":
        path.write_text("")
    else:
        path.unlink()
    if damage == "replaced":
        path.write_text('{"step": 1}\n{"step": 2}\n')
    if at_end:
        lines.sync()
    else:
        lines.log({"step": 6})
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5, *[6] * (not at_end)]
    assert f"{path} lacked {3 if damage == 'replaced' else 5} of 5 lines" in caplog.text
    assert lines.sync()["lines"] == 5 + (not at_end)
    lines.close()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*metrics\.jsonl"):
        JsonLines(tmp_path / "metrics.jsonl", keep_through=-1)


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    """The first error stays the one that is reported: closing the file, which tries again, raises none."""
    lines = JsonLines(tmp_path / "metrics.jsonl", keep_through=-1)
    lines._file.close()
    lines._check = lambda: None  # which would find that it is another file
    with Path("/dev/full").open("a", buffering=1) as lines._file:
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            lines.log({"step": 1})
        lines.close()


def test_only_the_lead_process_writes(tmp_path):
    config = tiny.get_config()
    config.optimizer.weight_decay = 0.0
    config = resolve(config, 257).to_dict()
    other = RunLogger(False, tmp_path, config, 0, -1, "abc")
    other.log(1, {"train/loss": 1.0})
    other.sync()
    other.close(0)
    assert not list(tmp_path.iterdir())
    lead = RunLogger(True, tmp_path, config, 0, -1, "abc")
    lead.log(1, {"train/loss": 1.0}, write=False)
    lead.log(2, {"train/loss": 2.0})
    lead.close(0)
    assert metrics(tmp_path) == [{"step": 2, "train/loss": 2.0}]


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (999, "999"), (1234, "1.23 k"), (124e6, "124 M"), (3e11, "300 B")]
)
def test_quantity(number, text):
    assert quantity(number) == text


def test_lines_where_there_is_no_terminal(monkeypatch):
    said = []
    monkeypatch.setattr(trackers.logging, "info", lambda text, *args: said.append(text % args))
    progress = Progress(start=0, steps=100)
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    progress.show(
        50,
        {
            "train/loss": 3.21,
            "time/step_seconds": 2.0,
            "throughput/tokens_per_second": 45_600.0,
            "throughput/mfu": 0.413,
        },
    )
    progress.show(51, {"train/loss": 3.0})  # too soon after the line before
    progress.show(100, {"train/loss": 2.0})
    assert said[0].startswith("step 50/100  loss 3.210  45.6 k tokens/s  MFU 41.3%  01:40 left")
    assert said[1].startswith("step 100/100  loss 2.000")
    assert len(said) == 2


def test_bar_on_a_terminal():
    """On a real terminal (a pty): one bar that is rewritten, messages above it."""
    code = """
import time
import types
from trainit.cluster import logs
from trainit.train.reports import trackers

logs.log_to_terminal(True)
progress = trackers.Progress(0, 4)
for n in range(1, 5):
    time.sleep(0.15)
    progress.show(n, {"train/loss": 4.0 / n, "throughput/tokens_per_second": 1000.0 * n})
progress.close()
"""
    exit_code, text = on_a_terminal(code, columns=100)
    assert exit_code == 0
    assert "100%" in text
    assert "step 4/4" in text
    assert "loss 1.000" in text
    assert "4 k tokens/s" in text
    assert text.count("\r") > 3


@pytest.mark.parametrize("is_offline", [True, False])
def test_wandb_gets_each_step_once(is_offline, tmp_path, monkeypatch):
    """Also those that a job after a kill does again. A server knows how far it is; offline, the file does."""
    import wandb

    given = []

    class Run:
        offline, starting_step = is_offline, 0

        def define_metric(self, *_, **__):
            pass

        def log(self, record, step):
            given.append((step, record["step"], record["train/loss"]))
            assert record["histogram/x"].histogram == [step, *[0] * 81]
            assert record["histogram/x"].bins == histogram_edges().tolist()

        def finish(self, exit_code):
            Run.starting_step = 0 if is_offline else given[-1][0] + 1

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    config = {"wandb": {"project": "tests", "name": ""}, "steps": 9}
    for begin, steps in ((0, 5), (3, 4), (6, 3)):
        logger = RunLogger(True, tmp_path, config, begin, begin or -1, "abc", names=["wandb"])
        for step in range(begin + 1, begin + steps + 1):
            logger.log(step, {"train/loss": step / 2, "histogram/x": [step, *[0] * 81]})
        logger.close(0)
    assert given == [(step, step, step / 2) for step in range(1, 10)]
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 10))


def test_texts_are_in_a_file_and_in_wandb_each_once(tmp_path, monkeypatch):
    """Those of steps that a resume does again replace the ones before."""
    import wandb

    tables = {}
    fake = types.SimpleNamespace(
        offline=False,
        starting_step=3,
        define_metric=lambda *_, **__: None,
        log=lambda record, step: tables.update({step: record["samples"].data}),
        finish=lambda exit_code: None,
    )
    monkeypatch.setattr(wandb, "init", lambda **_: fake)
    config = {"wandb": {"project": "tests", "name": ""}, "steps": 9}
    for kept, steps in ((-1, (2, 4)), (2, (4, 6))):
        logger = RunLogger(True, tmp_path, config, 0, kept, "abc", names=["wandb"])
        for step in steps:
            logger.log_texts(step, [{"step": step, "prompt": p, "text": f"{p}{kept}"} for p in "ab"])
        logger.sync()
        logger.close(0)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in lines] == [
        *((2, "a-1"), (2, "b-1")),
        *((step, text) for step in (4, 6) for text in ("a2", "b2")),
    ]
    assert tables == {step: [["a", "a2"], ["b", "b2"]] for step in (4, 6)}  # step 2 was there already


def shown(folder: Path) -> dict[str, list[tuple]]:
    """What TensorBoard's own reader finds, by tag: steps with a number, a text or rows of a histogram."""
    reader = EventAccumulator(str(folder / "tensorboard"), {TENSORS: 0}).Reload()
    found: dict[str, list[tuple]] = {}
    for tag in reader.Tags()["tensors"]:
        for event in reader.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if not value.shape:
                value = value.item().decode() if isinstance(value.item(), bytes) else value.item()
            found.setdefault(tag, []).append((event.step, value))
    return found


@pytest.mark.evidence("TensorBoard's curves continue at a resume, from whichever step, without doubled steps")
def test_tensorboard_has_each_step_once(tmp_path):
    """Several times from a step before the last one, within a second; a step is as it was done last."""
    expected: dict[int, float] = {}
    for begin, (kept, last) in enumerate([(-1, 6), (3, 5), (3, 5), (2, 3)]):
        config = {"steps": 9, "begin": begin}
        logger = RunLogger(True, tmp_path, config, kept, kept, names=["tensorboard"])
        expected = {step: value for step, value in expected.items() if step <= kept}
        for step in range(kept + 1, last + 1):
            expected[step] = step + begin / 8
            validation = {"valid/loss": 1.0} if step in (2, 5, 6) else {}
            logger.log(step, {"step": step, "train/loss": expected[step]} | validation)
        if begin == 0:
            for step in (2, 6):
                logger.log_texts(step, [{"prompt": "*a*\n1", "text": "<b>"}, {"prompt": "", "text": "c"}])
        logger.close(0)
    found = shown(tmp_path)
    assert found["train/loss"] == sorted(expected.items())
    assert list(expected) == [0, 1, 2, 3]
    # What has not come again is not there either. No character of a text is markup.
    assert found["valid/loss"] == [(2, 1.0)]
    assert found["samples/1"] == [(2, "Prompt:\n\n    *a*\n    1\n\nText:\n\n    <b>")]
    assert [(step, json.loads(text)["begin"]) for step, text in found["config"]] == [(0, 0), (3, 3)]
    assert found.keys() == {"train/loss", "valid/loss", "samples/1", "samples/2", "config"}


class Slow:
    """A tracker that does nothing until it may."""

    def __init__(self):
        self.may, self.steps, self.code = threading.Event(), [], None

    def log(self, step, metrics):
        assert self.may.wait(60)
        self.steps.append(step)

    def flush(self):
        pass

    def close(self, code):
        self.code = code


@pytest.fixture
def slow(monkeypatch) -> Slow:
    tracker = Slow()
    monkeypatch.setattr(trackers, "TensorBoard", lambda *_: tracker)
    yield tracker
    tracker.may.set()


@pytest.mark.evidence(
    "a tracker that waits or fails (no login, no network, full disk, package missing) is one line, and no "
    "step waits for it"
)
def test_a_tracker_that_waits_holds_nothing_up(slow, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(background, "MOST_WAITING", 4)
    logger = RunLogger(True, tmp_path, {"steps": 9}, 0, -1, names=["tensorboard"])
    for step in range(9):
        logger.log(step, {"step": step})
    assert len(metrics(tmp_path)) == 9
    assert slow.steps == []
    assert caplog.text.count("tensorboard is 4 records behind") == 1
    slow.may.set()
    logger.close(75)
    # Four at most waited, in addition to the one that it had taken, and one may have made room for the end.
    assert slow.steps == sorted(slow.steps)
    assert 3 <= len(slow.steps) <= 5
    assert slow.code == 75


def test_a_run_does_not_wait_for_ever_at_its_end(slow, tmp_path, caplog, monkeypatch):
    """What the other tracker needs of that time, it has meanwhile."""
    other = Slow()
    other.may.set()
    monkeypatch.setattr(trackers, "WandB", lambda *_: other)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1)
    logger = RunLogger(True, tmp_path, {"steps": 9}, 0, -1, names=["tensorboard", "wandb"])
    logger.log(1, {"step": 1})
    logger.close(0)
    assert (slow.steps, other.steps, other.code) == ([], [1], 0)
    assert [line for line in caplog.messages if "in time" in line] == [
        "tensorboard did not finish in time; the run does not wait longer"
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_is_one_line(name, tmp_path, caplog, monkeypatch):
    """A disk that is full from the first record on, and a server that cannot be reached."""
    import wandb

    def unreachable(**_):
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")

    writer = "tensorboard.summary.writer.record_writer.RecordWriter"
    monkeypatch.setattr(writer, lambda _, original=record_writer.RecordWriter: original(full))
    monkeypatch.setattr(wandb, "init", unreachable)
    config = {"steps": 9, "wandb": {"project": "x", "name": ""}}
    with Path("/dev/full").open("wb", buffering=0) as full:
        logger = RunLogger(True, tmp_path, config, 0, -1, "abc", names=[name])
        for step in range(9):
            logger.log(step, {"step": step, "train/loss": 1.0})
        logger.close(0)
    reason = {
        "tensorboard": "OSError: [Errno 28] No space left on device",
        "wandb": "CommError: Run initialization has timed out after 90.0 sec.",
    }[name]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{name:10} {reason}; the run continues without it"]
    assert len(metrics(tmp_path)) == 9


def test_a_package_that_is_missing_is_one_line(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert usable_trackers(types.SimpleNamespace(trackers=("tensorboard", "wandb"))) == []
    assert [message.split(";")[0] for message in caplog.messages] == [
        "tensorboard the package tensorboard is not installed: pip install 'trainit[tensorboard]'",
        "wandb      ModuleNotFoundError: import of wandb halted",
    ]


@pytest.mark.parametrize(
    ("named", "project", "used"),
    [
        ((), "", ()),
        ((), "x", ("wandb",)),
        (("tensorboard",), "x", ("tensorboard",)),
        (("tensorboard", "wandb"), "x", ("tensorboard", "wandb")),
        (("wandb",), "", "trackers=('wandb',) need wandb.project, which is empty"),
        (("mlflow",), "", "trackers=('mlflow',): 'mlflow' is none of tensorboard, wandb"),
    ],
)
def test_which_trackers_are_used(named, project, used):
    config = tiny.get_config()
    config.trackers, config.wandb.project = named, project
    if isinstance(used, tuple):
        assert resolve(config, 257).trackers == used
    else:
        with pytest.raises(ConfigError, match=re.escape(used)):
            resolve(config, 257)


@pytest.mark.evidence(
    "W&B online without a login is reported before anything is compiled, and the run continues"
)
def test_tensorboard_has_all_of_a_run_and_wandb_lacks_a_login(random_dataset, tmp_path):
    """Begun, and resumed from a checkpoint before the last step that was logged."""
    run = tmp_path / "run"
    args = [
        f"--config={ROOT}/tests/tiny.py:diagnostics=norms",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={run}",
        *TWO,
        "--config.steps=5",
        "--config.trackers=tensorboard,wandb",
        "--config.wandb.project=tests",
        "--config.eval.prompts=('a', 'once')",
        "--config.eval.length=3",
        "--config.diagnostics.norms=False",
        "--config.diagnostics.every_steps=2",
        "--config.diagnostics.histograms=token_embedding/embedding",
    ]
    nobody = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
        "WANDB_API_KEY": "",
        "WANDB_MODE": "online",
    }
    for resumes in (False, True):
        if resumes:
            shutil.rmtree(run / "checkpoints/5")
        output = run_imported(*args, **nobody)
        line = re.search(
            r"wandb +there is no login: run `wandb login`.*; the run continues without it", output
        )
        assert line.start() < output.index("program ")
        assert output.count("there is no login") == 1
    assert not (run / "wandb").exists()

    found, lines = shown(run), metrics(run)
    configs = [json.loads(text) for _, text in found.pop("config")]
    assert configs[-1] == json.loads((run / "config.json").read_text())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for number, prompt in enumerate(("a", "once"), 1):
        logged = [(each["step"], each["text"]) for each in samples if each["prompt"] == prompt]
        assert [step for step, _ in logged] == [0, 5]
        begin = f"Prompt:\n\n    {prompt}\n\nText:\n\n    "
        events = found.pop(f"samples/{number}")
        assert [(step, text.removeprefix(begin).replace("\n    ", "\n")) for step, text in events] == logged

    assert found.keys() == {name for line in lines for name in line} - {"step"}
    assert [step for step, _ in found["histogram/grads/token_embedding/embedding"]] == [2, 4]
    for tag, events in found.items():
        logged = [(line["step"], line[tag]) for line in lines if tag in line]
        assert [step for step, _ in events] == [step for step, _ in logged]
        for (_, value), (_, expected) in zip(events, logged, strict=True):
            if tag.startswith("histogram/"):
                edges = histogram_edges()
                bins = zip(edges[:-1], edges[1:], expected, strict=True)
                filled = [bin for bin in bins if bin[2]]
                assert [tuple(row) for row in value if row[2]] == filled
            else:
                assert value == pytest.approx(expected, rel=1e-6), tag


def test_wandb_offline_and_resumed(random_dataset, tmp_path):
    """The same W&B run continues after a stop, and no key is written anywhere."""
    key = "0123456789abcdef0123456789abcdef01234567"
    args = [
        f"--config={ROOT}/tests/tiny.py",
        f"--config.dataset.path={random_dataset}",
        f"--workdir={tmp_path}",
        *TWO,
        "--config.steps=40",
        "--config.wandb.project=tests",
        "--config.wandb.name=offline",
    ]
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": key}
    process = start(*args, **environment)
    assert wait_for(process, lambda: last_step(tmp_path) >= 1)
    process.send_signal(signal.SIGTERM)
    output = end(process, 75, 60)
    output += run_imported(*args, **environment)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({path.name.split("-")[-1] for path in runs}) == 1  # the run id
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert key.encode() not in path.read_bytes(), path
    assert key not in output
    logged = b"".join(path.read_bytes() for path in files if path.suffix == ".wandb")
    assert b"train/loss" in logged
    assert [r["step"] for r in metrics(tmp_path)] == list(range(41))
    assert json.loads((tmp_path / "config.json").read_text())["wandb"] == {
        "name": "offline",
        "project": "tests",
    }
    assert Path(tmp_path / "checkpoints" / "40").is_dir()
