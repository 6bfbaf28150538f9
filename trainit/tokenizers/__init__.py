"""Text to token ids and back. A dataset keeps the file of the tokenizer that made its tokens."""

from pathlib import Path

from trainit.config import require
from trainit.config.fields import TOKENIZERS as KINDS
from trainit.tokenizers import losses as losses
from trainit.tokenizers.base import ByteTokenizer, Tokenizer, digest
from trainit.tokenizers.bpe import Gpt2Tokenizer, HuggingFaceTokenizer, declared_end
from trainit.tokenizers.sentencepiece import SentencePieceTokenizer

_PROBE = "Some  words\n\tof 3.14 and naïve Größe, 汉字 и текст: f(x) == y[0]; don't\r\n"
CLASSES = ByteTokenizer, Gpt2Tokenizer, SentencePieceTokenizer, HuggingFaceTokenizer


def find(choice: str, option: str = "dataset.tokenizer", end_of_text: str = "") -> Tokenizer:
    """Returns the tokenizer that a user chose with an option, one of KINDS.

    `end_of_text` names the token that ends a text; empty: the one that the tokenizer's files name.
    Raises ValueError, with one line that says why, if it cannot be had.
    """
    kind, colon, path = choice.partition(":")
    try:
        if choice == "bytes" or (kind == "gpt2" and bool(colon) == bool(path)):
            own = Gpt2Tokenizer.find(Path(path) if path else None) if kind == "gpt2" else ByteTokenizer()
            if end_of_text not in ("", own.end_name):
                raise ValueError(
                    f"{option.replace('tokenizer', 'end_of_text')}={end_of_text!r}: it has {own.end_name}"
                )
            return own
        if kind in ("sentencepiece", "tokenizers") and path:
            declared = declared_end(Path(path).parent) if kind == "tokenizers" and not end_of_text else None
            return build(kind, Path(path).read_bytes(), end_of_text or declared)
    except OSError as error:
        raise ValueError(f"{option}={choice}: {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{option}={choice}: {error}") from None
    raise ValueError(f"{option}={choice}: there are {KINDS}")


def build(name: str, content: bytes, end_of_text: int | str | None = None) -> Tokenizer:
    """Returns a tokenizer from its `name` and what its `serialize` returned.

    The end of text, an id or a token, counts where the file leaves a choice; None: the one that is known.
    Raises ValueError if the kind is unknown, the content is not of this kind, or there is no such token.
    """
    kinds = {kind.name: kind for kind in CLASSES}
    if name not in kinds:
        raise ValueError(f"unknown kind of tokenizer {name!r}; there are {', '.join(kinds)}")
    return kinds[name](content, end_of_text)


def load(name: str, path: Path, sha256: str, end_of_text: int | None = None) -> Tokenizer:
    """Returns the tokenizer that a dataset was made with; arguments as those of `build`.

    Raises ValueError if the file has not the hash that the dataset names, or the kind is unknown.
    """
    content = path.read_bytes()
    if digest(content) != sha256:
        raise ValueError(f"{path} has SHA-256 {digest(content)}, but the dataset was made with {sha256}")
    return build(name, content, end_of_text)


def check_same(given: Tokenizer, own: Tokenizer, of: str) -> None:
    """Raises ConfigError if a text gets other ids from a given tokenizer than from that of a model."""
    ours, theirs = given.encode([_PROBE])[0].tolist(), own.encode([_PROBE])[0].tolist()
    require(
        ours == theirs,
        f"the data's tokenizer ({describe(given)}) gives a text other ids than that of {of} "
        f"({describe(own)}): {ours[:8]}..., not {theirs[:8]}...; prepare the data with that one",
    )


def describe(tokenizer: Tokenizer, name: str = "") -> str:
    """Returns what a tokenizer is, on one line, by a name or its kind."""
    return f"{name or tokenizer.name}, vocabulary {tokenizer.vocab_size}, end of text {tokenizer.end_name}"
