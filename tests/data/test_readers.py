"""Readers: what is in a file, from any position on; and what is wrong with it."""

import codecs
import gzip
import json
import os
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from trainit.data.documents import decompress, reader
from trainit.data.documents.reader import Position
from trainit.tokenizers import base

FIELDS = ("text", "meta.pile_set_name")


def records(count: int) -> list[tuple[str, str]]:
    draw = np.random.default_rng(0)
    texts = ["é😀\x00 line\n" * int(n) for n in draw.integers(0, 400, count)]
    return [(text, f"set {i % 3}") for i, text in enumerate(texts)]


def as_lines(rows) -> bytes:
    lines = [
        json.dumps({"text": t, "meta": {"pile_set_name": s}}, ensure_ascii=bool(len(t) % 2)) for t, s in rows
    ]
    return "\n".join(lines).encode() + b"\r\n\n"


def write(path, rows) -> None:
    content = as_lines(rows)
    if path.name.endswith(".zst"):  # two frames, the second of unknown size
        half = len(content) // 2
        second = zstandard.ZstdCompressor().compressobj()
        content = zstandard.compress(content[:half]) + second.compress(content[half:]) + second.flush()
    elif path.name.endswith(".gz"):
        content = gzip.compress(content[:1000]) + gzip.compress(content[1000:])
    elif path.name.endswith(".parquet"):
        table = {"text": [t for t, _ in rows], "meta": [{"pile_set_name": s, "other": 1} for _, s in rows]}
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=100)
        return
    path.write_bytes(content)


def read(path, start=Position()) -> tuple[list, list, list]:  # noqa: B008
    documents, broken, positions = [], [], []
    for batch in reader.read(path, path.name, FIELDS, start):
        there, wrong = reader.parse(batch, FIELDS)
        documents += there
        broken += wrong
        positions.append((batch.position, len(documents)))
    return documents, broken, positions


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_all_documents_from_every_position(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BATCH", 100_000)
    monkeypatch.setattr(decompress, "CHUNK", 25_000)
    monkeypatch.setattr(decompress, "COMPRESSED", 100)
    rows = records(700)
    write(tmp_path / name, rows)
    documents, broken, positions = read(tmp_path / name)
    assert [(d.text, d.subset) for d in documents] == rows
    assert [d.line for d in documents] == list(range(1, 701))
    assert not broken
    assert len(positions) > 5
    for position, count in positions:
        rest, _, _ = read(tmp_path / name, position)
        assert [(d.text, d.line) for d in rest] == [(d.text, d.line) for d in documents[count:]]


@pytest.mark.parametrize("last_line_ends", [True, False])
def test_bytes_after_a_gz_cost_no_document(last_line_ends, tmp_path):
    """All documents come before the damage is reported, as `gzip -dc` gives them; zeros are no damage."""
    rows = records(3000)
    content = as_lines(rows).rstrip() + b"\n" * last_line_ends
    for name, tail in (
        ("zeros", bytes(70_000)),
        ("garbage", b"garbage"),
        ("torn", gzip.compress(b"x" * 99)[:9]),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]) + tail)
        documents, broken, _ = read(path)
        assert [(d.text, d.subset) for d in documents] == rows
        assert [b.line for b in broken] == [] if name == "zeros" else [2999 + last_line_ends]
    path.write_bytes(bytes(100))
    assert read(path)[1][0].damaged  # zeros alone are no gzip file


def test_damage_inside_a_gz_keeps_what_precedes_it(tmp_path):
    """Against zlib fed byte by byte, for damage at random places."""
    content, draw = as_lines(records(200)), np.random.default_rng(3)
    good = gzip.compress(content)
    for place in draw.integers(100, len(good) - 8, 10).tolist():
        torn = good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :]
        (tmp_path / "a.jsonl.gz").write_bytes(torn)
        stream, pieces = zlib.decompressobj(31), []
        with pytest.raises(zlib.error):
            for i in range(len(torn)):
                pieces.append(stream.decompress(torn[i : i + 1]))
        lines = b"".join(pieces).split(b"\n")[:-1]
        documents, broken, _ = read(tmp_path / "a.jsonl.gz")
        (damage,) = (b for b in broken if b.damaged)
        assert damage.line == len(lines)
        assert len(documents) + len(broken) - 1 == sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("nested", [False, True])
def test_names_with_dots_are_paths_or_keys(format, nested, tmp_path):
    """As json_normalize names the columns of a table; what is null or NaN there is no subset."""
    path, subsets = tmp_path / f"a.{format}", ["x", "None", None, "", "unnamed"]
    rows = [{"raw.text": f"text {i}", "meta.pile_set_name": subset} for i, subset in enumerate(subsets)]
    if nested:
        rows = [
            {"raw": {"text": text}, "meta": {"pile_set_name": set_}} for text, set_ in map(dict.values, rows)
        ]
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    documents = []
    for batch in reader.read(path, path.name, ("raw.text", "meta.pile_set_name"), Position()):
        found, broken = reader.parse(batch, ("raw.text", "meta.pile_set_name"))
        documents += found
        assert not broken
    assert [d.text for d in documents] == [f"text {i}" for i in range(len(subsets))]
    assert [d.subset for d in documents] == ["x", "None", "", "", "unnamed"]


