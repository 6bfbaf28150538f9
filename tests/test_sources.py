"""What a run trains on, as its config says: subsets and other datasets as parts of a mixture."""

import dataclasses
import itertools
import pickle
import shutil
import signal
import tracemalloc
import zlib

import numpy as np
import pytest
import tiny
from processes import TWO, Fork, end, last_step, metrics, run_imported, wait_for

from trainit import config as config_lib
from trainit.config import ConfigError
from trainit.data import training_data
from trainit.data.dataset import DatasetError, open_dataset
from trainit.data.documents.targets import Targets
from trainit.data.rows import mixture

LENGTH = 32


def documents(folder, split) -> list[tuple[bytes, str]]:
    """Every document with its subset, read from the files alone; a byte is a token."""
    dataset, result = open_dataset(folder), []
    for shard in dataset.info["splits"][split]["shards"]:
        ids = np.fromfile(folder / shard["file"], "<u2")
        starts = np.fromfile((folder / shard["file"]).with_suffix(".documents"), "<u8").astype(int)
        numbers = np.fromfile((folder / shard["file"]).with_suffix(".subsets"), "<u2")
        for begin, until, number in zip(starts, [*starts[1:], len(ids)], numbers, strict=True):
            result.append((ids[begin:until].tolist(), dataset.info["subsets"][number]))
    return result


def make(folder, **changes):
    config = tiny.get_config()
    config.dataset.path = str(folder)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config_lib.resolve(config, 257)


def test_a_subset_is_its_documents_end_to_end(subset_dataset, tmp_path):
    dataset = open_dataset(subset_dataset)
    there = documents(subset_dataset, "train")
    assert len(dataset.splits["train"].paths) > 2  # it goes over several shards
    parts = mixture.with_parts(dataset, "Gamma 1, Alpha 1, Beta (1) 1", tmp_path).parts
    for name, part in parts.items():
        tokens = np.concatenate([ids for ids, subset in there if subset == name])
        assert part.tokens == len(tokens)
        for length in (1, 7, LENGTH, len(tokens) + 3):
            sequences = np.append(np.random.default_rng(0).permutation(part.sequences(length))[:300], -1)
            ids, lengths = pickle.loads(pickle.dumps(part)).read(sequences, length)
            for i, row, n in zip(sequences, ids, lengths, strict=True):
                expected = tokens[i * length : i * length + length + 1] if i >= 0 else tokens[:1] * 0
                np.testing.assert_array_equal(row[: n + 1], expected)
                assert n == len(expected) - 1
                assert not row[n + 1 :].any()


def test_an_index_that_a_full_disk_cuts_is_not_kept(subset_dataset, tmp_path):
    """It would say that the subset has fewer tokens, for ever."""
    dataset = open_dataset(subset_dataset)
    expected = mixture.with_parts(dataset, "Alpha 1", tmp_path / "whole").parts["Alpha"].tokens
    folder = next((tmp_path / "whole").iterdir()).name
    for part in ("starts", "ends"):
        name = next((tmp_path / "whole").rglob(f"*.{part}")).name
        full = tmp_path / part / folder / f"{name}-unfinished"
        full.parent.mkdir(parents=True)
        full.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            mixture.with_parts(dataset, "Alpha 1", tmp_path / part)
        full.unlink()
        assert mixture.with_parts(dataset, "Alpha 1", tmp_path / part).parts["Alpha"].tokens == expected


def test_subsets_of_targets_follow_the_index(subset_dataset):
    dataset = open_dataset(subset_dataset)
    split = dataset.splits["validation"]
    of = np.concatenate(
        [
            [dataset.info["subsets"].index(subset)] * len(ids)
            for ids, subset in documents(subset_dataset, "validation")
        ]
    )
    sequences = np.append(np.arange(split.sequences(LENGTH)), -1)
    numbers, _ = Targets(split, dataset.tokenizer.token_bytes()).read(sequences, LENGTH)
    _, lengths = split.read(sequences, LENGTH)
    for i, row, n in zip(sequences, numbers, lengths, strict=True):
        np.testing.assert_array_equal(row[:n], of[i * LENGTH + 1 : i * LENGTH + 1 + n])
        assert not row[n:].any()


