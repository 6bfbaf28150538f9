"""Bytes of text are those of the text that was given, whatever a tokenizer adds to it or loses of it.

The oracle is Python's own len(text.encode()).
"""

import io
import json
import math

import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizers as hugging_face

from trainit import config as config_lib
from trainit import tokenizers
from trainit.__main__ import main as trainit_command
from trainit.cluster.monitor import JobMonitor
from trainit.data.dataset import DatasetError, open_dataset
from trainit.data.documents.targets import Targets
from trainit.data.jsonl import dataset as jsonl
from trainit.data.jsonl.stream import Corpus
from trainit.data.training_data import PreparedData
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.prepare.demo import write_dataset
from trainit.prepare.verify import verify
from trainit.train import step
from trainit.train.evaluate import Validation
from trainit.train.reports.startup_timer import StartupTimer

CODE = "def f(x):\n\treturn {x: [x  ** 2]}  # ≈ 4\n\n\n"
# The first token of a split is no target: the end of an empty document, which has no bytes.
TEXTS = [
    "",
    CODE,
    "a text of twenty-eight bytes",
    "汉字 ≠ kanji",
    "  ﬁ  ",
    "≈≠≈",
    "",
    *[CODE * n for n in range(1, 9)],
]
KINDS = "bytes", "prefixed", "lossy"


