"""Checkpoints whose files are damaged: every flipped bit is found, by all that read them."""

import json
import random
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from finished import make_run

from trainit.__main__ import main as trainit_command
from trainit.checkpoints import digests
from trainit.checkpoints.fallback import set_aside, whole
from trainit.checkpoints.finished_run import open_run
from trainit.checkpoints.parameters import parameter_shapes, read_parameters
from trainit.checkpoints.store import CheckpointStore
from trainit.config import ConfigError

# Orbax writes the one after the digests, and reads it nowhere but on object stores.
HARMLESS = "commit_success.txt"


@pytest.fixture(scope="module")
def made(random_dataset, tmp_path_factory):
    """A run's folder with checkpoints 7, 8 and 9, and its parameters."""
    folder = tmp_path_factory.mktemp("run")
    params, _ = make_run(folder, random_dataset, 257, 256)
    for step in (8, 9):
        shutil.copytree(folder / "checkpoints/7", folder / f"checkpoints/{step}")
    return folder, params


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def flip(path: Path, at: int, bit: int = 0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def data_file(run: Path, step: int) -> Path:
    """The file that holds most of a checkpoint."""
    return max((run / f"checkpoints/{step}").rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.evidence("a bit flipped anywhere in a checkpoint is found before anything of it is used")
def test_each_flipped_bit_is_found_or_changes_nothing(run, made):
    """In every file, at its ends and at places drawn from a seed."""
    folder, draw = run / "checkpoints/9", random.Random(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert digests.problems(folder) == []
    for path in files:
        good = path.read_bytes()
        for at in {0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(12))}:
            flip(path, at, draw.randrange(8))
            found = digests.problems(folder)
            name = str(path.relative_to(folder))
            if name == HARMLESS or (name == digests.ORBAX_METADATA and _is_end_time(good, at)):
                if not found:  # it is JSON still
                    restored = read_parameters(CheckpointStore(run, read_only=True), 9, ["head/kernel"])
                    np.testing.assert_array_equal(restored["head/kernel"], made[1]["head"]["kernel"])
            elif not _is_space(good, at):
                assert found, (name, at)
                assert found[0].startswith(name), (name, at, found)
            path.write_bytes(good)
    assert digests.problems(folder) == []


def _is_end_time(content: bytes, at: int) -> bool:
    """Whether a byte belongs to the time at which the save ended, which Orbax adds after all else."""
    begin = content.index(b'"commit_timestamp_nsecs": ') + len('"commit_timestamp_nsecs": ')
    return begin <= at < begin + len(str(json.loads(content)["commit_timestamp_nsecs"]))


def _is_space(content: bytes, at: int) -> bool:
    """Whether a byte is white space, which JSON may have or not."""
    return content[:1] == b"{" and content[at : at + 1] in b" \n"


@pytest.mark.parametrize(
    "damage", ["cut", "grown", "deleted", "folder deleted", "no object", "digests deleted"]
)
def test_a_missing_or_cut_file_is_a_line(damage, run, capsys):
    path = data_file(run, 9)
    name, size = str(path.relative_to(run / "checkpoints/9")), path.stat().st_size
    expected = [f"{name} has {size // 2} bytes instead of {size}"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: size // 2])
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"x")
        expected = [f"{name} has {size + 1} bytes instead of {size}"]
    elif damage == "deleted":
        path.unlink()
        expected = [f"{name} is missing"]
    elif damage == "folder deleted":
        shutil.rmtree(run / "checkpoints/9/meta")
        expected = ["meta/commit_success.txt is missing", "meta/metadata is missing"]
    elif damage == "no object":
        (run / "checkpoints/9/_CHECKPOINT_METADATA").write_text("null")
        expected = ["_CHECKPOINT_METADATA is not as it was saved"]
    else:
        (run / "checkpoints/9/digests.json").unlink()
        expected = ["digests.json is missing"]
    assert trainit_command(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    checkpoints = run / "checkpoints"
    assert [line for line in lines if "as they were saved" not in line] == [
        f"{checkpoints}/9: {text}" for text in expected
    ]
    assert [line.partition(": ")[0] for line in lines] == [
        *(f"{checkpoints}/{step}" for step in (7, 8)),
        *(f"{checkpoints}/9" for _ in expected),
    ]


def test_verify_of_a_whole_run(run, capsys):
    assert trainit_command(["verify", str(run)]) == 0
    files = [path for path in (run / "checkpoints/7").rglob("*") if path.is_file()]
    counted = len(files) - 2  # without the digests, and what Orbax writes after them
    assert capsys.readouterr().out.startswith(f"{run}/checkpoints/7: {counted} files of ")
    assert trainit_command(["verify", str(run / "logs")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert trainit_command(["verify", str(run / "checkpoints")]) == 2
    assert "has neither dataset.json nor checkpoints" in capsys.readouterr().err


@pytest.mark.evidence(
    "a damaged checkpoint is refused by all that read it, with its file and the newest whole one"
)
def test_all_readers_refuse_what_is_damaged(run, capsys):
    """The last byte of most numbers, or the position in the data: one line names file and checkpoint."""
    flip(data_file(run, 9), 5000)
    metadata = run / "checkpoints/8/meta/metadata"
    metadata.write_text(metadata.read_text().replace('"tokens": 99', '"tokens": 98'))
    abstract = {"head": {"kernel": jax.ShapeDtypeStruct((32, 384), "float32")}}
    readers = [
        lambda store, step: store.meta(step),
        lambda store, step: store.restore_params(step, abstract),
        parameter_shapes,
        lambda store, step: read_parameters(store, step, ["head/kernel"]),
    ]
    for step, file in ((9, r"state/ocdbt\.process_0/d/\w+"), (8, "meta/metadata")):
        for read in readers:
            with pytest.raises(ConfigError, match=rf"checkpoints/{step} is damaged: {file} is not as it was"):
                read(CheckpointStore(run, read_only=True), step)
    assert CheckpointStore(run, read_only=True).meta(7)["tokens"] == 99

    with pytest.raises(ConfigError, match="the newest whole one before it is of step 7: --step=7 takes that"):
        open_run(run, None)
    assert open_run(run, 7).step == 7
    assert trainit_command(["export", str(run), f"--output={run}/exported", "--tokenizer=none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trainit: error: checkpoint {run.absolute()}/checkpoints/9 is damaged: state/")
    assert not list(run.glob("exported*"))


def test_the_newest_whole_checkpoint(run, caplog):
    store = CheckpointStore(run)
    assert whole(store, 9, "", fallback=True) == 9
    for step in (9, 8):
        data_file(run, step).unlink()
    assert whole(CheckpointStore(run), 9, "", fallback=True) == 7
    assert "the run continues from step 7" in caplog.text
    data_file(run, 7).unlink()
    with pytest.raises(ConfigError, match="no checkpoint before it is whole"):
        whole(CheckpointStore(run), 9, "", fallback=True)

    set_aside(store, 7)
    assert store.steps() == [7]
    assert (run / "checkpoints/9.damaged/meta/metadata").exists()
    assert CheckpointStore(run, read_only=True).steps() == [7]


def without_digests(checkpoint: Path):
    """A checkpoint as earlier versions wrote it."""
    (checkpoint / "digests.json").unlink()
    path = checkpoint / digests.ORBAX_METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))


def test_a_checkpoint_of_an_earlier_version_is_read_unchecked(run, made, caplog, capsys):
    without_digests(run / "checkpoints/9")
    opened = open_run(run, None)
    restored = read_parameters(opened.store, 9, ["head/kernel"])
    np.testing.assert_array_equal(restored["head/kernel"], made[1]["head"]["kernel"])
    assert caplog.text.count("checkpoints/9 was saved without digests: its files are not checked") == 1
    assert trainit_command(["verify", str(run)]) == 1
    assert "checkpoints/9: it was saved without digests: it cannot be checked" in capsys.readouterr().out


def test_processes_share_the_work(run, monkeypatch):
    """Every block is one process's; if as many processes wrote it, each has its own files."""
    folder = run / "checkpoints/9"
    monkeypatch.setattr(digests, "BLOCK_BYTES", 1000)
    (folder / "digests.json").unlink()
    (folder / "state/ocdbt.process_0").rename(folder / "state/ocdbt.process_2")
    digests.digest_own_part(folder / "state", 2)
    digests.collect(folder)
    assert not list(folder.glob("*/*/digests.json"))
    compared, compare = [], digests._compare
    monkeypatch.setattr(
        digests, "_compare", lambda *args: compared.append((process, *args[1:3])) or compare(*args)
    )
    for count in (1, 2, 3, 7):
        compared.clear()
        for process in range(count):
            assert digests.problems(folder, process, count) == []
        blocks = [block for _, *block in compared]
        files = digests.read(folder)
        assert sorted(blocks) == sorted(
            [name, i] for name in files for i in range(len(files[name]["blocks"]))
        )
        assert sum(len(about["blocks"]) for about in files.values()) > 100
        shares = [sum(number == process for number, *_ in compared) for process in range(count)]
        if count == 3:
            assert {number for number, name, _ in compared if "process_2" in name} == {2}
        elif count == 2:
            assert min(shares) > 40
    flip(data_file(run, 9), 2500)
    assert [len(digests.problems(folder, process, 7)) for process in range(7)].count(1) == 1


@pytest.mark.parametrize("end", ["last", "never"])
def test_a_late_thread_of_orbax(end, random_dataset, tmp_path, monkeypatch):
    """Orbax's metadata are written by a thread of its own, for which the digests wait."""
    store = type(ocp.metadata.metadata_store(enable_write=True, blocking_write=True)._store_impl)
    update = store.update

    def late(self, file_path, **fields):
        time.sleep(0.3)
        if end == "last" or "custom_metadata" not in fields:
            update(self, file_path, **fields)

    monkeypatch.setattr(store, "update", late)
    if end == "last":
        make_run(tmp_path, random_dataset, 257, 256)
        assert digests.problems(tmp_path / "checkpoints/7") == []
        return
    monkeypatch.setattr(digests, "WAIT_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match=r"_CHECKPOINT_METADATA is not complete after 0\.5 s"):
        make_run(tmp_path, random_dataset, 257, 256)
