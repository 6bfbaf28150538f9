"""Questions with choices, from files in the JSON forms of well-known tasks, or in one's own.

One object a line (or one list of them). Which form a file has is seen by its keys; the texts that a model is
given are those of EleutherAI's lm-evaluation-harness:

    context, choices, answer     one's own: the answer is a number from 0, the choices continue the context
    ctx_a, ctx_b, endings, ...   HellaSwag (Zellers et al. 2019, arXiv 1905.07830)
    question, choices, answerKey ARC (Clark et al. 2018, arXiv 1803.05457), in either of its forms
    goal, sol1, sol2, label      PIQA (Bisk et al. 2020, arXiv 1911.11641)
    text                         LAMBADA (Paperno et al. 2016, arXiv 1606.06031): its last word is asked for
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainit.config import ConfigError, require


@dataclass(frozen=True)
class Question:
    """A text and its possible continuations."""

    context: str
    choices: tuple[str, ...]  # one alone: it is answered if each of its tokens is the most likely one
    answer: int  # from 0


@dataclass(frozen=True)
class Task:
    """The questions of one file."""

    name: str
    questions: tuple[Question, ...]


def read(given: str) -> Task:
    """The task of "FILE" or "NAME=FILE"; its name is else the file's. Raises ConfigError for a bad file."""
    name, equals, file = given.partition("=")
    path = Path(file if equals else given)
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"eval.tasks={given}: {getattr(error, 'strerror', None) or error}") from None
    questions = []
    for where, item in _items(text, path):
        try:
            question = _question(item)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{where}: no question of a known form: {error!r}") from None
        count = len(question.choices)
        require(
            0 <= question.answer < count and all(question.choices),
            f"{where}: answer {question.answer} of {count} choices, none of which may be empty",
        )
        questions.append(question)
    require(bool(questions), f"{path} has no questions")
    return Task(name if equals else path.stem, tuple(questions))


def _items(text: str, path: Path) -> list[tuple[str, Any]]:
    """The objects of a file, each with the place where it stands."""
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}: item {i}", item) for i, item in enumerate(json.loads(text), start=1)]
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"{path}: line {number}", json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{path}: line {number}: {error}") from None
    return found


def _question(item: Mapping[str, Any]) -> Question:
    if "endings" in item:
        both = item["ctx_a"] + " " + item["ctx_b"].capitalize() if "ctx_a" in item else item["ctx"]
        context = _clean(f"{item['activity_label']}: {both}" if "activity_label" in item else both)
        return Question(context, tuple(f" {_clean(text)}" for text in item["endings"]), int(item["label"]))
    if "goal" in item:
        choices = f" {item['sol1']}", f" {item['sol2']}"
        return Question(f"Question: {item['goal']}\nAnswer:", choices, int(item["label"]))
    if "answerKey" in item:
        asked = item["question"]
        if isinstance(asked, Mapping):  # as the authors spread it
            text, texts = asked["stem"], [choice["text"] for choice in asked["choices"]]
            labels = [choice["label"] for choice in asked["choices"]]
        else:
            text, texts, labels = asked, item["choices"]["text"], item["choices"]["label"]
        answer = list(labels).index(item["answerKey"])
        return Question(f"Question: {text}\nAnswer:", tuple(f" {choice}" for choice in texts), answer)
    if "choices" in item:
        return Question(str(item["context"]), tuple(item["choices"]), int(item["answer"]))
    context, _, word = item["text"].rpartition(" ")
    return Question(context, (f" {word}",), 0)


def _clean(text: str) -> str:
    """HellaSwag's texts, without what is left of the pages that they are from."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
