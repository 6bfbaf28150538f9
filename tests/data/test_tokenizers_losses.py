"""A tokenizer that does not give texts back is warned of at each start, by what it loses."""

import json

import numpy as np
import pytest
from processes import ROOT, TWO, run_imported
from tokenizers import normalizers, pre_tokenizers
from vocabularies import EXACT, KINDS, piece_model, with_bytes

from trainit import tokenizers
from trainit.__main__ import main as trainit_command
from trainit.tokenizers import losses

LOSSES = (
    "line ends",
    "spaces",
    "capitals",
    "characters without an id",
    "characters that it takes for others",
)


def normalizing(*normalize):
    return lambda: with_bytes(normalize=normalize)


# How each kind of loss comes about, and what is named for it.
LOSSY = {
    "NFKC": ("tokenizers", normalizing(normalizers.NFKC()), {LOSSES[4]: "'aﬁa' → 'afia'"}),
    "accents": (
        "tokenizers",
        normalizing(normalizers.NFD(), normalizers.StripAccents()),
        {LOSSES[4]: "'aéa' → 'aea'"},
    ),
    "lower": ("tokenizers", normalizing(normalizers.Lowercase()), {LOSSES[2]: "'aAa' → 'aaa'"}),
    "strip": ("tokenizers", normalizing(normalizers.Strip()), {LOSSES[1]: "'a ' → 'a'"}),
    "tabs": ("tokenizers", normalizing(normalizers.Replace("\t", " ")), {LOSSES[1]: r"'a\ta' → 'a a'"}),
    "runs": (
        "sentencepiece",
        lambda: piece_model(normalization_rule_name="identity"),
        {LOSSES[1]: "'a  a' → 'a a'"},
    ),
    "line ends": (
        "tokenizers",
        normalizing(normalizers.Replace("\n", " ")),
        {LOSSES[0]: r"'a\na' → 'a a'"},
    ),
    "windows": (
        "tokenizers",
        normalizing(normalizers.Replace("\r\n", "\n")),
        {LOSSES[0]: r"'a\r\na' → 'a\na'"},
    ),
    "no bytes": (
        "sentencepiece",
        lambda: piece_model(byte_fallback=False, **EXACT),
        {LOSSES[3]: "'aﬁa' → 'aa'", LOSSES[0]: r"'a\na' → 'aa'", LOSSES[1]: r"'a\ta' → 'aa'"},
    ),
    "default": (
        "sentencepiece",
        piece_model,
        {LOSSES[0]: r"'a\na' → 'a a'", LOSSES[1]: "'a  a' → 'a a'", LOSSES[4]: "'aﬁa' → 'afia'"},
    ),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_each_kind_of_loss_is_named(kind):
    """And no other is."""
    name, make, expected = LOSSY[kind]
    text = losses.describe(tokenizers.build(name, make()))
    assert {loss for loss in LOSSES if f"{loss}, as" in text} == set(expected)
    for loss, example in expected.items():
        if example:
            assert f"{loss}, as {example}" in text
    assert "byte_fallback=true" in text
    assert "\n" not in text


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_who_loses_nothing_is_silent(kind):
    """Also with a prefix space; the others, of these that normalize or lack bytes, are not."""
    lossy = {"tokenizers NFKC", "sentencepiece", "sentencepiece no bytes", "sentencepiece suffix"}
    content = KINDS[kind]() if kind in KINDS else b""
    tokenizer = tokenizers.build(kind.split()[0], content)
    tokenizer.examples = ["ﬁrst  of\r\nall\n", "汉字\t文本 <|endoftext|>", "e\u0301 Å \ud83d", ""]
    assert bool(losses.describe(tokenizer)) == (kind in lossy or kind == "sentencepiece unigram")


def test_examples_are_of_the_users_text():
    """Each loss is shown where it first occurs in it, and by a probe only if it does not."""
    tokenizer = tokenizers.build("sentencepiece", piece_model())
    tokenizer.examples = ["nothing odd", "one ﬁnal line", "two  spaces", " a space first"]
    text = losses.describe(tokenizer)
    assert "'one ﬁnal line' → 'one final line'" in text
    assert "'two  spaces' → 'two spaces'" in text
    assert r"line ends, as 'a\na' → 'a a'" in text


def test_the_first_space_is_asked_of_the_users_text_alone():
    """Of a tokenizer that puts a space only where there is none."""
    tokenizer = tokenizers.build("tokenizers", with_bytes(pre_tokenizer=pre_tokenizers.Metaspace()))
    assert losses.describe(tokenizer) == ""
    tokenizer.examples = [" some text"]
    assert "spaces, as ' some text' → 'some text'" in losses.describe(tokenizer)


def test_words_that_are_too_long_are_found_in_texts():
    """WordPiece has no ids for them, and spells its unknown token."""
    content = json.loads(KINDS["tokenizers GPT-2"]())
    vocabulary = {**content["model"]["vocab"], "<unk>": len(content["model"]["vocab"])}
    content["model"] = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "<unk>"}
    content["model"] |= {"continuing_subword_prefix": "", "max_input_chars_per_word": 20}
    tokenizer = tokenizers.build("tokenizers", json.dumps(content).encode())
    assert losses.describe(tokenizer) == ""
    tokenizer.examples = ["short", f"a {'long' * 9} word"]
    assert "parts of a text, as 'a longlong" in losses.describe(tokenizer)


def write(folder, name: str, count: int) -> str:
    rows = [json.dumps({"text": f"The ﬁrst line is {i}.\nThe last."}) + "\n" for i in range(count)]
    (folder / name).write_text("".join(rows))
    return str(folder / name)


def test_each_start_warns(tmp_path, capfd):
    """Preparing; and training on what was prepared, on JSON lines, on tokens of others."""
    (tmp_path / "m.model").write_bytes(piece_model(byte_fallback=False))
    train, validation = write(tmp_path, "train.jsonl", 200), write(tmp_path, "val.jsonl", 200)
    choice = f"sentencepiece:{tmp_path}/m.model"
    flags = [f"--input={train}", f"--validation={validation}", f"--tokenizer={choice}", "--workers=1"]
    assert not trainit_command(["prepare", *flags, f"--output={tmp_path}/data"])
    said, own = "texts do not come back", "'The ﬁrst line is' → 'The first line is'"
    probes = r"the tokenizer loses line ends, as 'a\na' → 'a a'; spaces, as 'a  a' → 'a a'"
    output = capfd.readouterr().err
    assert output.count(said) == 1
    assert own in output
    (tmp_path / "theirs").mkdir()
    for name in ("train", "val"):
        (np.arange(9000) % 500).astype("<u2").tofile(tmp_path / "theirs" / f"{name}.bin")
    tiny = f"--config={ROOT}/tests/tiny.py", *TWO, "--config.steps=1", "--config.eval.sequences=8"
    ways = {
        "prepared": [f"--config.dataset.path={tmp_path}/data"],
        "theirs": [f"--config.dataset.path={tmp_path}/theirs", f"--config.dataset.tokenizer={choice}"],
        "jsonl": [
            f"--config={ROOT}/tests/tiny.py:dataset=jsonl",
            f"--config.dataset.path={train}",
            f"--config.dataset.validation_path={validation}",
            f"--config.dataset.tokenizer={choice}",
            "--config.dataset.streams=4",
        ],
    }
    for way, more in ways.items():
        output = run_imported(*tiny, f"--workdir={tmp_path}/{way}", *more)
        assert output.count(said) == 1, way
        assert (own if way == "jsonl" else probes) in output, way