@pytest.mark.parametrize(
    ("record", "text", "subset"),
    [
        ({"a": {"b.c": "t"}, "s": float("nan")}, "t", ""),  # as Python writes a table's gaps
        ({"a.b": {"c": "t"}, "a": {"b": 1}, "s": 7}, "t", "7"),
        ({"a.b.c": "t", "a": {"b": {"c": "nested"}}, "s": 0}, "t", "0"),  # the whole name comes first
        ({"a": None, "a.b": {"c": "t"}}, "t", ""),
    ],
)
def test_keys_with_dots_at_any_depth(record, text, subset):
    batch = reader.Batch("a", Position(), 0, lines=json.dumps(record).encode())
    assert reader.parse(batch, ("a.b.c", "s")) == ([reader.Document(text, subset, 1)], [])


def test_a_text_file_is_one_document_in_the_pieces_of_its_text(tmp_path):
    path = tmp_path / "a.txt"
    text = "word été 😀\r\n" * 300_000
    path.write_bytes(text.encode())
    documents, broken, positions = read(path)
    assert [d.text for d in documents] == [piece for piece, _ in base.pieces([text], base.ByteTokenizer.cut)]
    assert [d.first for d in documents] == [True] + [False] * (len(documents) - 1)
    assert [d.last for d in documents] == [False] * (len(documents) - 1) + [True]
    assert len({d.hash for d in documents}) == 1
    assert not broken
    for position, count in positions[:-1]:
        assert read(path, position)[0] == documents[count:]
    path.write_bytes(b"")
    assert [(d.text, d.first, d.last) for d in read(path)[0]] == [("", True, True)]


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": "bad\n{"txt": 1}\n{"text": 5}\n[1]\n{"text": "\xff"}\n \n'
        + b"[" * 100_000
        + b'\n{"text": "\\ud83d \\u0000"}\n{"text": 1e'
    )
    documents, broken, _ = read(path)
    assert [(d.text, d.subset, d.line) for d in documents] == [("good", "", 1), ("\ud83d \x00", "", 9)]
    assert [(b.line, b.reason.split(" at ")[0]) for b in broken][:5] == [
        (2, "invalid JSON"),
        (3, "field text is missing"),
        (4, "field text is not a text"),
        (5, "field text is missing"),
        (6, "invalid UTF-8"),
    ]
    assert [b.line for b in broken][5:] == [8, 10]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_torn_and_damaged_files(name, tmp_path):
    """Whole lines before the tear are kept, and the file is reported as damaged."""
    rows = records(200)
    path = tmp_path / name
    write(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    documents, (broken,), _ = read(path)
    assert 0 < len(documents) < 200
    assert [d.text for d in documents] == [text for text, _ in rows[: len(documents)]]
    assert broken.damaged
    assert broken.line == len(documents)
    assert "truncated" in str(broken)
    path.write_bytes(b"no archive at all")
    _, (broken,), _ = read(path)
    assert broken.damaged
    assert "damaged" in str(broken)


def test_other_damage(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\xff")
    _, (broken,), _ = read(path)
    assert (broken.line, broken.damaged) == (3, False)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    _, (broken,), _ = read(path)
    assert broken.damaged
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    assert "no column text, only content" in str(read(path)[1][0])
    invalid = pyarrow.array([b"ok", b"\xff", b"ok too"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(invalid)}), path)
    documents, broken, _ = read(path)
    assert [d.text for d in documents] == ["ok", "ok too"]
    assert [(b.line, b.reason) for b in broken] == [(2, "invalid UTF-8")]


def test_suffixes():
    assert [reader.suffix(reader.Path(n)) for n in ("a.jsonl", "b.jsonl.zst", "c.json")] == [
        *(".jsonl", ".jsonl.zst", None)
    ]


def find(*patterns) -> tuple[list[str], list[str]]:
    paths, names = reader.find_files([str(pattern) for pattern in patterns], "--input", reader.SUFFIXES)
    return [path.name for path in paths], names


def test_folders_are_searched_where_links_lead(tmp_path, caplog):
    """Corpora lie on several disks, and links put them together; links in a circle are followed once."""
    for name in ("in/a.jsonl", "far/b.jsonl", "far/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, to in (("in/sub", "far"), ("in/up", "in"), ("far/again", "in"), ("in/b.jsonl", "far/b.jsonl")):
        (tmp_path / link).symlink_to(tmp_path / to)
    assert find(tmp_path / "in") == (
        ["a.jsonl", "b.jsonl", "c.jsonl"],
        ["a.jsonl", "b.jsonl", "sub/deep/c.jsonl"],
    )
    with caplog.at_level("INFO"):
        for name in ("in/x.jsonl.xz", "in/Y.JSON", "in/README.md"):
            (tmp_path / name).touch()
        find(tmp_path / "in")
    assert f"2 files of {tmp_path}/in are not read" in caplog.text
    assert f"the first is {tmp_path}/in/Y.JSON" in caplog.text
    (tmp_path / "in/x.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"x.jsonl is a folder, a link to nothing"):
        find(tmp_path / "in")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """As root reads everything, the system's answer is put in."""
    scandir = os.scandir
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").touch()

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find(tmp_path)


@pytest.mark.parametrize("rest", [b"", b"\n", b" \r\n"])
def test_a_byte_order_mark_alone_is_a_blank_line(rest, tmp_path):
    """As an editor leaves it in an empty file."""
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + rest + b'{"text": "one"}\n' * bool(rest))
    documents, broken, _ = read(tmp_path / "a.jsonl")
    assert ([d.text for d in documents], broken) == (["one"] * bool(rest), [])
