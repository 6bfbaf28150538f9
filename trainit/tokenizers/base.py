"""What a tokenizer is, and what tokenizers share: the way from a text to ids, and from ids to bytes.

Ids decode to the text that they were made from. Long texts are encoded in pieces. Characters that a
vocabulary cannot encode as text are encoded byte by byte, for example lone surrogates, which JSON can express
and UTF-8 cannot; these are the three bytes that UTF-8's scheme would give them ("surrogatepass").
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece writes a space as this character
SURROGATES = "\ud800-\udfff"
PIECE = 1 << 18  # characters encoded at once
# No token of GPT-2's pattern, or of its successors', reaches from such a character over the space or the
# end of line after it, and no piece of a sentencepiece model has a space inside: encoding that is cut
# there gives the same ids.
_BOUNDARIES = re.compile(r"\S(?= )"), re.compile(r"\S(?=\n)")


class Tokenizer(Protocol):
    """What the rest of Trainit asks of a tokenizer."""

    name: str  # the kind, by which `load` finds it again
    end_of_text: int  # the id that follows every document
    end_name: str  # its token

    @property
    def vocab_size(self) -> int:
        """The number of ids, which are all below it."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array of ids a text, without end_of_text. Raises ValueError if one has no ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; end_of_text becomes nothing."""

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the UTF-8 bytes that each id stands for, 0 for end_of_text."""

    def serialize(self) -> bytes:
        """The content of the tokenizer's file."""


def boundary(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends, in a text that has more than PIECE characters left.

    It is the last place within PIECE characters that no token reaches over. In a run of 262,144 characters
    without a space there is none: the piece is cut all the same, and up to two tokens there may differ.
    """
    end = start + PIECE
    for pattern in _BOUNDARIES:
        for begin in (end - 4096, start):  # nearly always the end of the piece has one
            if ends := [match.end() for match in pattern.finditer(text, begin, end + 1)]:
                return ends[-1]
    return end


def pieces(text: str) -> Iterator[str]:
    """Cuts a text so that its encoding takes bounded memory and time; most texts are one piece."""
    start = 0
    while len(text) - start > PIECE:
        stop = boundary(text, start)
        yield text[start:stop]
        start = stop
    yield text[start:]


def to_bytes(text: str) -> bytes:
    """UTF-8, and lone surrogates in three bytes each, so that every string has its own bytes."""
    return text.encode("utf8", "surrogatepass")


class Vocabulary:
    """What tokenizers share whose ids each stand for certain bytes.

    Subclasses set `table` (the bytes of each id), `byte_ids` (the id of each byte, -1 if it has none),
    `end_of_text` and `_content` (of their file), and encode pieces in `_encode_pieces`. The ids in `names`
    stand for no text: if a library reads a name in a text as such an id, it is encoded byte by byte.
    """

    table: list[bytes]
    byte_ids: np.ndarray
    names: dict[int, bytes]
    end_of_text: int
    end_name: str
    _content: bytes
    prefixed = False  # a space is put before every text
    by_bytes = SURROGATES  # characters, as in a regular expression, that are encoded as bytes

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Raises ValueError for a lone surrogate, if the vocabulary has no single bytes."""
        parts = [
            [part for i, piece in enumerate(pieces(text)) for part in self._parts(piece, i)] for text in texts
        ]
        texts = [part for of in parts for part in of if isinstance(part, str)]
        encoded = map(self._spell, texts, self._encode_pieces(texts))
        result = []
        for of_text in parts:
            ids = [self._byte_ids(part) if isinstance(part, bytes) else next(encoded) for part in of_text]
            result.append(ids[0] if len(ids) == 1 else np.concatenate(ids))
        return result

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _parts(self, piece: str, number: int) -> list[str | bytes]:
        if self.prefixed and number and piece[0] == " ":
            piece = piece[1:]
        if piece.isascii() or not self._has_exotic(piece):
            return [piece]
        parts = re.split(f"([{self.by_bytes}]+)", piece)
        return [to_bytes(part) if i % 2 else part for i, part in enumerate(parts) if part]

    def _has_exotic(self, piece: str) -> bool:
        try:  # faster than to search for them
            piece.encode()
        except UnicodeEncodeError:
            return True
        return self.by_bytes is not SURROGATES and SPACE in piece

    def _byte_ids(self, part: bytes) -> np.ndarray:
        ids = self.byte_ids[np.frombuffer(part, np.uint8)]
        if self.prefixed or (ids < 0).any():
            raise ValueError("a lone surrogate, for which this tokenizer has no ids")
        return ids

    def _literal(self, text: str, ids: np.ndarray) -> dict[int, bytes]:
        """Returns which of the ids of a text come of a literal name in it, and that name."""
        found = np.flatnonzero(np.isin(ids, list(self.names)))
        return {at: self.names[ids[at]] for at in found.tolist()}

    def _spell(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Returns the ids of a text, with the bytes of a name in place of what it names."""
        parts, begin = [], 0
        for at, name in sorted(self._literal(text, ids).items()):
            parts += [ids[begin:at], self.byte_ids[list(name)]]
            if (parts[-1] < 0).any():
                raise ValueError(
                    f"{name.decode()!r}, a control token that this tokenizer cannot spell as text"
                )
            begin = at + 1
        return np.concatenate([*parts, ids[begin:]]) if parts else ids

    def decode(self, ids: Iterable[int]) -> str:
        text = to_text(b"".join([self.table[i] for i in ids]))
        return text.removeprefix(" ") if self.prefixed else text

    def token_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self.table], np.int32)

    def serialize(self) -> bytes:
        return self._content


def to_text(content: bytes) -> str:
    """What `to_bytes` made bytes of."""
    try:
        return content.decode("utf8", "surrogatepass")
    except UnicodeDecodeError:  # of ids that were not made from a text, such as a model's
        return content.decode("utf8", "replace")


def piece_bytes(piece: str, is_byte: bool) -> bytes:
    """What a piece stands for in sentencepiece's way of writing: <0x0A> for a byte, U+2581 for a space."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class ByteTokenizer:
    """Each UTF-8 byte is a token; 256 ends a text. It has no file."""

    name, end_of_text, end_name, vocab_size = "bytes", 256, "256", 257

    def __init__(self, content: bytes = b"", end_of_text: int | str | None = None):
        """Takes what all tokenizers are built from, and needs none of it."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return to_text(bytes(i for i in ids if i < 256))

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def serialize(self) -> bytes:
        return b""
