"""Tokens that others prepared: files written here, by other code, read as they were written."""

import functools
import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import ROOT, TWO, metrics, run_imported

from trainit import tokenizers
from trainit.data import loader
from trainit.data.dataset import DatasetError
from trainit.data.formats import arrow as columns
from trainit.data.formats.detect import open_path
from trainit.data.rows.order import Ordered, Sequential
from trainit.tokenizers.base import digest

VOCABULARY = 257  # of the tokenizer "bytes"
LENGTH = 16  # of sequences, where a test does not say otherwise


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def rows_of(ids: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """The ids in rows of many lengths, some of them empty."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(ids), len(ids) // 7))
    return np.split(ids, cuts)


def write_llm_c(path: Path, ids: np.ndarray, magic=20240520, version=1, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def write_megatron(prefix: Path, rows, dtype="<u2", code=8, parts=0, version=1, magic=b"MMIDIDX\0\0"):
    ids = np.concatenate(rows).astype(dtype)
    sizes = np.array([len(row) for row in rows], np.int64)
    begins = (np.cumsum(sizes) - sizes) * ids.itemsize
    Path(f"{prefix}.idx").write_bytes(
        magic
        + struct.pack("<QBQQ", version, code, len(rows), len(rows) + 1)
        + struct.pack(f"<{len(rows)}i", *sizes)
        + struct.pack(f"<{len(rows)}q", *begins)
        + struct.pack(f"<{len(rows) + 1}q", *range(len(rows) + 1))
    )
    content = ids.tobytes()
    size = -(-len(content) // max(parts, 1)) // ids.itemsize * ids.itemsize + ids.itemsize
    for number in range(parts):
        part = content[number * size : number * size + size]
        Path(f"{prefix}-{number:05d}-of-{parts - 1:05d}.bin").write_bytes(part)
    if not parts:
        Path(f"{prefix}.bin").write_bytes(content)


def table(rows, kind=None, **more) -> pa.Table:
    kind = kind or pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array([list(map(int, row)) for row in rows], kind), **more})


def write_arrow(path: Path, rows, kind=None, batch_rows=9, writer=pa.ipc.new_stream, **options):
    content = table(rows, kind, attention_mask=[[1] * len(row) for row in rows])
    with writer(path, content.schema, **options) as out:
        out.write_table(content, max_chunksize=batch_rows)


def save_to_disk(folder: Path, shards, **options):
    """The files that `datasets` leaves: its shards with their list, and a cache of something else."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(folder / name, rows, **options)
    state = {"_data_files": [{"filename": name} for name in names], "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    write_arrow(folder / "cache-0123.arrow", [[1, 2, 3]])


def nanogpt(folder: Path, train: np.ndarray, validation: np.ndarray):
    train.astype("<u2").tofile(folder / "train.bin")
    validation.astype("<u2").tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"of no concern")


def llm_c(folder: Path, train: np.ndarray, validation: np.ndarray):
    for number, part in enumerate(np.array_split(train, 3), start=1):
        write_llm_c(folder / f"fineweb_train_{number:06d}.bin", part)
    write_llm_c(folder / "fineweb_val_000000.bin", validation)


def llama(folder: Path, train: np.ndarray, validation: np.ndarray):
    for name, ids in (("train", train), ("val", validation)):
        write_llm_c(folder / f"tiny_shakespeare_{name}.bin", ids, 20240801, 7, "<u4")


def megatron(folder: Path, train, validation, **options):
    write_megatron(folder / "pile_0.9_train_text_document", rows_of(train), **options)
    write_megatron(folder / "pile_0.9_valid_text_document", rows_of(validation))


def megatron_with_modes(folder: Path, train: np.ndarray, validation: np.ndarray):
    """As megatron-core writes with multimodal=True: after all else a byte for each sequence, 0 for text."""
    megatron(folder, train, validation)
    for split, ids in (("train", train), ("valid", validation)):
        with (folder / f"pile_0.9_{split}_text_document.idx").open("ab") as index:
            index.write(bytes(len(rows_of(ids))))


def megatron_in_two(folder: Path, train: np.ndarray, validation: np.ndarray):
    """Nothing in the names of the training data says so, and one has another type of ids."""
    first, second = np.array_split(train, 2)
    write_megatron(folder / "a_text_document", rows_of(first), "<i4", 4)
    write_megatron(folder / "b_text_document", rows_of(second))
    write_megatron(folder / "c_test", rows_of(validation))


def dataset_dict(folder: Path, train: np.ndarray, validation: np.ndarray):
    save_to_disk(folder / "train", [rows_of(part) for part in np.array_split(train, 3)])
    save_to_disk(folder / "validation", [rows_of(validation)], kind=pa.large_list(pa.int64()))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')


def arrow_files(folder: Path, train: np.ndarray, validation: np.ndarray):
    write_arrow(folder / "train.arrow", rows_of(train), writer=pa.ipc.new_file)
    fixed = pa.list_(pa.uint16(), 5)
    write_arrow(folder / "val.arrow", validation[: len(validation) // 5 * 5].reshape(-1, 5), fixed)


def arrow_views(folder: Path, train: np.ndarray, validation: np.ndarray):
    """Lists that each say where they lie: one after the other, and in the opposite order with gaps."""
    write_arrow(folder / "train.arrow", rows_of(train), kind=pa.list_view(pa.int32()))
    parts = np.array_split(validation, 4)
    values = np.concatenate([np.append(part, 7) for part in reversed(parts)]).astype("<i8")
    ends = np.cumsum([len(part) + 1 for part in reversed(parts)])
    begins = [int(ends[3 - i]) - len(part) - 1 for i, part in enumerate(parts)]
    column = pa.LargeListViewArray.from_arrays(begins, [len(part) for part in parts], pa.array(values))
    with pa.ipc.new_stream(folder / "val.arrow", pa.schema({"input_ids": column.type})) as out:
        out.write_batch(pa.record_batch({"input_ids": column}))


def parquet_views(folder: Path, train: np.ndarray, validation: np.ndarray):
    kind = pa.list_view(pa.uint16())
    pq.write_table(table(rows_of(train), kind), folder / "train.parquet", row_group_size=11)
    pq.write_table(table(rows_of(validation), kind), folder / "validation.parquet")


def parquet(folder: Path, train: np.ndarray, validation: np.ndarray, **options):
    for number, part in enumerate(np.array_split(train, 2)):
        content = table(rows_of(part), text=["a"] * len(rows_of(part)))
        pq.write_table(content, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=11, **options)
    pq.write_table(table(rows_of(validation), pa.list_(pa.int64())), folder / "validation-00000.parquet")


FORMATS = {
    "nanoGPT": (nanogpt, "nanoGPT"),
    "llm.c": (llm_c, "llm.c"),
    "llm.c, 32 bits": (llama, "llm.c"),
    "Megatron": (megatron, "Megatron"),
    "Megatron, int64": (functools.partial(megatron, dtype="<i8", code=5), "Megatron"),
    "Megatron, bytes": (functools.partial(megatron, dtype="<u1", code=1), "Megatron"),
    "Megatron in parts": (functools.partial(megatron, parts=4), "Megatron"),
    "Megatron with modes": (megatron_with_modes, "Megatron"),
    "Megatron, two pairs": (megatron_in_two, "Megatron"),
    "DatasetDict": (dataset_dict, "Arrow"),
    "Arrow": (arrow_files, "Arrow"),
    "Arrow, views": (arrow_views, "Arrow"),
    "parquet": (parquet, "parquet"),
    "parquet, views": (parquet_views, "parquet"),
}


@pytest.mark.evidence(
    "tokens in the formats of other programs, written by other code: every sequence as it was written"
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_sequence_is_what_was_written(name, tmp_path):
    """Of several lengths, across files and record batches, in any order, and as another process has it."""
    write, format = FORMATS[name]
    written = {"train": draw(1003), "validation": draw(90, seed=1)}
    if name.endswith("bytes"):
        written["train"] %= 256
    write(tmp_path, *written.values())
    dataset = open_path(str(tmp_path), "bytes")
    assert dataset.info["format"] == format
    assert dataset.vocab_size == VOCABULARY
    for split, ids in written.items():
        opened = pickle.loads(pickle.dumps(dataset.splits[split]))
        assert opened.tokens == len(ids)
        assert opened.bytes is None
        for length in (1, 7, 300, len(ids) - 1, len(ids) + 5):
            count = opened.sequences(length)
            assert count == -(-(len(ids) - 1) // length)
            sequences = np.append(np.random.default_rng(0).permutation(count), -1)
            rows, lengths = opened.read(sequences, length)
            assert rows.dtype == np.uint16
            assert lengths[-1] == 0 and not rows[-1].any()
            for i, row, n in zip(sequences[:-1], rows, lengths, strict=False):
                expected = ids[i * length : i * length + length + 1]
                np.testing.assert_array_equal(row[: n + 1], expected)
                assert n == len(expected) - 1
                assert not row[n + 1 :].any()


def whole_megatron(folder: Path, rows: np.ndarray):
    """As Pythia's: all sequences of one length, in parts that do not end where sequences do."""
    write_megatron(folder / "document", rows, parts=4)


def whole_arrow(folder: Path, rows: np.ndarray):
    save_to_disk(folder / "train", [rows[:50], rows[50:]])


def whole_fixed(folder: Path, rows: np.ndarray):
    save_to_disk(folder / "train", [rows[:50], rows[50:]], kind=pa.list_(pa.int64(), rows.shape[1]))


def whole_parquet(folder: Path, rows: np.ndarray):
    pq.write_table(table(rows), folder / "train.parquet", row_group_size=13)


@pytest.mark.parametrize("write", [whole_megatron, whole_arrow, whole_fixed, whole_parquet])
def test_stored_sequences_of_the_context_length_and_one_are_read_whole(write, tmp_path):
    rows = draw(97 * (LENGTH + 1)).reshape(97, -1)
    write(tmp_path, rows)
    (tmp_path / "held_out").mkdir()
    draw(500).astype("<u2").tofile(tmp_path / "held_out" / "any.bin")
    dataset = open_path(str(tmp_path), "bytes", str(tmp_path / "held_out" / "any.bin"))
    train = dataset.splits["train"]
    assert train.sequences(LENGTH) == 97
    # Pythia's batch t is the t-th group of that many sequences.
    batches = loader.BatchSource(Ordered(train, Sequential(97)), 0, (2, 8, LENGTH), slice(0, 8), 6)
    for t in range(6):
        np.testing.assert_array_equal(
            batches[t]["tokens"].reshape(16, LENGTH + 1), rows[16 * t : 16 * t + 16]
        )
    ids, lengths = train.read(np.append(np.arange(97), -1), LENGTH)
    np.testing.assert_array_equal(ids[:97], rows)
    assert lengths.tolist() == [LENGTH] * 97 + [0]
    assert f"sequences of {LENGTH + 1} tokens read whole" in dataset.layout(LENGTH)
    # With another context length they are one stream, which is reported.
    ids, lengths = train.read(np.array([3]), 40)
    np.testing.assert_array_equal(ids[0], rows.ravel()[120:161])
    assert train.sequences(40) == -(-(rows.size - 1) // 40)
    assert f"read as one stream; model.context_length={LENGTH} would read them whole" in dataset.layout(40)


@pytest.mark.parametrize("lengths", [(3, 5), (4, 4, 4, 5, 3, 4), (4, 3)])
def test_rows_of_one_length_on_average_are_no_sequences(lengths, tmp_path):
    rows = np.split(draw(sum(lengths)), np.cumsum(lengths)[:-1])
    draw(50).astype("<u2").tofile(tmp_path / "any.bin")
    for name, write in (
        ("megatron", lambda path: write_megatron(path / "x", rows)),
        ("arrow", lambda path: write_arrow(path / "x.arrow", rows)),
        ("parquet", lambda path: pq.write_table(table(rows), path / "x.parquet")),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        train = open_path(str(tmp_path / name), "bytes", str(tmp_path / "any.bin")).splits["train"]
        if lengths[0] * len(lengths) != sum(lengths):
            assert train.stored == 0, name
        ids, _ = train.read(np.array([0]), sum(lengths) - 1)
        np.testing.assert_array_equal(ids[0], np.concatenate(rows))


def test_paths_of_files_and_pairs(tmp_path):
    rows = rows_of(draw(300))
    write_megatron(tmp_path / "document", rows, parts=3)
    write_llm_c(tmp_path / "val.bin", draw(80, seed=1))
    for path in ("document", "document.idx", "document-00001-of-00002.bin"):
        dataset = open_path(str(tmp_path / path), "bytes", str(tmp_path / "val.bin"))
        assert dataset.splits["train"].tokens == 300
        assert dataset.splits["validation"].tokens == 80
    with pytest.raises(DatasetError, match=r"several formats, such as document\.idx and val\.bin"):
        open_path(str(tmp_path), "bytes")


def test_validation_from_a_prepared_dataset_of_the_same_tokenizer(random_dataset, tmp_path):
    draw(300).astype("<u2").tofile(tmp_path / "train.bin")
    dataset = open_path(str(tmp_path), "bytes", str(random_dataset))
    info = json.loads((random_dataset / "dataset.json").read_text())["splits"]["validation"]
    assert dataset.splits["validation"].tokens == info["tokens"]
    with pytest.raises(DatasetError, match=rf"tokenizer {digest(b'')}, dataset.tokenizer is"):
        open_path(str(tmp_path), "gpt2", str(random_dataset))
    with pytest.raises(DatasetError, match=r"validation_path='nowhere' does not exist"):
        open_path(str(tmp_path), "bytes", "nowhere")


def test_fingerprint(tmp_path):
    """Of what the files are called and how long they are; not of where they lie."""
    nanogpt(tmp_path, draw(300), draw(50))
    before = open_path(str(tmp_path), "bytes").fingerprint
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert open_path(str(moved), "bytes").fingerprint == before
    assert open_path(str(moved), "gpt2").fingerprint != before
    draw(301).astype("<u2").tofile(moved / "train.bin")
    assert open_path(str(moved), "bytes").fingerprint != before


def bad_index(folder: Path, **options):
    write_megatron(folder / "train", rows_of(draw(100)), **options)


def part_missing(folder: Path):
    (folder / "train.bin").unlink()
    bad_index(folder, parts=3)
    (folder / "train-00002-of-00002.bin").unlink()


def with_an_image(folder: Path):
    bad_index(folder)
    with (folder / "train.idx").open("ab") as index:
        index.write(bytes([0, 0, 1] + [0] * (len(rows_of(draw(100))) - 3)))


def longer(path: Path, by: int):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + by)


def write_column(folder: Path, name: str, values: list):
    pq.write_table(pa.table({name: values}), folder / "train.parquet")


def compressed(folder: Path):
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    write_arrow(folder / "train.arrow", [[1] * 999], options=options)


def unlisted(folder: Path):
    save_to_disk(folder / "train", [[[1, 2]]])
    (folder / "train" / "data-00000-of-00001.arrow").unlink()


def shuffled(folder: Path):
    save_to_disk(folder / "train", [[[1, 2]]])
    state = {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (folder / "train" / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: longer(f / "train.bin", 1), r"601 bytes of nanoGPT ids, no multiple of the 2"),
        (lambda f: (f / "val.bin").unlink(), r"nothing to validate on.*dataset.validation_path"),
        (lambda f: (f / "train.bin").unlink(), r"has files to validate only, such as val.bin"),
        (lambda f: (f / "more.bin").touch(), r"more.bin is for no split by its name, as .*train.bin"),
        (lambda f: write_llm_c(f / "train.bin", draw(9), count=8), r"1042 bytes, its header says 1040"),
        (lambda f: write_llm_c(f / "train.bin", draw(9), version=7), r"version 7 of llm.c's magic 20240520"),
        (lambda f: write_llm_c(f / "train.bin", draw(9), 20240522), r"multiple-choice questions"),
        (lambda f: (f / "train.bin").write_bytes(struct.pack("<i", 20240801)), r"version 0 of llm.c's"),
        (lambda f: write_arrow(f / "a.arrow", [[1]]), r"several formats, such as a.arrow and val.bin"),
        (lambda f: (bad_index(f), longer(f / "train.bin", 2)), r"bytes 0 to 200, but train.bin has 202"),
        (lambda f: (bad_index(f), longer(f / "train.idx", 8)), r"bytes instead of"),
        (with_an_image, r"has sequence 2 of mode 1, which is no text"),
        (part_missing, r"bytes 0 to 200, but train.bin or its parts have 136"),
        (lambda f: bad_index(f, version=2), r"has version 2 and type 8"),
        (lambda f: bad_index(f, dtype="<f4", code=7), r"has version 1 and type 7; .* types of integers"),
        (lambda f: bad_index(f, magic=b"TNTIDX\0\0\0"), r"begins with b'TNTIDX.* instead of b'MMIDIDX"),
    ],
)
def test_what_is_wrong_with_bare_ids(spoil, message, tmp_path):
    nanogpt(tmp_path, draw(300), draw(50))
    spoil(tmp_path)
    if (tmp_path / "train.idx").exists():
        (tmp_path / "val.bin").unlink()
    with pytest.raises(DatasetError, match=message) as error:
        open_path(str(tmp_path), "bytes")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: (f / "train.parquet").write_bytes(b"PAR1, not"), r"train.parquet is damaged \("),
        (lambda f: (f / "train.arrow").write_bytes(b"not Arrow"), r"train.arrow is damaged \("),
        (lambda f: write_column(f, "text", ["a"]), r"no column input_ids, only text"),
        (lambda f: write_column(f, "input_ids", [1]), r"of type int64 instead of a list"),
        (lambda f: write_column(f, "input_ids", [[0.5]]), r"of type list<(element|item): double> instead"),
        (compressed, r"train.arrow is compressed"),
        (unlisted, r"data-00000-of-00001.arrow is damaged \(|cannot be read: .*No such file"),
        (shuffled, r"dataset.flatten_indices\(\)"),
    ],
)
def test_what_is_wrong_with_columns(write, message, tmp_path):
    write(tmp_path)
    with pytest.raises(DatasetError, match=message) as error:
        open_path(str(tmp_path), "bytes", str(tmp_path))
    assert "\n" not in str(error.value)


def test_nulls_are_refused(tmp_path):
    draw(50).astype("<u2").tofile(tmp_path / "any.bin")
    for rows in ([[1, 2], None, [3]], [[1, None], [2]]):
        content = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        pq.write_table(content, tmp_path / "x.parquet")
        train = open_path(str(tmp_path / "x.parquet"), "bytes", str(tmp_path / "any.bin")).splits["train"]
        with pytest.raises(DatasetError, match="null"):
            train.read(np.array([0]), 1)
        columns._row_group.cache_clear()
        with pa.ipc.new_stream(tmp_path / "x.arrow", content.schema) as out:
            out.write_table(content)
        with pytest.raises(DatasetError, match="null"):
            open_path(str(tmp_path / "x.arrow"), "bytes", str(tmp_path / "any.bin"))


def test_tokenizers(tmp_path):
    nanogpt(tmp_path, draw(300), draw(50))
    with pytest.raises(DatasetError, match=r"train.bin has no tokenizer with it: set dataset.tokenizer"):
        open_path(str(tmp_path))
    with pytest.raises(DatasetError, match=r"^dataset.tokenizer=gpt3: there are bytes, gpt2"):
        open_path(str(tmp_path), "gpt3")


@pytest.mark.parametrize("wrong", [257, -1, 2**32 + 5])
def test_an_id_beyond_the_vocabulary_is_an_error_where_it_is_read(wrong, tmp_path):
    ids = draw(300)
    ids[77] = wrong
    write_megatron(tmp_path / "train", [ids], "<i8", 5)
    write_megatron(tmp_path / "val", [draw(50)])
    train = open_path(str(tmp_path), "bytes").splits["train"]
    train.read(np.array([0, 2, 5]), 20)
    with pytest.raises(DatasetError, match=rf"train.bin: token 77 is the id {wrong % 2**64}, .* has 257 ids"):
        train.read(np.array([0, 3, 2]), 20)


def test_ids_of_16_bits_are_too_narrow_for_a_large_vocabulary(tmp_path, monkeypatch):
    nanogpt(tmp_path, draw(300), draw(50))
    monkeypatch.setattr(tokenizers.ByteTokenizer, "vocab_size", 128_000)
    with pytest.raises(DatasetError, match=r"no header, so its ids are of 16 bits, .* 128000 ids"):
        open_path(str(tmp_path), "bytes")


def test_the_readmes_commands_fit_their_formats(random_dataset, tmp_path, monkeypatch):
    """Each names its format's data, here written small; bytes stand in for the tokenizers that are named."""
    text = (ROOT / "docs/how-to/formats.md").read_text().replace("\\\n", " ")
    commands = [dict(re.findall(r"--config\.([\w.]+)=(\S+)", line)) for line in text.splitlines()]
    commands = [fields for fields in commands if "dataset.tokenizer" in fields]
    rows = draw(50 * 2049).reshape(50, 2049)
    written = {
        "nanoGPT": lambda folder: nanogpt(folder, draw(300), draw(50)),
        "llm.c": lambda folder: llm_c(folder, draw(300), draw(50)),
        "Megatron": lambda folder: write_megatron(folder / "document", rows, parts=21),
        "Arrow": lambda folder: dataset_dict(folder, draw(300), draw(50)),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizers, "find", lambda choice, **more: tokenizers.ByteTokenizer())
    for fields, (format, write) in zip(commands, written.items(), strict=True):
        Path(fields["dataset.path"]).mkdir(parents=True)
        write(Path(fields["dataset.path"]))
        if validation := fields.get("dataset.validation_path"):
            Path(validation).parent.mkdir(exist_ok=True)
            Path(validation).symlink_to(random_dataset)
        dataset = open_path(fields["dataset.path"], fields["dataset.tokenizer"], validation or "")
        assert dataset.info["format"] == format
        if length := fields.get("model.context_length"):
            assert dataset.splits["train"].is_stored(int(length))


def test_prepared_datasets_have_their_own(random_dataset):
    assert open_path(str(random_dataset)).layout(5) == "prepared"
    for arguments in (("bytes",), ("", "elsewhere")):
        with pytest.raises(DatasetError, match="has its own; leave it empty"):
            open_path(str(random_dataset), *arguments)


def test_row_groups_are_decompressed_once_in_order_and_few_are_kept(tmp_path, monkeypatch):
    parquet(tmp_path, draw(1003), draw(90, seed=1))
    train = open_path(str(tmp_path), "bytes").splits["train"]
    columns._row_group.cache_clear()
    for sequence in range(train.sequences(LENGTH)):
        train.read(np.array([sequence]), LENGTH)
    groups = sum(pq.ParquetFile(path).num_row_groups for path in tmp_path.glob("train*"))
    about = columns._row_group.cache_info()
    assert groups > 10
    assert about.misses == groups
    assert about.currsize == columns.ROW_GROUPS


OPEN = """
import resource, sys
import numpy as np
import pyarrow.parquet
from trainit.data.formats.detect import open_path

def used():
    _, resident, of_files, *_ = map(int, open("/proc/self/statm").read().split())
    return np.array([resident - of_files, of_files]) * resource.getpagesize()

open_path(sys.argv[2], "bytes").splits["train"].read(np.array([0]), 7)
before = used()
dataset = open_path(sys.argv[1], "bytes")
train = dataset.splits["train"]
train.read(np.arange(0, train.sequences(2048), train.sequences(2048) // 20), 2048)
print(*used() - before)
"""


def large_bin(path: Path):
    with path.open("wb") as file:
        file.truncate(1 << 36)  # of which nothing is on disk


def large_arrow(path: Path):
    """256 MB in record batches of a MB."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1 << 18, np.int32)), 2048)
    content = pa.table({"input_ids": column})
    with pa.ipc.new_stream(path, content.schema) as out:
        for _ in range(256):
            out.write_table(content)


@pytest.mark.parametrize("suffix", ["bin", "arrow"])
def test_opening_does_not_read_the_data(suffix, tmp_path):
    write = {"bin": large_bin, "arrow": large_arrow}[suffix]
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
        for name in ("train", "val"):
            if suffix == "bin":
                draw(50).astype("<u2").tofile(tmp_path / folder / f"{name}.bin")
            else:
                write_arrow(tmp_path / folder / f"{name}.arrow", [draw(50)])
    write(tmp_path / "large" / f"train.{suffix}")
    command = [sys.executable, "-c", OPEN, tmp_path / "large", tmp_path / "small"]
    own, of_files = map(int, subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert own < 8 << 20
    assert of_files < 128 << 20  # the system maps what surrounds a page as well, if it has it in memory


@pytest.mark.evidence(
    "tokens in the formats of other programs: a run's losses are the same as from a prepared dataset"
)
def test_a_run(random_dataset, tmp_path):
    """Trained on nanoGPT's files: the same losses as on the dataset that the tokens come from."""
    (tmp_path / "data").mkdir()
    for name, file in (("train", "train.bin"), ("validation", "val.bin")):
        shards = sorted(random_dataset.glob(f"{name}-*.tokens"))
        ids = np.concatenate([np.fromfile(shard, "<u2") for shard in shards])
        ids.tofile(tmp_path / "data" / file)
    tiny = f"--config={ROOT}/tests/tiny.py", *TWO, "--config.steps=6", "--config.eval.every_steps=3"
    run_imported(*tiny, f"--config.dataset.path={random_dataset}", f"--workdir={tmp_path}/ours")
    theirs = (
        *(*tiny, f"--config.dataset.path={tmp_path}/data", "--config.dataset.tokenizer=bytes"),
        "--config.dataset.workers=1",
    )
    output = run_imported(*theirs, f"--workdir={tmp_path}/theirs")
    assert f"{tmp_path}/data: nanoGPT, read as one stream, " in output
    names = ("step", "train/loss", "valid/loss", "valid/bits_per_byte")
    ours, read = (
        [{name: record.get(name) for name in names} for record in metrics(tmp_path / folder)]
        for folder in ("ours", "theirs")
    )
    assert read == ours
    assert read[-1]["valid/bits_per_byte"] > 1
    # An id that is not in the vocabulary ends a run with one line that says which.
    ids = np.fromfile(tmp_path / "data" / "train.bin", "<u2")
    ids[::50] = 300
    ids.tofile(tmp_path / "data" / "train.bin")
    output = run_imported(*theirs, f"--workdir={tmp_path}/wrong", expect=2)
    assert "is the id 300, but dataset.tokenizer has 257 ids" in output


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8"])
def test_wide_ids_without_a_header_are_not_read_as_pairs(dtype, tmp_path):
    """Every other id would be 0."""
    nanogpt(tmp_path, draw(300), draw(50))
    assert open_path(str(tmp_path), "bytes").splits["train"].tokens == 300
    draw(300).astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(DatasetError, match=r"train.bin has ids of more than 16 bits without a header"):
        open_path(str(tmp_path), "bytes")


def test_the_train_file_is_no_validation(tmp_path):
    nanogpt(tmp_path, draw(300), draw(50))
    (tmp_path / "link.bin").symlink_to("train.bin")
    train = str(tmp_path / "train.bin")
    for same in (train, str(tmp_path / "link.bin")):
        with pytest.raises(DatasetError, match=r"train.bin is in dataset.path=.* and in validation_path="):
            open_path(train, "bytes", same)
    assert open_path(train, "bytes", str(tmp_path / "val.bin")).splits["validation"].tokens == 50


def test_json_lines_as_a_dataset_s_path(tmp_path):
    """The first mistake of many: the message names the group that reads them."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(DatasetError, match="need --config=FILE:dataset=jsonl"):
            open_path(str(path), "bytes")
