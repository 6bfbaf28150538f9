"""What ends a text is what the tokenizer's files say, and no text becomes such a token.

The oracles are the text itself, and what the libraries make of the ids.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizers as hugging_face
from tokenizers import decoders, models, normalizers, pre_tokenizers

from trainit import tokenizers
from trainit.__main__ import main as trainit_command
from trainit.config import fields, resolve
from trainit.data import training_data
from trainit.data.dataset import DatasetError, open_dataset
from trainit.data.formats import detect

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TO_EOS = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">")]


def byte_fallback(model):
    """Spaces are U+2581, and nothing is split before the model sees it."""
    made = hugging_face.Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<eos>", "<unk>"])
    return made


def byte_level(model):
    made = hugging_face.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<unk>"])
    return made


def bpe(wrap, characters, merges=(), **options):
    tokens = dict.fromkeys(["<unk>", "<eos>", "</s>", *characters, *map("".join, merges)])
    numbers = {token: i for i, token in enumerate(tokens)}
    return wrap(models.BPE(numbers, list(merges), unk_token="<unk>", **options))


def unigram():
    """It looks in texts for each of its pieces, whatever they stand for."""
    scored = [(token, -1.0) for token in ("<unk>", "<eos>", "</s>", *BYTES)]
    letters = [(letter, -3.0) for letter in "▁<>/0xaseoun"]
    return byte_fallback(models.Unigram([*scored, *letters], 0, byte_fallback=True))


def html():
    """As Gemma's: the names of HTML's tags are tokens, which are matched in texts."""
    made = bpe(byte_fallback, [*BYTES, "▁", "a", "s"], byte_fallback=True)
    made.add_tokens(["</s>"])
    return made


LOSSLESS = {
    "byte-level": lambda: bpe(byte_level, ALPHABET),
    "merges to a token": lambda: bpe(byte_level, ALPHABET, TO_EOS),
    "whole words": lambda: bpe(byte_level, ALPHABET, ignore_merges=True),
    "bytes as words": lambda: bpe(byte_fallback, [*BYTES, "▁"], byte_fallback=True, ignore_merges=True),
    "merges to bytes": lambda: bpe(
        byte_fallback, [*BYTES, "▁", *"<>0xAeos"], [("0", "x"), ("<", "0x"), *TO_EOS], byte_fallback=True
    ),
    "html": html,
    "unigram": unigram,
}


def write(made, path: Path) -> tokenizers.Tokenizer:
    made.save(str(path))
    return tokenizers.find(f"tokenizers:{path}")


@pytest.mark.evidence("Text that spells a control token or a byte stays text, for all models of tokenizers.")
@pytest.mark.parametrize("kind", LOSSLESS)
def test_literal_text_stays_text(kind, tmp_path):
    """Names of control tokens and of bytes come back in every context, also by the library's decoder."""
    tokenizer = write(LOSSLESS[kind](), tmp_path / "tokenizer.json")
    library = hugging_face.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draw = np.random.default_rng(0)
    parts = ["<eos>", "<unk>", "</s>", "<0x0A>", "<0xE6>", "<0x0", "eos>", "x0", *"< as\né汉"]
    texts = ["<eos>", "<unk>", "<0x0A>", "a<0x0A>é", "<<eos>>"]
    texts += ["".join(draw.choice(parts, draw.integers(1, 12))) for _ in range(300)]
    control = [tokenizer.end_of_text, library.token_to_id("<unk>"), library.token_to_id("<eos>")]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert library.decode(ids.tolist(), skip_special_tokens=False) == text
        assert not set(control) & set(ids.tolist())
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("model", [models.WordPiece, models.WordLevel])
def test_models_of_words_keep_their_control_tokens_too(model, tmp_path):
    words = {token: i for i, token in enumerate(["<unk>", "<eos>", *ALPHABET])}
    tokenizer = write(byte_level(model(words, unk_token="<unk>")), tmp_path / "tokenizer.json")
    ids = tokenizer.encode(["<eos>", "<unk>"])
    assert [tokenizer.decode(one) for one in ids] == ["<eos>", "<unk>"]
    assert not {0, 1} & set(np.concatenate(ids).tolist())


def test_a_name_that_cannot_be_spelled_is_refused(tmp_path):
    """Not dropped, and not kept as an end of text in the middle of a document."""
    tokenizer = write(bpe(byte_level, "ab<", TO_EOS[:0], ignore_merges=True), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="'<eos>', a control token that this tokenizer cannot spell"):
        tokenizer.encode(["<eos>"])


def test_a_special_token_ends_texts_before_a_plain_one(tmp_path):
    """Gemma's </s> is a tag of HTML, and a token of text; it ends texts only if it is asked to."""
    tokenizer = write(html(), tmp_path / "tokenizer.json")
    assert (tokenizer.end_name, tokenizer.end_of_text) == ("<eos>", 1)
    assert tokenizer.encode(["a</s>s"])[0][1] == 2  # as the library does
    chosen = tokenizers.find(f"tokenizers:{tmp_path}/tokenizer.json", end_of_text="</s>")
    assert (chosen.end_name, chosen.end_of_text) == ("</s>", 2)
    ids = chosen.encode(["a</s>s"])[0]
    assert 2 not in ids
    assert chosen.decode([*ids, 2]) == "a</s>s"


