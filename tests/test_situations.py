"""Situations that users of other trainers report: each ends as it should, or is named in one line."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_config import make

from trainit.__main__ import main
from trainit.config import ConfigError, resolve
from trainit.data.dataset import DatasetError
from trainit.data.documents import reader
from trainit.data.documents.reader import Position
from trainit.data.formats.detect import open_path

pytestmark = pytest.mark.evidence("""99 situations of the kind that users of other trainers report: odd files,
columns, tokens, values, commands and sweeps end as they should, or in one line that names what is wrong""")

TWO = b'{"text": "one"}\n{"text": "two"}\n'
SKIPPED = struct.pack("<II", 0x184D2A50, 70_000) + bytes(70_000)  # a frame that readers pass over, as pzstd's
DICTIONARY = zstandard.train_dictionary(
    2000, [json.dumps({"text": f"hello {i} {i * i} world"}).encode() for i in range(2000)]
)
WITH_DICTIONARY = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(TWO)
FILES = {  # name, content: the texts that are read, and a part of the message about what is broken
    "a number of 5000 digits": ("a.jsonl", b'{"n": %s, "text": "a"}' % (b"9" * 5000), [], "line 1: Exceeds"),
    "a key twice": ("a.jsonl", b'{"text": "a", "text": "b"}', ["b"], ""),
    "NaN and infinity": ("a.jsonl", b'{"text": "a", "x": NaN, "y": -Infinity}', ["a"], ""),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + TWO, ["one", "two"], ""),
    "line ends of Windows": ("a.jsonl", TWO.replace(b"\n", b"\r\n"), ["one", "two"], ""),
    "line ends of old Macs": ("a.jsonl", TWO.replace(b"\n", b"\r"), [], "line 1: invalid JSON"),
    "a comma at the end": ("a.jsonl", b'{"text": "a",}', [], "line 1: invalid JSON at character 1"),
    "an array": ("a.jsonl", b'[{"text": "a"},\n{"text": "b"}]', [], "line 1: invalid JSON"),
    "an array on one line": ("a.jsonl", b'[{"text": "a"}]', [], "line 1: field text is missing"),
    "indented JSON": ("a.jsonl", b'{\n "text": "a"\n}', [], "line 1: invalid JSON"),
    "a list of texts": ("a.jsonl", b'{"text": ["a"]}', [], "line 1: field text is not a text"),
    "null": ("a.jsonl", b'{"text": null}', [], "line 1: field text is missing"),
    "separators of Unicode": ("a.jsonl", '{"text": "a\u2028b\x85c"}'.encode(), ["a\u2028b\x85c"], ""),
    "zeros of a crash": ("a.jsonl", TWO + bytes(50), ["one", "two"], "line 3: invalid JSON"),
    "UTF-16": ("a.jsonl", TWO.decode().encode("utf-16"), [], "line 1: invalid UTF-8"),
    "gzip without its name": ("a.jsonl", gzip.compress(TWO), [], "line 1: invalid UTF-8"),
    "gzip by name only": ("a.jsonl.gz", TWO, [], "after line 0: damaged gzip file"),
    "several gzip members": ("a.jsonl.gz", gzip.compress(TWO) * 2, ["one", "two"] * 2, ""),
    "an empty gzip": ("a.jsonl.gz", b"", [], ""),
    "frames of pzstd": ("a.jsonl.zst", (SKIPPED + zstandard.compress(TWO)) * 2, ["one", "two"] * 2, ""),
    "a frame of pzstd at the end": ("a.jsonl.zst", zstandard.compress(TWO) + SKIPPED, ["one", "two"], ""),
    "a torn frame of pzstd": (
        "a.jsonl.zst",
        zstandard.compress(TWO) + SKIPPED[:99],
        ["one", "two"],
        "truncated",
    ),
    "bytes after zstd": ("a.jsonl.zst", zstandard.compress(TWO) + b"garbage", ["one", "two"], "damaged zstd"),
    "zstd cut in a magic number": (
        "a.jsonl.zst",
        zstandard.compress(TWO) + b"(\xb5",
        ["one", "two"],
        "truncated",
    ),
    "zstd with a dictionary": ("a.jsonl.zst", WITH_DICTIONARY, [], "damaged zstd frame"),
    "spaces alone": ("a.jsonl", b'{"text": " \\n "}\n{"text": ""}', [" \n ", ""], ""),
}


def texts_of(path: Path) -> tuple[list[str], str]:
    texts, broken = [], ""
    for batch in reader.read(path, path.name, ("text", "meta"), Position()):
        documents, wrong = reader.parse(batch, ("text", "meta"))
        texts += [document.text for document in documents]
        broken += "".join(map(str, wrong))
    return texts, broken


@pytest.mark.parametrize("case", FILES)
def test_files_of_lines(case, tmp_path):
    name, content, texts, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    found, broken = texts_of(tmp_path / name)
    assert found == texts
    assert message in broken and bool(message) == bool(broken)


TABLES = {
    "dictionary": (pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), ["a", "b", "a"], ""),
    "large_string": (pa.table({"text": pa.array(["a"], pa.large_string())}), ["a"], ""),
    "binary": (pa.table({"text": pa.array([b"a"])}), [], "line 1: field text is not a text"),
    "null": (pa.table({"text": ["a", None]}), ["a"], "line 2: field text is missing"),
    "no rows": (pa.table({"text": pa.array([], pa.string())}), [], ""),
    "capital letter": (pa.table({"Text": ["a"]}), [], "there is no column text, only Text"),
    "lists": (pa.table({"text": [["a"]]}), [], "there is no column text, only text.list"),
}


@pytest.mark.parametrize("case", TABLES)
def test_columns_of_parquet(case, tmp_path):
    table, texts, message = TABLES[case]
    pq.write_table(table, tmp_path / "a.parquet")
    found, broken = texts_of(tmp_path / "a.parquet")
    assert found == texts
    assert message in broken and bool(message) == bool(broken)


def test_row_groups_without_rows(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])) as file:
        for rows in ([], ["a"], [], ["b", "c"], []):
            file.write_table(pa.table({"text": pa.array(rows, pa.string())}))
    assert texts_of(tmp_path / "a.parquet") == (["a", "b", "c"], "")


IDS = np.random.default_rng(0).integers(0, 50257, 1000)
FOREIGN = {
    "big-endian": ({"train.bin": IDS.astype(">u2")}, "is the id .*, but dataset.tokenizer has 50257 ids"),
    "an odd number of bytes": ({"train.bin": np.zeros(7, "u1")}, "train.bin has 7 bytes of nanoGPT ids"),
    "nothing but numpy files": ({"train.npy": IDS}, "neither dataset.json nor tokens"),
    "weights of a model": ({"pytorch_model.bin": IDS.astype("<u2")}, "nothing to validate on"),
    "two formats": ({"train.bin": IDS.astype("<u2"), "a.idx": IDS}, "files of several formats"),
    "only a test split": ({"test.bin": IDS.astype("<u2"), "val.bin": None}, "files to validate only"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_tokens_of_other_programs(case, tmp_path):
    files, message = FOREIGN[case]
    if len(files) == 1 and "npy" not in str(files) and "model" not in str(files):
        IDS.astype("<u2").tofile(tmp_path / "val.bin")
    for name, ids in files.items():
        if ids is not None:
            ids.tofile(tmp_path / name)
    with pytest.raises(DatasetError, match=message):
        open_path(str(tmp_path), "gpt2").splits["train"].read(np.arange(2), 499)


@pytest.mark.parametrize(("count", "lengths"), [(5, [4]), (17, [16]), (18, [16, 1])])
def test_data_that_are_shorter_than_a_sequence(count, lengths, tmp_path):
    for name in ("train.bin", "val.bin"):
        IDS[:count].astype("<u2").tofile(tmp_path / name)
    split = open_path(str(tmp_path), "gpt2").splits["train"]
    ids, found = split.read(np.arange(split.sequences(16)), 16)
    assert found.tolist() == lengths
    np.testing.assert_array_equal(ids[0, : lengths[0] + 1], IDS[: lengths[0] + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": -16}, "batch_size=-16 must be above 0"),
        ({"eval.every_steps": -1}, "eval.every_steps=-1 must not be below 0"),
        ({"checkpoint.keep": -1}, "checkpoint.keep=-1 must not be below 0"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan must not be below 0"),
        ({"schedule.warmup": -1}, "schedule.warmup=-1 is not a duration"),
        ({"schedule.warmup": "1 epoch"}, "schedule.warmup='1 epoch' is not a duration"),
        ({"schedule.warmup": "nan"}, "schedule.warmup='nan' is not a duration"),
        ({"schedule.warmup": 0.1}, "schedule.warmup=0.1 is not a whole number of steps"),
        ({"schedule.warmup": "101%"}, "more than steps=50000; give them in percent or raise steps"),
        ({"checkpoint.save_steps": (2, 1e3)}, r"save_steps=\(2, 1000.0\) must be a number of steps"),
        ({"dataset.order": "random"}, "dataset.order='random' is none of 'shuffled', 'blocks', 'sequential'"),
        ({"model.num_heads": 1000}, "model.dim=768 is not a multiple of model.num_heads=1000"),
        ({"log.every_steps": 0}, "log.every_steps=0 must be above 0"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(make(**{name.replace(".", "__"): value for name, value in changes.items()}), 50257)


@pytest.mark.parametrize("warmup", [0, "0%", "0.0001%", "100%", "5e4", "1 tokens", " 10 % "])
def test_warm_ups_that_can_be(warmup):
    resolve(make(schedule__warmup=warmup), 50257)


LINES = "".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(50))
PREPARE = ("prepare", "--input=t.jsonl", "--validation_fraction=0.2", "--tokenizer=bytes", "--workers=1")
SWEEP = "def get_sweep(arg):\n    return "
COMMANDS = {  # what is typed, its exit code, and a part of its last line
    "a fraction that is no number": (("--validation_fraction=nan",), 2, "must lie in [0, 1)"),
    "all for validation": (("--validation_fraction=1",), 2, "must lie in [0, 1)"),
    "workers in scientific notation": (("--workers=1e3",), 2, "invalid int value: '1e3'"),
    "a file in every place": (("--input=./t.jsonl", "--input=t.jsonl"), 0, ""),
    "a field that no line has": (("--text_field=content",), 1, "t.jsonl: line 1: field content is missing"),
    "a joining without work": (("--join",), 1, "1 of 1 units of work are not finished (t.jsonl"),
    "a shard without work": (("--shard=9/9",), 0, "0 of 1 units"),
    "a file of another kind": (
        ("--input=t.jsonl.xz",),
        2,
        "t.jsonl.xz is no file that ends in one of .jsonl",
    ),
    "a folder for a tokenizer": (("--tokenizer=tokenizers:.",), 2, "tokenizers:.: .: Is a directory"),
    "a vocabulary that is too large": (
        ("--tokenizer=sentencepiece:m.model", "--train_tokenizer"),
        2,
        "Vocabulary size too high (32000). Please set it to a value <= ",
    ),
    "a vocabulary that is too small": (
        ("--tokenizer=sentencepiece:m.model", "--train_tokenizer", "--vocab_size=10"),
        2,
        "Vocabulary size is smaller than required_chars. 10 vs 2",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_preparing(case, tmp_path, monkeypatch, capsys):
    flags, code, message = COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text(LINES)
    Path("t.jsonl.xz").write_text(LINES)
    assert main([*PREPARE, "--output=a folder é", *flags]) == code
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    if "every place" in case:
        info = json.loads(Path("a folder é/dataset.json").read_text())
        assert sum(split["documents"] for split in info["splits"].values()) == 50


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (("compare", "none"), 2, "none: no metrics.jsonl: it is no run folder"),
        (("compare", "t.jsonl"), 2, "t.jsonl: no metrics.jsonl"),
        (("compare", "t.jsonl", "--tuning_seeds=1,a"), 2, "--tuning_seeds=1,a are not whole numbers"),
        (("compare", "t.jsonl", "--target=low"), 2, "--target: low must be at least 0"),
        (("sweep", "none.py"), 2, "none.py: there is no such file"),
        (("sweep", "."), 2, ".: there is no such file"),
        (("plan", "--devices=1e3"), 2, "--devices=1e3: write numbers above 0"),
        (("plan", "--devices=8,"), 2, "--devices=8,: write numbers above 0"),
        (("plan", "--devices=²"), 2, "--devices=²: write numbers above 0"),
        (("plan", "--efficiency=nan"), 2, "--efficiency: nan must be in [0.01, 1]"),
        (("plan", "--rows=1e3"), 2, "--rows: 1e3 must be at least 0, a whole number"),
        (("fields", "["), 2, "no field and no choice has '[' in its name"),
        (("--debug",), 2, "unknown command '--debug'"),
        (("verify", "none"), 2, "none is no folder"),
        (("replay", "none"), 2, "none is no folder of a run: it has no metrics.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_commands(command, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text(LINES)
    assert main(command) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("trainit: error: ")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("None", "get_sweep returns NoneType, not a dict"),
        ("{'config': CONFIG, 'variants': ['adamw']}", "variants=['adamw'] is no dict"),
        ("{'config': CONFIG, 'seeds': range(3)}", "seeds=range(0, 3) is no list"),
        ("{'config': CONFIG, 'grid': {'steps': []}}", "grid steps=[] is no list of values"),
        ("{'config': CONFIG, 'grid': {'steps': [None]}}", "config.steps='None' must be a whole number"),
        (
            "{'config': CONFIG, 'grid': {'stepz': [1]}}",
            "unknown field config.stepz; did you mean config.steps?",
        ),
        ("{'config': CONFIG, 'fields': {'workdir': 'x'}}", "unknown field config.workdir"),
        ("{'config': 'none.py'}", "--config=none.py: there is no such file"),
        ("{'config': CONFIG, 'target': float('nan')}", "target=nan must be finite"),
        ("{'config': CONFIG, 'random': {'steps': [1]}, 'samples': -2}", "random needs samples, their number"),
    ],
)
def test_sweeps(asked, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(Path(__file__).parent / "tiny.py")
    Path("s.py").write_text(f"CONFIG = {config!r}\n{SWEEP}{asked}\n")
    assert main(["sweep", "s.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("runs").exists()


def test_values_of_a_grid_with_commas_spaces_and_repetition(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(Path(__file__).parent / "tiny.py")
    grid = {"batch_schedule": ["50%: 32; 80%: 48", ""], "checkpoint.save_steps": [(3, 5), 7, 7]}
    Path("s.py").write_text(f"{SWEEP}{{'config': {config!r}, 'grid': {grid!r}}}\n")
    assert main(["sweep", "s.py", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and len({line.partition("--workdir=")[2] for line in lines}) == 4
    assert "'--config.batch_schedule=50%: 32; 80%: 48' '--config.checkpoint.save_steps=(3, 5)'" in lines[0]
