"""What a tokenizer loses of a text, for a warning at the start. A space before a text is no loss."""

import re
from unicodedata import normalize

from trainit.tokenizers.base import SURROGATES, Tokenizer

PROBES = ["\n", "\r\n", "  ", "\t", "\n  ", "A", "é", "ﬁ", "①", "\u212b", "ж", "汉", "😀", "\x00"]
_UNIT = re.compile(rf"\s+|[^\s{SURROGATES}][\u0300-\u036f]*")


def describe(tokenizer: Tokenizer) -> str:
    """Returns on one line each kind of loss, with an example of `tokenizer.examples` or a probe, or ""."""
    # Each unit is tried alone between characters that come back, and at an end if its text has it there.
    plain = next((c for c in "a0汉" if _back(tokenizer, c + c) == c + c), "")
    own: dict[str, tuple[int, int, str]] = {}
    for text in tokenizer.examples:
        for unit in _UNIT.finditer(text):
            tried = plain * (unit.start() > 0) + unit[0] + plain * (unit.end() < len(text))
            own.setdefault(tried, (*unit.span(), text))
    lost: dict[str, str] = {}
    for tried in (*own, *(plain + probe + plain for probe in PROBES), plain + " "):
        kind = _kind(tried, _back(tokenizer, tried), plain)
        if kind and kind not in lost:
            lost[kind] = _example(tokenizer, *own.get(tried, (0, len(tried), tried)))
    for text in () if lost else tokenizer.examples:  # such as words that are too long for it
        back = _back(tokenizer, text)
        for at in [i for i, c in enumerate(text) if c != back[i : i + 1]][:1]:
            lost["parts of a text"] = _example(tokenizer, at, at + 99, text)
    kinds = "; ".join(f"{kind}, as {example}" for kind, example in lost.items())
    return kinds and (
        f"texts do not come back: the tokenizer loses {kinds}. These lose nothing: sentencepiece with "
        "normalization_rule_name=identity, byte_fallback=true and remove_extra_whitespaces=false, what "
        "trainit prepare --train_tokenizer makes, gpt2, bytes"
    )


def _back(tokenizer: Tokenizer, text: str) -> str:
    try:
        back = tokenizer.decode(tokenizer.encode([text])[0])
    except ValueError:  # it has no ids, and is refused where it comes up
        return text
    return text if back == text + " " else back  # some put their space after a text


def _kind(text: str, back: str, plain: str) -> str:
    """What is lost of a unit between plain characters; empty: nothing."""
    rest = "".join(back.split())
    kinds = {
        "": back == text,
        "line ends": any(text.count(end) != back.count(end) for end in "\r\n"),
        "spaces": rest == "".join(text.split()),
        "capitals": back == text.lower(),
        "characters without an id": rest in ("", plain, 2 * plain),
    }
    return next((kind for kind, holds in kinds.items() if holds), "characters that it takes for others")


def _example(tokenizer: Tokenizer, begin: int, end: int, text: str) -> str:
    """A place in a text, and how it comes back."""
    part = text[max(begin - 12, 0) : begin].lstrip() + text[begin:end] + text[end : end + 12].rstrip()
    back = _back(tokenizer, part)
    write = ascii if normalize("NFC", part) == normalize("NFC", back) else repr
    return f"{write(part)} → {write(back)}"