def test_weights_and_their_changes(subset_dataset, random_dataset, tmp_path):
    """16 rows a batch: two stages, the second of another dataset too, which begins at step 20 of 40."""
    text = f"Alpha 1, Gamma 1; 50%: Alpha 0.5, {random_dataset} 1.5"
    dataset = mixture.with_parts(open_dataset(subset_dataset), text, tmp_path)
    config = make(subset_dataset, dataset__mixture=text, dataset__order="sequential")
    rows = training_data.PreparedData(config, dataset).rows
    number, _ = rows.where(np.arange(40 * 16))
    assert list(dataset.parts) == ["Alpha", "Gamma", str(random_dataset)]
    assert np.bincount(number[: 20 * 16]).tolist() == [160, 160]
    assert np.bincount(number[20 * 16 :]).tolist() == [80, 0, 240]
    ids, _ = rows.read(np.arange(40 * 16), LENGTH)
    other = open_dataset(random_dataset).splits["train"].read(np.arange(240), LENGTH)[0]
    np.testing.assert_array_equal(ids[number == 2], other)
    assert dataset.fingerprint != open_dataset(subset_dataset).fingerprint


def test_parts_of_close_seeds_have_independent_orders(subset_dataset):
    """The CRC-32 of the names differ by one, so that a sum with seed 1 and one with seed 2 are equal."""
    names = "part73", "part1064901"
    assert zlib.crc32(names[1].encode()) - zlib.crc32(names[0].encode()) == -1
    dataset, text = open_dataset(subset_dataset), f"{names[0]} 1, {names[1]} 1"
    dataset = dataclasses.replace(dataset, parts=dict.fromkeys(names, dataset.splits["train"]))
    configs = [make(subset_dataset, dataset__mixture=text, seed=seed) for seed in (1, 2)]
    one, other = (training_data.PreparedData(config, dataset).rows.sources for config in configs)
    orders = [part.order(np.arange(40)) for part in (*one, *other)]
    assert all((a != b).mean() > 0.5 for a, b in itertools.combinations(orders, 2))


def test_other_changes_than_those_to_come_are_refused(subset_dataset):
    """Stages begin at rows: whoever resumes has consumed those of his steps, with the same stages before."""
    old = make(subset_dataset, dataset__mixture="Alpha 1; 10: Gamma 1; 50%: Alpha 1").to_dict()

    def check(text, rows=15 * 16, step=15, **changes):
        sizes = config_lib.batch_sizes(make(subset_dataset, dataset__mixture=text, **changes))
        mixture.check_history(text, sizes, old, rows, step)

    check("Alpha 1; 10: Gamma 1; 50%: Alpha 1")
    check("Alpha 1; 10: Gamma 1; 30: Alpha 1, Gamma 2")  # it is still to come
    check("Alpha 1; 10: Gamma 1", steps=80)
    with pytest.raises(ConfigError, match=r"another past than the checkpoint's .* at step 15"):
        check("Alpha 1; 12: Gamma 1")
    with pytest.raises(ConfigError, match="another past"):
        check("Alpha 1; 25%: Gamma 1; 50%: Alpha 1", steps=80)
    with pytest.raises(ConfigError, match="at step 15 0 sequences are consumed"):
        check("Alpha 1; 10: Gamma 1; 50%: Alpha 1", rows=0)


