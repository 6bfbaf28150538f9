"""Text to token ids and back. A tokenizer is stored beside the tokens that it made."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece writes a space as this character


class Tokenizer(Protocol):
    """What the rest of Trainit asks of a tokenizer."""

    name: str  # the kind, by which `load` finds it again
    vocab_size: int  # ids are below it
    end_of_text: int  # the id that stands behind every document

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array of ids a text, without end_of_text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; end_of_text becomes nothing."""

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the UTF-8 bytes that each id stands for, 0 for end_of_text."""

    def serialize(self) -> bytes:
        """The content of the tokenizer's file."""


class ByteTokenizer:
    """Each UTF-8 byte is a token; 256 ends a text."""

    name, vocab_size, end_of_text = "bytes", 257, 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode()

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def serialize(self) -> bytes:
        return b""


class SentencePieceTokenizer:
    """A sentencepiece model (Kudo & Richardson 2018, arXiv 1808.06226) with identity normalization."""

    name = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.end_of_text = self._processor.eos_id()
        if self.end_of_text < 0:
            raise ValueError("the sentencepiece model has no end-of-sentence id, which ends each document")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Byte-pair encoding in which every text is representable and decodes to itself.

        Bytes are the fallback, nothing is normalized, and the newline is a token of its own.
        """
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines(keepends=True)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            eos_id=0,
            eos_piece="<|endoftext|>",
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
        return cls(model.getvalue())

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i != self.end_of_text])

    def token_bytes(self) -> np.ndarray:
        p = self._processor
        return np.array(
            [
                1
                if p.is_byte(i)
                else 0
                if p.is_control(i)
                else len(p.id_to_piece(i).replace(SPACE, " ").encode())
                for i in range(self.vocab_size)
            ],
            np.int32,
        )

    def serialize(self) -> bytes:
        return self._model


def load(name: str, path: Path, sha256: str) -> Tokenizer:
    """The tokenizer that a dataset was made with.

    Raises:
        ValueError: the file is not the one whose hash the dataset names, or the kind is unknown.
    """
    content = path.read_bytes()
    if digest(content) != sha256:
        raise ValueError(f"{path} has SHA-256 {digest(content)}, but the dataset was made with {sha256}")
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == SentencePieceTokenizer.name:
        return SentencePieceTokenizer(content)
    raise ValueError(f"{path}: unknown kind of tokenizer {name!r}; there are bytes, sentencepiece")


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
