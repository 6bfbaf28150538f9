"""The dataset on disk: reading across shards, and what is wrong with a folder."""

import json
import pickle
import shutil

import numpy as np
import pytest

from trainit.data.dataset import DatasetError, open_dataset


def test_read_against_the_files(random_dataset):
    """Every sequence of several lengths, against the concatenated shards."""
    info = json.loads((random_dataset / "dataset.json").read_text())
    for name, split in open_dataset(random_dataset).splits.items():
        files = sorted(random_dataset.glob(f"{name}-*.tokens"))
        tokens = np.concatenate([np.fromfile(file, info["dtype"]) for file in files])
        assert split.tokens == len(tokens) == info["splits"][name]["tokens"]
        for length in (1, 7, 1000, len(tokens) - 1, len(tokens) + 5):
            count = split.sequences(length)
            sequences = np.random.default_rng(0).permutation(count)[:500]
            ids, lengths = split.read(sequences, length)
            for i, row, n in zip(sequences, ids, lengths, strict=True):
                expected = tokens[i * length : i * length + length + 1]
                np.testing.assert_array_equal(row[: n + 1], expected)
                assert n == len(expected) - 1
                assert not row[n + 1 :].any()


def test_documents_and_their_index(random_dataset):
    """Each document starts where the index says and ends with the end-of-text id; bytes are counted."""
    dataset = open_dataset(random_dataset)
    for split in dataset.info["splits"].values():
        total = 0
        for shard in split["shards"]:
            ids = np.fromfile(random_dataset / shard["file"], "<u2")
            starts = np.fromfile((random_dataset / shard["file"]).with_suffix(".documents"), "<u8")
            assert len(starts) == shard["documents"]
            np.testing.assert_array_equal(np.flatnonzero(ids == 256), np.append(starts[1:], len(ids)) - 1)
            total += len(ids) - len(starts)
        assert total == split["bytes"]  # a byte is a token here


def test_split_travels_without_its_mappings(random_dataset):
    split = open_dataset(random_dataset).splits["train"]
    before = split.read(np.array([3]), 32)
    content = pickle.dumps(split)
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content).read(np.array([3]), 32)[0], before[0])


def test_fingerprint_is_of_the_content(random_dataset, tmp_path):
    moved = shutil.copytree(random_dataset, tmp_path / "moved")
    assert open_dataset(moved).fingerprint == open_dataset(random_dataset).fingerprint
    info = json.loads((moved / "dataset.json").read_text())
    info["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (moved / "dataset.json").write_text(json.dumps(info))
    assert open_dataset(moved).fingerprint != open_dataset(random_dataset).fingerprint


def test_what_is_wrong_with_a_folder(random_dataset, tmp_path):
    with pytest.raises(DatasetError, match=r"does not exist.*dataset\.path=demo"):
        open_dataset(tmp_path / "nowhere")
    damaged = shutil.copytree(random_dataset, tmp_path / "damaged")
    shard = damaged / "train-00000-00001.tokens"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=f"{size - 2} bytes instead of {size}"):
        open_dataset(damaged)
    shard.unlink()
    with pytest.raises(DatasetError, match="no bytes instead"):
        open_dataset(damaged)
    for part in ("documents", "subsets"):
        torn = shutil.copytree(random_dataset, tmp_path / part) / f"train-00000-00001.{part}"
        torn.write_bytes(torn.read_bytes()[:-2])
        with pytest.raises(DatasetError, match=rf"{part} has \d+ bytes instead of"):
            open_dataset(tmp_path / part)
    (damaged / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(DatasetError, match="format 99"):
        open_dataset(damaged)
    (damaged / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        open_dataset(damaged)


def test_another_tokenizer_file_is_noticed(random_dataset, tmp_path):
    copy = shutil.copytree(random_dataset, tmp_path / "copy")
    assert open_dataset(copy).tokenizer.vocab_size == 257
    (copy / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match="SHA-256"):
        _ = open_dataset(copy).tokenizer
