"""Texts as they grow: whole characters, stops, prompts of files."""

import numpy as np
import pytest

from trainit.config import ConfigError
from trainit.generate import texts
from trainit.tokenizers import ByteTokenizer, SentencePieceTokenizer

SAMPLE = "Ελληνικά, 汉字 and 👍🏽 — don't stop.\n"


def grown(text: texts.Text, ids, size: int) -> list[str]:
    return [text.add(ids[at : at + size]) for at in range(0, len(ids), size)]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_only_whole_characters_are_sure(size):
    tokenizer = ByteTokenizer()
    prompt, ids = tokenizer.encode(["ab", SAMPLE])
    text = texts.Text(tokenizer, prompt, 1000, 9999, [])
    parts = grown(text, ids, size)
    assert "".join(parts) == text.text == SAMPLE
    assert text.ended == ""
    if size == 1:
        assert parts[:4] == ["", "Ε", "", "λ"]


def test_broken_characters_are_shown_at_the_end():
    text = texts.Text(ByteTokenizer(), np.array([97]), 3, 9, [])
    assert [text.add([206]), text.add([98]), text.add([206])] == ["", "\ufffdb", "\ufffd"]
    assert text.ended == "length"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_ends_before_a_stop(size):
    tokenizer = ByteTokenizer()
    [ids] = tokenizer.encode([SAMPLE])
    text = texts.Text(tokenizer, np.array([97]), 1000, 9999, ["don'x", "n't st", "."])
    assert "".join(grown(text, ids, size)) == text.text == SAMPLE.partition("n't st")[0]
    assert text.ended == "stop"


def test_end_of_text_ends_it():
    text = texts.Text(ByteTokenizer(), np.array([97]), 1000, 9999, ["bcd"])
    assert text.add([98, 99, 256, 100]) == "bc"
    assert (text.ended, text.ids) == ("end_of_text", [98, 99, 256])


def test_a_space_that_a_tokenizer_takes_off_the_beginning():
    """Pieces carry the space before a word: after a prompt it stays."""
    tokenizer = SentencePieceTokenizer.train(["some words and some more words"] * 20, 300)
    prompt, ids = tokenizer.encode(["some", " words and"])
    text = texts.Text(tokenizer, prompt, 1000, 9999, [])
    assert "".join(grown(text, ids, 1)) == " words and"


def test_prompts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \r\n", newline="")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\nb", "x": 1}\n\n{"text": ""}\n"c"\n')
    assert texts.read_file(str(tmp_path / "a.txt")) == ["one", " two "]
    assert texts.read_file(str(tmp_path / "a.jsonl")) == ["a\nb", "", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prom', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a\.jsonl, line 1 has no text named prompt or text"),
        ("a.txt", b"\n\n", "has no prompt"),
        ("a.txt", b"\xff\n", "it is no UTF-8 text"),
        ("", b"", "directory"),
    ],
)
def test_prompts_that_cannot_be_read(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        texts.read_file(str(tmp_path / name))
