"""Prompts from files, and texts as they grow."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from trainit.config import ConfigError, require
from trainit.generate.decoder import Decoder
from trainit.generate.sampling import Sampling
from trainit.tokenizers import Tokenizer

UNREADABLE = (
    "\N{REPLACEMENT CHARACTER}"  # that stands for bytes which are no character, or not a whole one yet
)
STEPS = 32  # tokens of each row between two looks at them
GREEDY = Sampling()


def read_prompts(lines: Iterable[str], name: str) -> list[str]:
    """The prompts of a file, one a line; objects of NAME.jsonl have theirs as "prompt" or "text"."""
    lines = [line.rstrip("\r\n") for line in lines]
    if not name.endswith(".jsonl"):
        return [line for line in lines if line]
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name}, line {number} is no JSON: {error}") from None
        found = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
        require(isinstance(found, str), f"{name}, line {number} has no text named prompt or text")
        prompts.append(str(found))
    return prompts


def read_file(path: str) -> list[str]:
    """The prompts of a file. Raises ConfigError if it cannot be read or has none."""
    try:
        with Path(path).open(encoding="utf8", newline="\n") as file:
            prompts = read_prompts(file, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"--prompts={path}: {reason}") from None
    require(bool(prompts), f"--prompts={path} has no prompt")
    return prompts


def encode(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """A prompt's ids; an empty one is end_of_text, after which a text begins.

    Raises ConfigError if it has what the tokenizer cannot encode.
    """
    try:
        return tokenizer.encode([prompt])[0] if prompt else np.array([tokenizer.end_of_text], np.int32)
    except ValueError as error:
        raise ConfigError(f"the prompt {prompt[:40]!r} has {error}") from None


def encode_with_room(tokenizer: Tokenizer, prompt: str, context_length: int) -> np.ndarray:
    """As `encode`. Raises ConfigError unless there is room for a token after the prompt."""
    ids = encode(tokenizer, prompt)
    require(
        len(ids) < context_length,
        f"the prompt {prompt[:40]!r} has {len(ids)} tokens, and the model's context is of {context_length}, "
        f"prompt and text together; shorten it",
    )
    return ids


class Text:
    """What follows a prompt, as it grows token by token."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: np.ndarray, length: int, context: int, stops: Sequence[str]
    ):
        """A text has at most `length` tokens, with its prompt `context`, and ends before one of `stops`."""
        self.ids: list[int] = []
        self.ended = ""  # by what: "end_of_text", "stop", "length" or "context"; empty: it has not
        self.text = ""  # what is sure of it
        self._tokenizer, self._prompt, self._length, self._stops = tokenizer, prompt.tolist(), length, stops
        self._begin, self._room = len(tokenizer.decode(self._prompt)), context - len(prompt)

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns what of the text has become sure: it is never taken back.

        What may be a part of a character, or the beginning of a stop, is not sure.
        """
        for token in ids:
            if token >= 0 and not self.ended:
                self.ids.append(int(token))
                if token == self._tokenizer.end_of_text:
                    self.ended = "end_of_text"
                elif len(self.ids) == min(self._length, self._room):
                    self.ended = "length" if self._length <= self._room else "context"
        # Decoded together, since a space between two tokens may belong to neither.
        text = self._tokenizer.decode([*self._prompt, *self.ids])[self._begin :]
        if found := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            text, self.ended = text[: min(found)], "stop"
        if not self.ended:
            text = text.rstrip(UNREADABLE)
            parts = (stop[:size] for stop in self._stops for size in range(len(stop), 0, -1))
            text = text[: len(text) - max((len(part) for part in parts if text.endswith(part)), default=0)]
        more, self.text = text[len(self.text) :], max(text, self.text, key=len)
        return more

    def facts(self) -> dict:
        """What a JSON object says of the text."""
        return {"text": self.text, "tokens": len(self.ids), "ended": self.ended}


def write(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[tuple[np.ndarray, int]],
    length: int,
    stops: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    steps: int = STEPS,
    show: Callable[[str], None] | None = None,
) -> list[Text]:
    """The texts of rows, each a prompt's ids and which of this prompt's texts it is.

    They are looked at after every `steps` tokens, and are done when all have ended. `show` is called with
    each part of the first text as soon as it is sure.
    """
    texts = [Text(tokenizer, ids, length, decoder.config.context_length, stops) for ids, _ in rows]
    for tokens in decoder.generate(rows, length, sampling, seed, steps):
        for row, text in enumerate(texts):
            more = "" if text.ended else text.add(tokens[:, row])
            if show and row == 0 and more:
                show(more)
        if all(text.ended for text in texts):
            break
    return texts
