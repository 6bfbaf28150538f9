"""Input that was edited or replaced since it was prepared, or since a run began, is noticed by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, TWO, run_imported

from trainit.__main__ import main as trainit_command
from trainit.data.documents import inputs
from trainit.data.formats.detect import open_path


def lines(count: int, seed: int) -> str:
    draw = np.random.default_rng(seed)
    texts = ["".join(map(chr, draw.integers(97, 123, 60))) for _ in range(count)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def edit(path: Path, place: int, keep_time: bool = False):
    """Replaces one byte; the size stays."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
    times = (before.st_atime_ns, before.st_mtime_ns) if keep_time else (0, before.st_mtime_ns + 10**9)
    os.utime(path, ns=times)


def test_every_edit_of_a_small_file_and_samples_of_a_large_one(tmp_path):
    path = tmp_path / "a"
    for size in (1, 1000, inputs.SAMPLE + 1, inputs.SAMPLES * inputs.SAMPLE):
        path.write_bytes(bytes(size))
        before = inputs.describe(path, "a")
        for place in np.linspace(0, size - 1, 50).astype(int).tolist():
            edit(path, place, keep_time=True)
            now = inputs.describe(path, "a")
            assert inputs.difference([before], [now]).startswith("a, whose content has changed")
            assert now[:3] == before[:3]
            edit(path, place, keep_time=True)
    path.write_bytes(bytes(10 * size))
    before = inputs.describe(path, "a")
    for place in (0, 10 * size - 1):
        edit(path, place)
        assert inputs.difference([before], [inputs.describe(path, "a", before)])
        edit(path, place)


def test_a_change_that_only_the_time_shows_is_logged(tmp_path, capsys, caplog):
    """As for a file that was copied. In JSON and back, the record is the same."""
    path = tmp_path / "a"
    path.write_bytes(bytes(1 << 20))
    before = json.loads(json.dumps([inputs.describe(path, "a")]))
    with caplog.at_level("INFO"):
        assert not inputs.difference(before, [inputs.describe(path, "a")])
        assert not caplog.text
        edit(path, inputs.SAMPLE + 1)  # between two samples
        assert not inputs.difference(before, [inputs.describe(path, "a")])
    assert "1 files have another time of change" in caplog.text
    assert not inputs.difference([["a", 1 << 20]], [inputs.describe(path, "a")])  # of an earlier version


def test_names_sizes_and_order(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    a, b, c = (inputs.describe(tmp_path / name, name) for name in "abc")
    assert inputs.difference([a, b], [a, b]) == ""
    assert inputs.difference([a, b], [a]) == "b, which is not there any more"
    assert inputs.difference([a, b], [a, b, c]) == "c, which is new"
    assert inputs.difference([a, b], [b, a]) == "the order of the files"
    assert inputs.difference([b._replace(size=7)], [b]) == "b, which has 1 bytes; before, it had 7"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
def test_prepare_notices_an_edit_in_place(finished, split, tmp_path, capsys):
    for name, count in (("train", 300), ("val", 30)):
        (tmp_path / f"{name}.jsonl").write_text(lines(count, count))
    flags = [f"--input={tmp_path}/train.jsonl", f"--validation={tmp_path}/val.jsonl", "--tokenizer=bytes"]
    flags += [f"--output={tmp_path}/out", "--workers=1"]
    assert trainit_command(["prepare", *flags, *["--shard=1/2"] * (not finished)]) == 0
    edit(tmp_path / f"{split}.jsonl", 100)
    assert trainit_command(["prepare", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{split}.jsonl, whose content has changed" in error
    assert "remove the folder" in error
    edit(tmp_path / f"{split}.jsonl", 100)  # back again; the time alone differs
    assert trainit_command(["prepare", *flags]) == 0


def test_prepare_notices_an_edit_while_it_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.jsonl").write_text(lines(300, 1))
    flags = [f"--input={tmp_path}/train.jsonl", "--validation_fraction=0.1", "--tokenizer=bytes"]
    flags += [f"--output={tmp_path}/out", "--workers=1"]
    read = inputs.describe_all

    def then_edit(paths, names):
        result = read(paths, names)
        for path in paths:
            edit(path, 100)
        return result

    monkeypatch.setattr("trainit.prepare.options.describe_all", then_edit)
    assert trainit_command(["prepare", *flags]) == 1
    assert "changed while it was read: train.jsonl, whose content" in capsys.readouterr().err
    monkeypatch.undo()
    assert trainit_command(["prepare", *flags]) == 2


@pytest.fixture
def streamed(tmp_path) -> list[str]:
    (tmp_path / "train.jsonl").write_text(lines(600, 1))
    (tmp_path / "val.jsonl").write_text(lines(60, 2))
    flags = [f"--config={ROOT}/tests/tiny.py:dataset=jsonl", f"--workdir={tmp_path}/run", *TWO]
    flags += [f"--config.dataset.path={tmp_path}/train.jsonl", "--config.dataset.tokenizer=bytes"]
    flags += [f"--config.dataset.validation_path={tmp_path}/val.jsonl", "--config.dataset.streams=4"]
    return [*flags, "--config.dataset.workers=0", "--config.dataset.window=8", "--config.eval.sequences=8"]


@pytest.mark.evidence("straight from `.jsonl`: files that are replaced between stop and resume are named")
def test_a_resume_names_the_file_that_was_replaced(streamed, tmp_path):
    run_imported(*streamed, "--config.steps=3")
    more = "--config.steps=6", "--config.checkpoint.overwrite_config=True"
    for name in ("train", "val"):
        edit(tmp_path / f"{name}.jsonl", 500)
        output = run_imported(*streamed, "--config.steps=3", expect=2)
        assert f"made with other data: {name}.jsonl, whose content has changed" in output
        edit(tmp_path / f"{name}.jsonl", 500)
    # Validation may be replaced on request, and the data to train on continue.
    edit(tmp_path / "val.jsonl", 500)
    output = run_imported(*streamed, *more)
    assert "changed    data: val.jsonl, whose content has changed" in output
    assert "from the beginning" not in output


def test_tokens_of_other_programs_are_described(tmp_path):
    """By names below their common folder, wherever it lies."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        np.arange(300, dtype="<u2").tofile(folder / "train.bin")
        np.arange(50, dtype="<u2").tofile(folder / "val.bin")
    one, two = (open_path(str(tmp_path / name), "gpt2") for name in ("one", "two"))
    assert [file.name for file in one.inputs["train"]] == ["train.bin"]
    meta = {"dataset": one.fingerprint, "inputs": one.inputs}
    assert inputs.changes(meta, {"dataset": two.fingerprint, "inputs": two.inputs}) == {}
    edit(tmp_path / "two" / "val.bin", 20)
    two = open_path(str(tmp_path / "two"), "gpt2")
    (change,) = inputs.changes(meta, {"dataset": two.fingerprint, "inputs": two.inputs}).items()
    assert change == ("validation", "val.bin, whose content has changed; its 100 bytes are as many as before")
    assert inputs.changes({"dataset": "x"}, {"dataset": "y", "inputs": {}}) == {
        "dataset": "dataset x, which is y now"
    }
