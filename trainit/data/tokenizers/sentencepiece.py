"""Text to token ids and back. A tokenizer is stored beside the tokens that it made."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from trainit.data.tokenizers.base import SPACE, SURROGATES, Vocabulary, digest, piece_bytes, to_bytes, to_text
from trainit.data.tokenizers.bpe import Gpt2Tokenizer, HuggingFaceTokenizer

PROBE = f"A  b\n\t ﬁ e\N{COMBINING ACUTE ACCENT} Å\x00 {SPACE} \r\n  <|endoftext|> 😀\ud83d end "

KINDS = "bytes, gpt2, gpt2:FOLDER, sentencepiece:FILE, tokenizers:FILE"


class Tokenizer(Protocol):
    """What the rest of Trainit asks of a tokenizer."""

    name: str  # the kind, by which `load` finds it again
    vocab_size: int  # ids are below it
    end_of_text: int  # the id that stands behind every document

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array of ids a text, without end_of_text. Raises ValueError if one has no ids."""

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
        return [np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return to_text(bytes(i for i in ids if i < 256))

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def serialize(self) -> bytes:
        return b""


class SentencePieceTokenizer(Vocabulary):
    """A sentencepiece model (Kudo & Richardson 2018, arXiv 1808.06226).

    Its character for a space, U+2581, is encoded as bytes where it stands in a text.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        try:
            self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model: {error}") from None
        self.end_of_text = p.eos_id()
        if self.end_of_text < 0:
            raise ValueError("the sentencepiece model has no end-of-sentence id, which ends each document")
        self.table = [piece_bytes(p.id_to_piece(i), p.is_byte(i)) for i in range(p.vocab_size())]
        self.byte_ids = None
        self.prefixed = p.id_to_piece(p.encode("a")[0]).startswith(SPACE)
        if p.is_byte(p.piece_to_id("<0x00>")) and not self.prefixed:
            self.byte_ids = np.array([p.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], np.int32)
            self.by_bytes = SURROGATES + SPACE
        for i in range(p.vocab_size()):
            if p.is_control(i) or p.is_unknown(i):
                self.table[i] = b""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, sample: int = 0) -> "SentencePieceTokenizer":
        """Byte-pair encoding in which every text is representable and decodes to itself.

        Bytes are the fallback, nothing is normalized, and the newline is a token of its own.

        Args:
            texts: to learn from.
            vocab_size: ids, special ones and 256 bytes included.
            sample: so many lines at most are drawn from the texts; 0: all.

        Raises:
            ValueError: what sentencepiece says, as when vocab_size does not fit the texts.
        """
        import sentencepiece

        model = io.BytesIO()
        sampled = {"input_sentence_size": sample, "shuffle_input_sentence": True} if sample else {}
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(
                    line.encode("utf8", "replace")
                    for text in texts
                    for line in text.splitlines(keepends=True)
                ),
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
                **sampled,
            )
        except RuntimeError as error:
            raise ValueError(f"sentencepiece cannot train with vocab_size={vocab_size}: {error}") from None
        return cls(model.getvalue())

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]

    def serialize(self) -> bytes:
        return self._model


def comes_back(tokenizer: Tokenizer) -> bool:
    """Whether an awkward text decodes to itself; a model that normalizes, say, changes it."""
    try:
        return tokenizer.decode(tokenizer.encode([PROBE])[0]) == PROBE
    except ValueError:
        return False


def find(choice: str) -> Tokenizer:
    """The tokenizer that --tokenizer names: one of KINDS.

    Raises:
        ValueError: it cannot be had; the message is one line and says why.
    """
    kind, colon, path = choice.partition(":")
    try:
        if choice == "bytes":
            return ByteTokenizer()
        if kind == "gpt2" and bool(colon) == bool(path):
            return Gpt2Tokenizer.find(Path(path) if path else None)
        if kind in ("sentencepiece", "tokenizers") and path:
            return build(kind, Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"--tokenizer={choice}: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--tokenizer={choice}: {error}") from None
    raise ValueError(f"--tokenizer={choice}: there are {KINDS}")


def build(name: str, content: bytes, end_of_text: int | None = None) -> Tokenizer:
    """A tokenizer of the kind `name` from the content of its file."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == HuggingFaceTokenizer.name:
        return HuggingFaceTokenizer(content, end_of_text)
    kinds = {kind.name: kind for kind in (Gpt2Tokenizer, SentencePieceTokenizer)}
    if name not in kinds:
        there = ", ".join(sorted({*kinds, ByteTokenizer.name, HuggingFaceTokenizer.name}))
        raise ValueError(f"unknown kind of tokenizer {name!r}; there are {there}")
    return kinds[name](content)


def load(name: str, path: Path, sha256: str, end_of_text: int | None = None) -> Tokenizer:
    """The tokenizer that a dataset was made with.

    Raises:
        ValueError: the file is not the one whose hash the dataset names, or the kind is unknown.
    """
    content = path.read_bytes()
    if digest(content) != sha256:
        raise ValueError(f"{path} has SHA-256 {digest(content)}, but the dataset was made with {sha256}")
    return build(name, content, end_of_text)
