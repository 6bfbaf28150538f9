"""Chat templates: Jinja programs that write a conversation as one text, as `transformers` runs them.

What the assistant writes in this text is either what the template's `{% generation %}` blocks contain, or, in
a template without these, what a message of the assistant adds to the text before it, after the header that
the template writes to ask for an answer (`add_generation_prompt`).
"""

import functools
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from trainit.config import ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Around what a generation block writes, and taken out again. Unicode keeps them for a program's own use.
BEGIN, END = "\ufdd0", "\ufdd1"
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Written(NamedTuple):
    """A conversation as text, and the parts of it that the assistant writes."""

    text: str
    spans: list[tuple[int, int]]  # characters from, to
    exact: bool  # the template itself marks them; else they may end in white space that follows a turn


def settings(choice: str, tokenizer: str, day: str) -> tuple[str, str]:
    """Returns what decides how conversations are written, as JSON, and where it comes from.

    `choice` is a file, "chatml", or empty: the template in the folder of the tokenizer that a user chose, or
    ChatML if that has none. `day` (2024-07-26) is what the template takes for today. Raises ConfigError if a
    file cannot be read, is no template, or the day is none.
    """
    folder = Path(tokenizer.partition(":")[2]).parent if ":" in tokenizer else None
    about = _read_json(folder / "tokenizer_config.json") if folder else {}
    more = _read_json(folder / "special_tokens_map.json") if folder else {}
    names = {key: _name(about.get(key) or more.get(key)) for key in _SPECIAL}
    try:
        date.fromisoformat(day)
        if choice not in ("", "chatml"):
            source, where = Path(choice).read_text("utf8"), choice
        elif not choice and folder and (own := folder / "chat_template.jinja").exists():
            source, where = own.read_text("utf8"), str(own)
        elif not choice and folder and (source := _default(about.get("chat_template"))):
            where = str(folder / "tokenizer_config.json")
        else:
            source, where = CHATML, "ChatML"
    except OSError as error:
        raise ConfigError(f"the chat template {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"the chat template {choice}, or its date {day!r}: {error}") from None
    chosen = {"template": source, "tokens": {k: v for k, v in names.items() if v}, "date": day}
    text = json.dumps(chosen, ensure_ascii=False, sort_keys=True)
    try:
        of(text)
    except ValueError as error:
        raise ConfigError(f"the chat template of {where}: {error}") from None
    return text, where


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _name(token: Any) -> str:
    """A token as a configuration has it: its name, or an object with it."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _default(templates: Any) -> str:
    """The template that a configuration has, or of several the one that is named so."""
    if isinstance(templates, list):
        return next((one["template"] for one in templates if one["name"] == "default"), "")
    return templates or ""


@functools.lru_cache(4)
def of(text: str) -> "Template":
    """Returns the template of `settings`. Raises ValueError if it is not Jinja's, or Jinja is missing."""
    return Template(**json.loads(text))


class Template:
    """A compiled template, with the names of special tokens, which it may use."""

    def __init__(self, template: str, tokens: dict[str, str], date: str):
        self._tokens, self._date = tokens, date
        self.has_blocks = bool(_BLOCK.search(template))
        try:
            self._template = _environment(date).from_string(template)
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def render(self, messages: Sequence[dict], tools: Any = None, prompt: bool = False) -> str:
        """Returns the text of messages, with BEGIN and END; with `prompt`, an answer is asked for at its end.

        Raises ValueError with what the template says if it cannot write them.
        """
        more = {**self._tokens, "documents": None, "_begin": BEGIN, "_end": END}
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **more)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None

    def write(self, conversation: str) -> Written:
        """Writes a conversation, as JSON of `conversation.checked`.

        Raises ValueError if the template fails, or what the assistant writes cannot be found.
        """
        if BEGIN in conversation or END in conversation:
            raise ValueError("a message has the noncharacter U+FDD0 or U+FDD1, which no text may have")
        about = json.loads(conversation)
        messages, tools = about["messages"], about["tools"]
        whole = self.render(messages, tools)
        if self.has_blocks:
            return Written(*_take_out(whole), exact=True)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], tools, prompt=True)
            after = self.render(messages[: number + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template writes what comes before the end of message {number + 1} in another "
                    f"way than without later messages, so that the assistant's part cannot be found: put "
                    f"{{% generation %}} and {{% endgeneration %}} around it in a template of your own"
                )
            spans.append((len(before), len(after)))
        return Written(whole, spans, exact=False)


def _take_out(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns a text without BEGIN and END, and where what is between them lies in it."""
    parts, spans, begin, size = re.split(f"([{BEGIN}{END}])", marked), [], 0, 0
    for part in parts:
        if part == BEGIN:
            begin = size
        elif part != END:
            size += len(part)
        elif size > begin:
            spans.append((begin, size))
    return "".join(parts[::2]), spans


def _environment(day: str) -> Any:
    """Jinja as `transformers` sets it up. A template sees the same day whenever it runs."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("the package jinja2 is missing: pip install 'trainit[chat]'") from None

    class Generation(Extension):
        """Writes BEGIN and END around the output of a block."""

        tags = {"generation"}  # noqa: RUF012, as Jinja wants it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            begin, end = (
                jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]).set_lineno(line)
                for name in ("_begin", "_end")
            )
            return [begin, *body, end]

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": fail, "strftime_now": date.fromisoformat(day).strftime}
    return made