def test_an_index_is_searched_without_a_copy(subset_dataset, tmp_path):
    """What a search allocates does not grow with the index."""
    dataset = open_dataset(subset_dataset)
    part = mixture.with_parts(dataset, "Alpha 1", tmp_path).parts["Alpha"]
    documents = 1_000_000
    starts = np.zeros(documents, "<u8")
    ends = np.full(documents, 2**40, "<u8")
    ends[0] = 10**6
    starts.tofile(f"{part.index}.starts")
    ends.tofile(f"{part.index}.ends")
    part.read(np.array([0]), LENGTH)
    tracemalloc.start()
    part.read(np.array([3]), LENGTH)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_tokens_of_others_are_a_part_too(subset_dataset, tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 3000).astype("<u2")
    ids.tofile(tmp_path / "web.bin")
    text = f"Alpha 1, {tmp_path}/web.bin 1"
    dataset = mixture.with_parts(open_dataset(subset_dataset), text, tmp_path / "cache")
    read, _ = dataset.parts[f"{tmp_path}/web.bin"].read(np.arange(5), LENGTH)
    np.testing.assert_array_equal(read[3], ids[3 * LENGTH : 4 * LENGTH + 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Alpha", "'Alpha' is no 'NAME WEIGHT'"),
        ("Alpha x", "is no 'NAME WEIGHT'"),
        ("Alpha -1", "a weight from 0 on"),
        ("Alpha nan", "'Alpha nan' is no 'NAME WEIGHT'"),
        ("Alpha 1e999999999", "'Alpha 1e999999999' is no 'NAME WEIGHT'"),  # a number of a billion digits
        ("Alpha 1E-999999999", "is no 'NAME WEIGHT'"),
        ("Alpha 1,", "'' is no 'NAME WEIGHT'"),
        ("Alpha 0, Gamma 0", "sum to 0"),
        ("10%: Alpha 1", "must not say when it begins"),
        ("Alpha 1; Gamma 1", "must say when it begins"),
        ("Alpha 1, Delta 1", "'Delta' is neither a dataset's folder nor a subset of .* which has .*Gamma"),
    ],
)
def test_what_is_wrong_with_a_mixture(text, message, subset_dataset, tmp_path):
    with pytest.raises(ConfigError, match=message):
        mixture.with_parts(open_dataset(subset_dataset), text, tmp_path)


def test_documents_without_a_subset_are_none_to_name(random_dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"nor a subset of .*, which has none"):
        mixture.with_parts(open_dataset(random_dataset), "Alpha 1", tmp_path)


def test_stages_follow_each_other_and_tokenizers_agree(subset_dataset, random_dataset, tmp_path):
    text = "Alpha 1; 50%: Gamma 1; 20%: Alpha 1"
    dataset = mixture.with_parts(open_dataset(subset_dataset), text, tmp_path)
    with pytest.raises(ConfigError, match="must begin one after another"):
        _ = training_data.PreparedData(make(subset_dataset, dataset__mixture=text), dataset).rows
    other = shutil.copytree(random_dataset, tmp_path / "other")
    content = (other / "dataset.json").read_text()
    digest = open_dataset(other).info["tokenizer"]["sha256"]
    (other / "dataset.json").write_text(content.replace(digest, "f" * 64))
    with pytest.raises(ConfigError, match=r"tokenizer bytes of hash ffffffff.*prepare both with one"):
        mixture.with_parts(open_dataset(subset_dataset), f"{other} 1", tmp_path)
    with pytest.raises(DatasetError, match="unfinished"):
        (other / "dataset.json").unlink()
        mixture.with_parts(open_dataset(subset_dataset), f"{other} 1", tmp_path)


@pytest.mark.evidence("a run on a mixture whose weights change, stopped and resumed: the same losses")
def test_a_run_on_a_mixture_with_a_document_mask(subset_dataset, tmp_path):
    """Stopped half-way and resumed, in blocks, with validation by subset: as one that was not stopped."""
    arguments = (
        f"--config={tiny.__file__}",
        f"--config.dataset.path={subset_dataset}",
        "--config.dataset.mixture=Alpha 0.5, Gamma 0.5; 12: Beta (1) 1",
        *("--config.dataset.order=blocks", "--config.dataset.block_tokens=320"),
        *("--config.model.document_mask=True", "--config.schedule.warmup=2", "--config.steps=24"),
        *TWO,
    )
    run_imported(*arguments, f"--workdir={tmp_path}/whole")
    process = Fork(*arguments, f"--workdir={tmp_path}/parts")
    assert wait_for(process, lambda: last_step(tmp_path / "parts") >= 3)
    process.send_signal(signal.SIGTERM)
    end(process, 75, 60)
    assert last_step(tmp_path / "parts") < 24
    run_imported(*arguments, f"--workdir={tmp_path}/parts")
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [record["train/loss"] for record in whole[1:]] == [record["train/loss"] for record in parts[1:]]
    last = whole[-1]
    assert {name.split("/")[-1] for name in last if name.startswith("valid/loss/")} == {
        *("Alpha", "Beta (1)", "Gamma")
    }
    subset_losses = [value for name, value in last.items() if name.startswith("valid/loss/")]
    assert last["valid/loss_macro"] == pytest.approx(np.mean(subset_losses))
