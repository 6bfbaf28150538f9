"""Prepared data that are damaged, replaced or cut off, before a run and during one."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, TWO, Fork, end, last_step, run_imported, wait_for

from trainit.data.dataset import DatasetError, open_dataset
from trainit.data.documents import inputs
from trainit.data.formats import detect
from trainit.prepare import background

LENGTH = 32


@pytest.fixture
def dataset(random_dataset, tmp_path):
    return Path(shutil.copytree(random_dataset, tmp_path / "data"))


def shards(dataset: Path) -> list[Path]:
    return sorted(dataset.glob("train-*.tokens"))


@pytest.mark.evidence("ids beyond the vocabulary in prepared data: an error with the file and the token")
def test_ids_are_bounded_by_the_vocabulary(dataset):
    path = shards(dataset)[1]
    before = len(np.fromfile(shards(dataset)[0], "<u2"))
    ids = np.fromfile(path, "<u2")
    ids[100] = 257
    ids.tofile(path)
    split = open_dataset(dataset).splits["train"]
    with pytest.raises(DatasetError, match=rf"{path}: token 100 is the id 257, but the tokenizer has"):
        split.read(np.arange(split.sequences(LENGTH)), LENGTH)
    split.read(np.arange(before // LENGTH), LENGTH)
    row = np.zeros(40, "<u2")
    with pytest.raises(DatasetError, match="id 257"):
        split.copy(row, before + 90)


@pytest.mark.evidence("a shard that is cut off while it is mapped: an error with its name, no SIGBUS")
def test_a_shard_that_shrinks_is_named(dataset):
    split = open_dataset(dataset).splits["train"]
    split.read(np.array([0]), LENGTH)
    size = shards(dataset)[0].stat().st_size
    os.truncate(shards(dataset)[0], 1000)
    for read in (lambda: split.read(np.array([500]), LENGTH), lambda: split.copy(np.zeros(9, "<u2"), 5000)):
        with pytest.raises(DatasetError, match=rf"{shards(dataset)[0]} has 1000 bytes; it had {size} when"):
            read()


def changes(before: Path, now: Path) -> dict[str, str]:
    """What a resume on `now` finds of data that were those of `before`."""
    old, new = detect.open_path(str(before)), detect.open_path(str(now))
    meta = json.loads(json.dumps({"dataset": old.fingerprint, "inputs": old.inputs}))
    return inputs.changes(meta, {"dataset": new.fingerprint, "inputs": new.inputs})


def test_a_shard_replaced_by_one_of_equal_size_is_other_data(random_dataset, dataset):
    assert changes(random_dataset, dataset) == {}
    for at in (0, -1):
        path = shards(dataset)[at]
        good = path.read_bytes()
        path.write_bytes(good[2000:] + good[:2000])
        assert changes(random_dataset, dataset) == {
            "dataset": f"{path.name}, whose content has changed; its {len(good)} bytes are as many as before"
        }
        path.write_bytes(good)
    path = next(dataset.glob("validation-*.tokens"))
    path.write_bytes(path.read_bytes()[::-1])
    assert list(changes(random_dataset, dataset)) == ["validation"]


def test_many_shards_have_two_samples_each(dataset, monkeypatch):
    """So that the start of a run on thousands of them takes milliseconds."""
    counts = []
    describe = inputs.describe
    monkeypatch.setattr(
        inputs, "describe", lambda *args, count: counts.append(count) or describe(*args, count=count)
    )
    count = len([*dataset.glob("*.tokens")])
    for samples, expected in ((256, 16), (5 * count, 5), (3, 2)):
        monkeypatch.setattr(detect, "PREPARED_SAMPLES", samples)
        detect.open_path(str(dataset))
        assert set(counts) == {expected}
        counts.clear()


def background_errors(digests: dict[Path, str], process: int = 0, count: int = 1) -> list[str]:
    errors: list[str] = []
    background.compare(digests, process, count, errors.append)
    for thread in threading.enumerate():
        if thread.name == "digests":
            assert thread.daemon
            thread.join()
    return errors


def test_all_files_are_compared_in_the_background(dataset, monkeypatch, caplog):
    monkeypatch.setattr(background, "BYTES_PER_SECOND", 1e12)
    digests = open_dataset(dataset).digests
    with caplog.at_level("INFO"):
        assert background_errors(digests) == []
    files = [path for path in dataset.iterdir() if path.name.startswith(("train-", "validation-"))]
    assert f"{len(files)} files are as they were prepared" in caplog.text
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 4]))
        (error,) = [error for process in range(3) for error in background_errors(digests, process, 3)]
        assert error.startswith(f"{path} has SHA-256 ")
        path.write_bytes(good)
    files[0].unlink()
    (error,) = background_errors(digests)
    assert error == f"{files[0]}: No such file or directory, while the run trains on it"


@pytest.mark.evidence(
    "data damaged before or during a run, or replaced before a resume: exit code 2 and the file's name"
)
def test_a_run_on_damaged_data_ends_with_the_name_of_the_file(random_dataset, dataset, tmp_path):
    """A shard is cut off during a run; replaced before the resume; and flipped before a run begins."""
    command = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={dataset}", *TWO
    command += "--config.steps=3000", "--config.schedule.warmup=2", "--config.eval.every_steps=0"
    run = tmp_path / "run"
    process = Fork(*command, f"--workdir={run}")
    assert wait_for(process, lambda: last_step(run) >= 4)
    for path in shards(dataset):
        os.truncate(path, 64)
    (line,) = (line for line in end(process, 2, 60).splitlines() if "error" in line)
    assert f"{dataset}/train-" in line
    assert "has 64 bytes; it had" in line

    shutil.copytree(random_dataset, dataset, dirs_exist_ok=True)
    path = shards(dataset)[2]
    good = path.read_bytes()
    path.write_bytes(good[2000:] + good[:2000])
    (line,) = (
        line for line in run_imported(*command, f"--workdir={run}", expect=2).splitlines() if "error" in line
    )
    assert f"was made with other data: {path.name}, whose content has changed" in line

    output = run_imported(*command, f"--workdir={tmp_path}/other", expect=2)
    (line,) = (line for line in output.splitlines() if "error" in line)
    assert f"{path} has SHA-256 " in line