def prefixed() -> bytes:
    """A tokenizer.json like Llama's: a space is put before every text."""
    alphabet = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "▁a"])}
    bpe = hugging_face.models.BPE(
        vocabulary, [("a", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    made, n, d = hugging_face.Tokenizer(bpe), hugging_face.normalizers, hugging_face.decoders
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    made.add_special_tokens(["</s>"])
    return made.to_str().encode()


def lossy() -> bytes:
    """A sentencepiece model of default options: it normalizes, and characters that it has not are lost."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a text of twenty-eight bytes and more words to learn"] * 50),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    name, make = {
        "bytes": ("bytes", bytes),
        "prefixed": ("tokenizers", prefixed),
        "lossy": ("sentencepiece", lossy),
    }[request.param]
    return tokenizers.build(name, make())


def size(texts) -> int:
    return sum(len(text.encode("utf8", "surrogatepass")) for text in texts)


def write(path, texts, sets=("",)):
    rows = ({"text": text, "meta": {"pile_set_name": sets[i % len(sets)]}} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_targets(split, tokenizer, texts, length):
    """The targets of each document have the bytes of its text, and all of them those of the split."""
    _, sizes = Targets(split, tokenizer.token_bytes()).read(np.arange(split.sequences(length)), length)
    flat = sizes.reshape(-1)[: split.tokens - 1]
    assert not sizes.reshape(-1)[split.tokens - 1 :].any()
    assert (flat >= 0).all()
    ids, _ = split.read(np.arange(split.sequences(length)), length)
    ends = np.flatnonzero(ids[:, 1:].reshape(-1)[: split.tokens - 1] == tokenizer.end_of_text)
    of_each = [float(part.sum(dtype=float)) for part in np.split(flat, ends + 1)[:-1]]
    assert of_each == pytest.approx([size([text]) for text in texts[1:]], rel=1e-6)
    assert split.bytes == size(texts)


@pytest.mark.parametrize("length", [1, 7, 32, 10_000])
def test_each_document_has_the_bytes_of_its_text(length, tokenizer, tmp_path):
    """Prepared in small shards, and read from JSON lines."""
    write_dataset(tmp_path / "data", tokenizer, {"train": TEXTS, "validation": TEXTS}, 50)
    dataset = open_dataset(tmp_path / "data")
    assert len(dataset.splits["validation"].paths) > 3
    assert list(verify(dataset.folder)) == [""] * (
        1 + 4 * sum(len(split.paths) for split in dataset.splits.values())
    )
    check_targets(dataset.splits["validation"], tokenizer, TEXTS, length)
    write(tmp_path / "a.jsonl", TEXTS)
    path = tmp_path / "a.jsonl"
    about = tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text
    corpus = Corpus((str(path),), ("a.jsonl",), (path.stat().st_size,), about, "text", length=length)
    check_targets(jsonl.hold(corpus, "validation", 0), tokenizer, TEXTS, length)


def test_tokens_that_stand_for_their_bytes_have_exactly_these(random_dataset):
    """Where a tokenizer loses nothing, a part of a document has its own bytes, not those of an average."""
    dataset = open_dataset(random_dataset)
    split, table = dataset.splits["validation"], dataset.tokenizer.token_bytes()
    sequences = np.arange(0, split.sequences(32), 3)
    ids, lengths = split.read(sequences, 32)
    _, sizes = Targets(split, table).read(sequences, 32)
    expected = np.where(np.arange(32) < lengths[:, None], table[ids[:, 1:]], 0)
    np.testing.assert_array_equal(sizes, expected)


def test_validation_data_that_are_cut_have_the_bytes_up_to_there(tokenizer, tmp_path):
    """dataset=jsonl with eval.sequences: the last document counts for as much as is read of it."""
    path, text = tmp_path / "a.jsonl", "abc " * 1000
    write(path, ["", text])
    about = tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text
    corpus = Corpus((str(path),), ("a.jsonl",), (path.stat().st_size,), about, "text", length=10)
    held = jsonl.hold(corpus, "validation", 20)
    assert held.tokens == 201
    _, sizes = Targets(held, tokenizer.token_bytes()).read(np.arange(20), 10)
    whole = len(tokenizer.encode([text])[0])
    assert sizes.sum() == pytest.approx(4000 * 200 / whole, rel=0.05)
    assert held.bytes == pytest.approx(sizes.sum(), abs=1)


@pytest.mark.parametrize("documents", [2, 3, 4])
def test_left_out_duplicates_take_their_bytes_with_them(documents, tokenizer, tmp_path):
    """Subsets add up to the whole, and to the texts that stay."""
    texts = ["ab"] * documents + ["≈≈", CODE, "ab", CODE, "ﬁ"]
    write(tmp_path / "a.jsonl", texts, ("one", "two"))
    write(tmp_path / "v.jsonl", ["another"])
    suffix = {"bytes": "", "tokenizers": f":{tmp_path}/m", "sentencepiece": f":{tmp_path}/m"}[tokenizer.name]
    (tmp_path / "m").write_bytes(tokenizer.serialize())
    code = trainit_command(
        [
            "prepare",
            f"--input={tmp_path}/a.jsonl",
            f"--validation={tmp_path}/v.jsonl",
            f"--output={tmp_path}/data",
            f"--tokenizer={tokenizer.name}{suffix}",
            "--deduplicate",
            "--workers=1",
        ]
    )
    assert not code
    dataset = open_dataset(tmp_path / "data")
    train, stay = dataset.info["splits"]["train"], list(dict.fromkeys(texts))
    assert train["bytes"] == size(stay)
    for name, other in (("one", 0), ("two", 1)):
        own = [text for text in stay if texts.index(text) % 2 == other]
        expected = {"documents": len(own), "bytes": size(own)} if own else {}
        assert {k: train["subsets"].get(name, {})[k] for k in expected} == expected
    assert not any(verify(dataset.folder))
    assert dataset.splits["train"].documents(0)[1].tolist() == [size([text]) for text in stay]


def test_bits_per_byte_are_over_the_bytes_of_the_text(tokenizer, tmp_path):
    """Through the evaluation step: total bits of all targets over Python's count of bytes."""
    write_dataset(tmp_path, tokenizer, {"train": TEXTS, "validation": TEXTS})
    dataset, config = open_dataset(tmp_path), tiny.get_config()
    config.eval.sequences = 0
    config = config_lib.resolve(config, dataset.vocab_size)
    shape = shape_on(config, make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1}))
    steps, monitor = step.build(config, shape), JobMonitor(0, 1, lambda code: None, 40.0)
    params = steps.init().params
    result = Validation(config, PreparedData(config, dataset), shape, steps, monitor, StartupTimer())(
        0, params
    )
    bits = result["valid/loss"] / math.log(2) * (dataset.splits["validation"].tokens - 1)
    assert result["valid/bits_per_byte"] == pytest.approx(bits / size(TEXTS), rel=1e-5)


def test_pieces_of_a_document_add_up(tmp_path):
    """A .txt that is read in several batches of pieces, and one after it."""
    long = "über ≈ 7\n" * 200_000
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text(CODE)
    (tmp_path / "v.txt").write_text(CODE)
    flags = (
        f"--input={tmp_path}/[ab].txt",
        f"--validation={tmp_path}/v.txt",
        "--tokenizer=bytes",
        "--workers=1",
    )
    assert not trainit_command(["prepare", *flags, f"--output={tmp_path}/data"])
    split = open_dataset(tmp_path / "data").splits["train"]
    sizes = [int(n) for shard in range(len(split.paths)) for n in split.documents(shard)[1]]
    assert sizes == [size([long]), size([CODE])]
    assert split.bytes == sum(sizes)


def test_datasets_of_the_format_before_are_refused(random_dataset, tmp_path):
    about = json.loads((random_dataset / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(DatasetError, match=r"has format 2, this Trainit reads 3: prepare it again"):
        open_dataset(tmp_path)
