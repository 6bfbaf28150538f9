"""Long documents: their ids are those that each library gives for the whole text, wherever they are cut."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hugging_face
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainit import tokenizers
from trainit.data.documents import reader
from trainit.tokenizers import base, bpe

# The patterns of GPT-2 (Radford et al. 2019), Llama 3 and Qwen 2.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = (
    *"e'(.=)1 \n",
    *("\r\n", "  ", "\t", "x" * 40, "ab  ", "汉字文本。", "Привет, ", "été", "e\u0301", "ﬁ", "😀", "don't"),
)
WORDS = Path(reader.__file__).read_text()
TRAINED_ON = WORDS + "汉字文本。\nПривет, мир! été naïve ab  \r\n== xxxxxxxx\n" * 30
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(pattern: str) -> bytes:
    made = hugging_face.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(hugging_face.Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TRAINED_ON], trainer)
    return made.to_str().encode()


def with_bytes(unigram: bool = False, normalize=(), **parts) -> bytes:
    """A model like Llama 2's: bytes as its fallback, with such a normalizer and pre-tokenizer."""
    made = hugging_face.Tokenizer(
        models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True)
    )
    special = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    trainer = (
        trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", **special)
        if unigram
        else trainers.BpeTrainer(vocab_size=700, max_token_length=16, **special)
    )
    made.normalizer = normalizers.Sequence([*normalize, normalizers.Replace(" ", base.SPACE)])
    for name, part in parts.items():
        setattr(made, name, part)
    made.decoder = decoders.Sequence([decoders.Replace(base.SPACE, " "), decoders.ByteFallback()])
    made.train_from_iterator(TRAINED_ON.splitlines(), trainer)
    about = json.loads(made.to_str())
    model = about["model"]
    model["byte_fallback"] = True
    if unigram:
        model["vocab"] += [[name, -20.0] for name in BYTES]
    else:
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(BYTES)}
    return json.dumps(about).encode()


def piece_model(**options) -> bytes:
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON.splitlines()),
        model_writer=model,
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "gpt2": lambda: tokenizers.find("gpt2").serialize(),
    "tokenizers GPT-2": lambda: byte_level(GPT2),
    "tokenizers Llama 3": lambda: byte_level(LLAMA3),
    "tokenizers Qwen": lambda: byte_level(LLAMA3.replace("{1,3}", "")),
    "tokenizers Prepend": lambda: with_bytes(normalize=[normalizers.Prepend(base.SPACE)]),
    "tokenizers Replace": with_bytes,
    "tokenizers NFKC": lambda: with_bytes(
        normalize=[normalizers.NFKC(), normalizers.Strip(), normalizers.Prepend(base.SPACE)]
    ),
    "tokenizers Metaspace": lambda: with_bytes(pre_tokenizer=pre_tokenizers.Metaspace()),
    "tokenizers Metaspace first": lambda: with_bytes(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "tokenizers Unigram": lambda: with_bytes(True, pre_tokenizer=pre_tokenizers.Metaspace()),
    "tokenizers Unigram never": lambda: with_bytes(True),
    "sentencepiece": piece_model,
    "sentencepiece Llama 2": lambda: piece_model(**EXACT),
    "sentencepiece no prefix": lambda: piece_model(add_dummy_prefix=False, **EXACT),
    "sentencepiece no bytes": lambda: piece_model(byte_fallback=False),
    "sentencepiece suffix": lambda: piece_model(treat_whitespace_as_suffix=True),
    "sentencepiece no split": lambda: piece_model(split_by_whitespace=False, **EXACT),
    "sentencepiece unigram": lambda: piece_model(model_type="unigram"),
    "sentencepiece unigram no prefix": lambda: piece_model(
        model_type="unigram", add_dummy_prefix=False, **EXACT
    ),
    "sentencepiece of ours": lambda: tokenizers.SentencePieceTokenizer.train([TRAINED_ON], 500).serialize(),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    """A tokenizer, and its library's own way from a whole text to ids."""
    name, content = request.param.split()[0], KINDS[request.param]()
    tokenizer = tokenizers.build(name, content)
    if name == "gpt2":
        return tokenizer, tokenizer._encoding.encode_ordinary
    if name == "sentencepiece":
        return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=content).encode
    library = hugging_face.Tokenizer.from_str(content.decode())
    return tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids


def texts(seed: int):
    """Texts of several scripts, with and without places to cut."""
    draw = np.random.default_rng(seed)
    size = int(draw.integers(1200, 3000))
    words = WORDS.split(" ")
    yield " ".join(words[i] for i in draw.integers(0, len(words), size // 6))
    yield "".join(LETTERS[i] for i in draw.integers(0, len(LETTERS), size // 3))
    for first, last in ((0x20, 0x250), (0x4E00, 0x9000), (0x61, 0x7B)):
        yield "".join(map(chr, draw.integers(first, last, size)))
    for run in ("x", "ab  ", "汉字文本。\n", " ", "\r\n", "Это  строка.", "==-"):
        yield run * (size // len(run)) + "x"


def test_cuts_change_no_id(both, monkeypatch):
    """Cut after few characters or more, a document has the ids of the whole of it."""
    tokenizer, whole = both
    cuts = 0
    for piece in (500, 999):
        monkeypatch.setattr(base, "PIECE", piece)
        monkeypatch.setattr(base, "CONTEXT", 200)
        for text in texts(piece):
            cuts += len(list(base.pieces([text], tokenizer.cut))) - 1
            np.testing.assert_array_equal(tokenizer.encode([text])[0], whole(text), text[:99])
    assert cuts > 15  # most texts can be cut


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
    text = (WORDS + "汉字文本。\n" * 999) * 2
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