@pytest.mark.parametrize(
    ("file", "content", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, "</s>"),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "lstrip": False}}, "</s>"),
        ("tokenizer_config.json", {"eos_token": None, "model_max_length": 9}, "<eos>"),
        ("special_tokens_map.json", {"eos_token": "a"}, "a"),
        ("generation_config.json", {"eos_token_id": 2}, "</s>"),
        ("generation_config.json", {"eos_token_id": [2, 1]}, "</s>"),
    ],
)
def test_the_files_next_to_a_tokenizer_say_what_ends_texts(file, content, end, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    assert write(html(), tmp_path / "tokenizer.json").end_name == end
    named = tokenizers.find(f"tokenizers:{tmp_path}/tokenizer.json", end_of_text="<unk>")
    assert named.end_name == "<unk>"


def test_ends_that_cannot_be_had(tmp_path):
    made = hugging_face.Tokenizer(models.BPE({"a": 0, "<stop>": 1}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<stop>"])
    with pytest.raises(ValueError, match=r"there is none of <\|endoftext\|>.*special tokens: <stop>"):
        write(made, tmp_path / "t.json")
    assert tokenizers.find(f"tokenizers:{tmp_path}/t.json", end_of_text="<stop>").end_of_text == 1
    for choice in (f"tokenizers:{tmp_path}/t.json", "bytes", "gpt2"):
        with pytest.raises(ValueError, match="'<nope>'"):
            tokenizers.find(choice, "--tokenizer", "<nope>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(ValueError, match=r"--tokenizer=.*'<gone>' is not in the vocabulary"):
        tokenizers.find(f"tokenizers:{tmp_path}/t.json", "--tokenizer")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        tokenizers.find(f"tokenizers:{tmp_path}/t.json")


def test_added_tokens_are_found_by_their_content(tmp_path):
    """The library gives them its own ids, whatever the file says: 5000 more, or one of another token."""
    made = html()
    made.add_tokens(["aa aa", "ss"])
    expected = write(made, tmp_path / "a.json")
    for shift in (5000, 1):
        changed = json.loads(made.to_str())
        for token in changed["added_tokens"]:
            token["id"] += shift
        (tmp_path / "b.json").write_text(json.dumps(changed))
        tokenizer = tokenizers.find(f"tokenizers:{tmp_path}/b.json")
        text = "aa aa</s>ss é"
        assert tokenizer.end_of_text == expected.end_of_text == 1
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
        np.testing.assert_array_equal(tokenizer.token_bytes(), expected.token_bytes())


def test_sentencepiece_with_an_end_of_its_own(tmp_path):
    """A model without an end of sentence. A token that a user defined is matched in texts, and ends none."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 50),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        eos_id=-1,
        user_defined_symbols=["<|end|>"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    choice = f"sentencepiece:{tmp_path}/m.model"
    with pytest.raises(ValueError, match="no end-of-sentence id"):
        tokenizers.find(choice)
    with pytest.raises(ValueError, match="no token '<nope>'"):
        tokenizers.find(choice, end_of_text="<nope>")
    tokenizer = tokenizers.find(choice, end_of_text="<|end|>")
    ids, text = tokenizer.encode(["some <|end|> words"])[0], "some <|end|> words"
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    again = tokenizers.build(tokenizer.name, tokenizer.serialize(), tokenizer.end_of_text)
    assert again.end_name == "<|end|>"


def test_the_commands_take_it(tmp_path, capfd):
    """--end_of_text for preparing, dataset.end_of_text for tokens of others and for JSON lines."""
    html().save(str(tmp_path / "t.json"))
    for name in ("a", "v"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "a</s>a"}) + "\n")
    flags = [f"--input={tmp_path}/a.jsonl", f"--validation={tmp_path}/v.jsonl", f"--output={tmp_path}/data"]
    flags += [f"--tokenizer=tokenizers:{tmp_path}/t.json", "--workers=1"]
    assert not trainit_command(["prepare", *flags, "--end_of_text=</s>"])
    assert "end of text </s>" in capfd.readouterr().err
    dataset = open_dataset(tmp_path / "data")
    ids = np.fromfile(dataset.splits["train"].paths[0], dataset.info["dtype"])
    assert np.flatnonzero(ids == dataset.tokenizer.end_of_text).tolist() == [len(ids) - 1]
    assert dataset.tokenizer.decode(ids.tolist()) == "a</s>a"
    assert trainit_command(["prepare", *flags]) == 2
    assert ": tokenizer.end_of_text=2, not 1; give the same" in capfd.readouterr().err
    assert trainit_command(["prepare", *flags, "--end_of_text=<nope>"]) == 2  # wrong usage
    assert "'<nope>' is not in the vocabulary" in capfd.readouterr().err
    with pytest.raises(DatasetError, match=r"dataset\.end_of_text='</s>': the prepared"):
        detect.open_path(str(tmp_path / "data"), end_of_text="</s>")
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("train", "val"):
        np.arange(9, dtype="<u2").tofile(folder / f"{name}.bin")
    theirs = detect.open_path(str(folder), f"tokenizers:{tmp_path}/t.json", "", "</s>")
    assert theirs.tokenizer.end_name == "</s>"
    config = tiny.get_config()
    config.dataset = fields.jsonl(str(tmp_path / "a.jsonl"), str(tmp_path / "v.jsonl"))
    config.dataset.update(tokenizer=f"tokenizers:{tmp_path}/t.json", end_of_text="</s>", streams=1)
    _, data = training_data.read(config, "", resolve, tmp_path)
    assert data.validation.ids.tolist() == ids.tolist()
