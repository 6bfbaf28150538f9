"""What a tokenizer is, and what tokenizers share: the way from a text to ids, and from ids to bytes.

Ids decode to the text that they were made from. A text is encoded at once, or a very long one in pieces, cut
where that gives the same ids. Characters that a vocabulary cannot encode as text are encoded byte by byte,
for example lone surrogates, which JSON can express and UTF-8 cannot; these are the three bytes that UTF-8's
scheme would give them ("surrogatepass").
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import numpy as np

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece writes a space as this character
SURROGATES = "\ud800-\udfff"
PIECE = 1 << 20  # characters encoded at once: libraries take up to 350 bytes of memory for each
CONTEXT = 1024  # characters on each side of a cut that are looked at
SHIFTS = 17  # lengths of either side that are tried: in a run, as of "=", tokens are counted from its begin
_LIKELY = [re.compile(place) for place in (r"\S(?= \S)", r"\S(?=\n)", r"\n(?=\S)")]  # where to cut
Cut = Callable[[str, int], int]  # of a text and a place in it
_LEAD = "\n"  # before a text that is not the beginning of one, if a space is put before beginnings


class Tokenizer(Protocol):
    """What the rest of Trainit asks of a tokenizer."""

    name: str  # the kind, by which `load` finds it again
    end_of_text: int  # the id that follows every document
    end_name: str  # its token
    examples: Sequence[str]  # texts of the user's, by which `losses` shows what does not come back

    @property
    def vocab_size(self) -> int:
        """The number of ids, which are all below it."""

    def encode(self, texts: list[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        """One int32 array of ids a text, without end_of_text. Raises ValueError if one has no ids.

        `continued` says which texts continue another after a `cut`; empty: none.
        """

    def cut(self, text: str, at: int) -> int:
        """Where, at `at` or shortly before, a text may be cut and encoded in two; 0: nowhere."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; end_of_text becomes nothing."""

    def token_bytes(self) -> np.ndarray:
        """int32 (vocab_size,): the UTF-8 bytes that each id stands for, 0 for end_of_text."""

    def serialize(self) -> bytes:
        """The content of the tokenizer's file."""


def pieces(chunks: Iterable[str], cut: Cut) -> Iterator[tuple[str, bool]]:
    """Yields pieces of a text that comes in chunks, and whether each is the last.

    They have about PIECE characters, or more where `cut` finds no place: a text that cannot be cut is one
    piece, whatever memory and time its encoding takes.
    """
    text, size = "", PIECE
    for chunk in chunks:
        text += chunk
        while len(text) >= size + CONTEXT:
            if stop := cut(text, size):
                yield text[:stop], False
                text, size = text[stop:], PIECE
            else:
                size += PIECE
    yield text, True


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
    examples: Sequence[str] = ()
    prefixed = False  # a space is put before every text
    is_unigram = False  # pieces are chosen by the sum of their scores
    by_bytes = SURROGATES  # characters, as in a regular expression, that are encoded as bytes

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def encode(self, texts: list[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        """Raises ValueError for a lone surrogate, if the vocabulary has no single bytes."""
        cuts = [[piece for piece, _ in pieces([text], self.cut)] for text in texts]
        begun = continued or [False] * len(texts)
        follows = [begun[i] or number > 0 for i, of in enumerate(cuts) for number in range(len(of))]
        ids = iter(self._encode_whole(list(chain(*cuts)), follows))
        return [next(ids) if len(of) == 1 else np.concatenate([next(ids) for _ in of]) for of in cuts]

    def _encode_whole(self, texts: list[str], follows: list[bool]) -> list[np.ndarray]:
        """Returns the ids of texts as they are, some of which follow another."""
        skip = 0
        if self.prefixed and any(follows):
            skip = len(self._encode_whole([_LEAD], [False])[0])
            texts = [_LEAD + text if after else text for text, after in zip(texts, follows, strict=True)]
        parts = [self._parts(text) for text in texts]
        strings = [part for of in parts for part in of if isinstance(part, str)]
        encoded = map(self._spell, strings, self._encode_pieces(strings))
        result = []
        for of, after in zip(parts, follows, strict=True):
            ids = [self._byte_ids(part) if isinstance(part, bytes) else next(encoded) for part in of]
            result.append((ids[0] if len(ids) == 1 else np.concatenate(ids))[skip * after :])
        return result

    def cut(self, text: str, at: int) -> int:
        """Takes the first of likely places, else of others, around which parts have the ids of the whole.

        A unigram model adds scores in floating point: its choice among pieces that are about as likely hangs
        on all of the text before them, so that no place will do.
        """
        if self.is_unigram:
            return 0
        begin = max(at - 4096, 1)
        likely = ([match.end() for match in place.finditer(text, begin, at + 1)][-4:] for place in _LIKELY)
        anywhere = range(max(at - 16, 1), at)
        return next((i for i in chain(*map(reversed, (*likely, anywhere))) if self._parts_at(text, i)), 0)

    def _parts_at(self, text: str, at: int) -> bool:
        """Whether what is around a place has the same ids in two parts as in one, whatever its length."""
        for i in range(min(at, SHIFTS)):
            left, right = text[max(at - CONTEXT, 0) + i : at], text[at : at + CONTEXT - i]
            try:
                *parts, both = self._encode_whole([left, right, left + right], [False, True, False])
            except ValueError:
                return False  # one of them has no ids
            if not np.array_equal(np.concatenate(parts), both):
                return False
        return True

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _parts(self, piece: str) -> list[str | bytes]:
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
    examples: Sequence[str] = ()

    def __init__(self, content: bytes = b"", end_of_text: int | str | None = None):
        """Takes what all tokenizers are built from, and needs none of it."""

    def encode(self, texts: list[str], continued: Sequence[bool] = ()) -> list[np.ndarray]:
        return [np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) for text in texts]

    @staticmethod
    def cut(text: str, at: int) -> int:
        return at

    def decode(self, ids: Iterable[int]) -> str:
        return to_text(bytes(i for i in ids if i < 256))

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def serialize(self) -> bytes:
        return b""
