"""Texts to ids where the names of special tokens in a text are these tokens, as templates write them."""

import json
import re
from collections.abc import Iterator

import numpy as np

from trainit.tokenizers.base import Tokenizer, to_bytes

Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, and the characters from and to which each one goes


class SpecialEncoder:
    """Encodes texts with a tokenizer and its special tokens. Nothing is added to a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.special: dict[str, int] = {}  # id by name
        if tokenizer.name == "tokenizers":
            import tokenizers as library

            about = json.loads(tokenizer.serialize())
            about["post_processor"] = None  # it would move where tokens begin, and add others
            self._library = library.Tokenizer.from_str(json.dumps(about))
            self._library.no_truncation()
            self._library.no_padding()
            names = [token["content"] for token in about.get("added_tokens") or [] if token["special"]]
            vocabulary = self._library.get_vocab(with_added_tokens=True)
            self.special = {name: vocabulary[name] for name in names}
        elif tokenizer.name == "sentencepiece":
            from sentencepiece import SentencePieceProcessor

            p = SentencePieceProcessor(model_proto=tokenizer.serialize())
            self.special = {p.id_to_piece(i): i for i in range(p.vocab_size()) if p.is_control(i)}
        end = "<|endoftext|>" if tokenizer.name == "bytes" else tokenizer.end_name
        self.special[end] = tokenizer.end_of_text
        longest_first = sorted(self.special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._bytes = tokenizer.token_bytes()

    def __call__(self, text: str) -> Ids:
        """Returns int arrays (n,). Raises ValueError if the text has no ids, or it is lost which is where."""
        if self._tokenizer.name == "tokenizers":
            try:
                encoded = self._library.encode(text, add_special_tokens=False)
            except UnicodeEncodeError:
                raise ValueError("a lone surrogate, which is no character of a text") from None
            ids, places = np.array(encoded.ids, np.int64), np.array(encoded.offsets, np.int64).reshape(-1, 2)
            return ids, places[:, 0], places[:, 1]
        parts = list(self._encode_parts(text))
        ids, begin, end = (np.concatenate([np.empty(0, np.int64), *of]) for of in zip(*parts, strict=True))
        return ids, begin, end

    def _encode_parts(self, text: str) -> Iterator[Ids]:
        at = 0
        for number, part in enumerate(self._split(text)):
            if number % 2:
                yield np.array([self.special[part]]), np.array([at]), np.array([at + len(part)])
            elif part:
                (ids,) = self._tokenizer.encode([part])
                begin, end = self._places(part, self._bytes[ids])
                yield ids.astype(np.int64), begin + at, end + at
            at += len(part)
        yield (np.empty(0, np.int64),) * 3

    def _places(self, text: str, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The characters from and to which tokens of these sizes in bytes go."""
        content = np.frombuffer(to_bytes(text), np.uint8)
        ends = np.cumsum(sizes)
        more = int(ends[-1]) - len(content) if len(ends) else 0  # a space that is put before texts
        if more not in (0, 1):
            raise ValueError(
                "the tokenizer changes the text, so that it is not known which tokens are the assistant's; "
                "take one with a tokenizer.json"
            )
        character = np.append(np.cumsum((content & 0xC0) != 0x80) - 1, len(text))
        begin = character[np.maximum(ends - sizes - more, 0)]
        return begin, character[np.maximum(ends - more - 1, 0)] + (ends > more)
