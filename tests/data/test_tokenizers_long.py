"""Long documents: their ids are those that each library gives for the whole text, wherever they are cut."""

import numpy as np
import pytest
import sentencepiece
import tokenizers as hugging_face
from corpus import TEXT
from vocabularies import KINDS

from trainit import tokenizers
from trainit.data.documents import reader
from trainit.tokenizers import base, bpe

LETTERS = (
    *"e'(.=)1 \n",
    *("\r\n", "  ", "\t", "x" * 40, "ab  ", "汉字文本。", "Привет, ", "été", "e\u0301", "ﬁ", "😀", "don't"),
)


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    """The name of a kind, its tokenizer, and its library's own way from a whole text to ids."""
    kind = request.param
    name, content = kind.split()[0], KINDS[kind]()
    tokenizer = tokenizers.build(name, content)
    if name == "gpt2":
        return kind, tokenizer, tokenizer._encoding.encode_ordinary
    if name == "sentencepiece":
        return kind, tokenizer, sentencepiece.SentencePieceProcessor(model_proto=content).encode
    library = hugging_face.Tokenizer.from_str(content.decode())
    return kind, tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids


def texts(seed: int):
    """Texts of several scripts, with and without places to cut."""
    draw = np.random.default_rng(seed)
    size = int(draw.integers(1200, 3000))
    words = TEXT.split(" ")
    yield " ".join(words[i] for i in draw.integers(0, len(words), size // 6))
    yield "".join(LETTERS[i] for i in draw.integers(0, len(LETTERS), size // 3))
    for first, last in ((0x20, 0x250), (0x4E00, 0x9000), (0x61, 0x7B)):
        yield "".join(map(chr, draw.integers(first, last, size)))
    for run in ("x", "ab  ", "汉字文本。\n", " ", "\r\n", "Это  строка.", "==-"):
        yield run * (size // len(run)) + "x"


def test_cuts_change_no_id(both, monkeypatch):
    """Cut after few characters or more, a document has the ids of the whole of it."""
    kind, tokenizer, whole = both
    cuts = 0
    for piece in (500, 999):
        monkeypatch.setattr(base, "PIECE", piece)
        monkeypatch.setattr(base, "CONTEXT", 200)
        for text in texts(piece):
            cuts += len(list(base.pieces([text], tokenizer.cut))) - 1
            np.testing.assert_array_equal(tokenizer.encode([text])[0], whole(text), text[:99])
    # Most texts can be cut, but not with the sums of scores of a unigram model.
    assert cuts == 0 if "nigram" in kind else cuts > 15


@pytest.mark.parametrize("text", ["x" * 300_000, "ab  " * 70_000, "汉字文本。\n" * 200_000], ids="xa汉")
@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers Metaspace", "tokenizers Llama 3"])
def test_long_documents_as_they_are(kind, text):
    name, content = kind.split()[0], KINDS[kind]()
    if name == "sentencepiece":
        whole = sentencepiece.SentencePieceProcessor(model_proto=content).encode(text)
    else:
        whole = hugging_face.Tokenizer.from_str(content.decode()).encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(tokenizers.build(name, content).encode([text])[0], whole)


@pytest.mark.parametrize("kind", ["sentencepiece Llama 2", "tokenizers Prepend", "tokenizers Llama 3"])
def test_a_text_file_is_encoded_as_a_whole(kind, tmp_path, monkeypatch):
    """A .txt, which is read in pieces and resumed after each batch of them."""
    monkeypatch.setattr(base, "PIECE", 3000)
    monkeypatch.setattr(reader, "BATCH", 7000)
    tokenizer = tokenizers.build(kind.split()[0], KINDS[kind]())
    text = (TEXT + "汉字文本。\n" * 999) * 2
    (tmp_path / "a.txt").write_text(text)
    position, ids = reader.Position(), []
    while position.file == 0:
        batch = next(reader.read(tmp_path / "a.txt", "a", ("", ""), position, tokenizer.cut))
        position = batch.position
        ids += reader.encode(batch.documents, tokenizer, "a")[1]
    assert len(ids) > 5
    monkeypatch.setattr(base, "PIECE", len(text))
    np.testing.assert_array_equal(np.concatenate(ids), tokenizer.encode([text])[0])


@pytest.mark.parametrize("run", [" ", "\n", " \n", "\u3000"])
@pytest.mark.parametrize("end", ["", "x", " x"])
def test_gpt2_of_long_white_space(run, end, monkeypatch):
    """What tiktoken fails on from a million characters on is taken apart, here from a thousand on."""
    tokenizer = tokenizers.find("gpt2")
    text = f"a{run * 140_000}{end}b {run * 1001}c{run}d{run * 700}{end}"
    monkeypatch.setattr(bpe, "RUN", 1000)
    np.testing.assert_array_equal(tokenizer.encode([text])[0], tokenizer._encoding.encode_ordinary(text))
