"""Small vocabularies of all kinds that can be loaded, as others make them."""

import io
import json

import sentencepiece
import tokenizers as hugging_face
from corpus import TEXT
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from trainit import tokenizers
from trainit.tokenizers import base

# The patterns of GPT-2 (Radford et al. 2019), Llama 3 and Qwen 2.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINED_ON = TEXT + "汉字文本。\nПривет, мир! été naïve ab  \r\n== xxxxxxxx\n" * 30
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
