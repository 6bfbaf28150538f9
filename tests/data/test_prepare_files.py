"""Preparing from files: the same bytes whoever did the work and however it was stopped."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from corpus import TEXT
from processes import ROOT

from trainit.__main__ import main as trainit_command
from trainit.data.dataset import open_dataset
from trainit.prepare import merge
from trainit.prepare.verify import verify
from trainit.prepare.writer import GrowingFile
from trainit.tokenizers import SentencePieceTokenizer

WORDS = TEXT.split(" ")
SMALL = ["--shard_tokens=20000", "--unit_bytes=1"]


def write(path: Path, rows: list[tuple[str, str]]):
    lines = "".join(json.dumps({"text": t, "meta": {"pile_set_name": s}}) + "\n" for t, s in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines) if path.name.endswith(".zst") else lines)


def documents(count: int, seed: int, size: int = 300) -> list[tuple[str, str]]:
    draw = np.random.default_rng(seed)
    return [
        (" ".join(draw.choice(WORDS, draw.integers(0, size))), f"set {draw.integers(0, 3)}")
        for _ in range(count)
    ]


def command(*args) -> list[str]:
    return [sys.executable, "-m", "trainit", "prepare", *map(str, args)]


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files of a finished dataset."""
    assert not (folder / "unfinished").exists()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def read_back(folder: Path, split: str) -> list[tuple[str, str]]:
    """Text and subset of every document, in order, by the index."""
    dataset, result = open_dataset(folder), []
    for path in map(Path, dataset.splits[split].paths):
        ids = np.fromfile(path, dataset.info["dtype"])
        starts = np.fromfile(path.with_suffix(".documents"), "<u8").astype(int)
        subsets = np.fromfile(path.with_suffix(".subsets"), "<u2")
        for begin, end, subset in zip(starts, [*starts[1:], len(ids)], subsets, strict=True):
            assert ids[end - 1] == dataset.tokenizer.end_of_text
            text = dataset.tokenizer.decode(ids[begin : end - 1].tolist())
            result.append((text, dataset.info["subsets"][subset]))
    return result


def check_counts(folder: Path):
    """Counts by subset in dataset.json, against the documents counted one by one."""
    info = json.loads((folder / "dataset.json").read_text())
    for name, split in info["splits"].items():
        expected = {}
        for text, subset in read_back(folder, name):
            row = expected.setdefault(subset, {"documents": 0, "bytes": 0})
            row["documents"] += 1
            row["bytes"] += len(text.encode("utf8", "surrogatepass"))
        there = {s: {k: row[k] for k in ("documents", "bytes")} for s, row in split["subsets"].items()}
        assert there == expected
        assert sum(row["tokens"] for row in split["subsets"].values()) == split["tokens"]
        assert split["tokens"] == sum(shard["tokens"] for shard in split["shards"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five files to train, one to validate; one document is long, and some stand twice."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [documents(150, seed) for seed in range(6)]
    rows[3][7] = (" ".join(WORDS * 200), "long")
    rows[2] += rows[0][:40] + rows[5][:10]
    rows[4] += [("", "set 0")] * 3
    for i in range(5):
        write(folder / "train" / f"{i}.jsonl{'.zst' * (i % 2)}", rows[i])
    write(folder / "val.jsonl", rows[5])
    return folder


def arguments(corpus: Path, *more) -> list[str]:
    return [f"--input={corpus}/train/*", f"--validation={corpus}/val.jsonl", *SMALL, *more]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[str, Path]:
    """The corpus prepared by one process, without and with duplicates left out."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, more in (("plain", []), ("unique", ["--deduplicate"])):
        flags = "--tokenizer=gpt2", "--workers=1", f"--output={folder / name}"
        assert trainit_command(["prepare", *arguments(corpus, *flags), *more]) == 0
    return {name: folder / name for name in ("plain", "unique")}


def test_documents_come_back_with_their_subsets(corpus, undisturbed):
    expected = []
    for path in sorted((corpus / "train").iterdir()):
        lines = path.read_bytes()
        lines = zstandard.decompress(lines) if path.suffix == ".zst" else lines
        expected += [(r["text"], r["meta"]["pile_set_name"]) for r in map(json.loads, lines.splitlines())]
    assert read_back(undisturbed["plain"], "train") == expected
    assert len(open_dataset(undisturbed["plain"]).splits["train"].paths) > 10
    check_counts(undisturbed["plain"])


def test_duplicates_are_left_out_everywhere(undisturbed):
    """The first of equals stays, and validation keeps what train has too."""
    plain = read_back(undisturbed["plain"], "train")
    validation = read_back(undisturbed["plain"], "validation")
    seen = {text for text, _ in validation}
    expected = [(t, s) for t, s in plain if not (t in seen or seen.add(t))]
    assert len(expected) < len(plain) - 40
    assert read_back(undisturbed["unique"], "train") == expected
    check_counts(undisturbed["unique"])
    assert not any(verify(undisturbed["unique"]))
    info = json.loads((undisturbed["unique"] / "dataset.json").read_text())
    lost = len(validation) - len({text for text, _ in validation})
    assert info["duplicates"] == len(plain) - len(expected) + lost


@pytest.mark.parametrize("at_once", [1 << 20, 64])
def test_duplicates_against_a_dict(at_once, tmp_path):
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 256, (300, 16)).astype(np.uint8)
    files, seen, expected = [], set(), []
    for i in range(4):
        chosen = hashes[draw.integers(0, 300, 100 * i)]
        files.append(tmp_path / str(i))
        chosen.tofile(files[-1])
        again = [n for n, row in enumerate(chosen) if row.tobytes() in seen or seen.add(row.tobytes())]
        expected.append(again)
    assert [found.tolist() for found in merge.duplicates(files, at_once)] == expected


@pytest.mark.evidence("preparing shared by tasks and workers: the same files, byte for byte")
@pytest.mark.parametrize("kind", ["plain", "unique"])
def test_tasks_and_workers_make_the_same_bytes(kind, corpus, undisturbed, tmp_path):
    """Three tasks at once with a worker or two each, joined; joining early is refused."""
    more = arguments(corpus, "--tokenizer=gpt2", *["--deduplicate"] * (kind == "unique"))
    flags = [*more, f"--output={tmp_path / 'tasks'}"]
    tasks = [start(*flags, f"--shard={i}/3", f"--workers={i % 2 + 1}") for i in (1, 2)]
    assert [task.wait(timeout=60) for task in tasks] == [0, 0]
    assert trainit_command(["prepare", *flags, "--join"]) == 1
    assert trainit_command(["prepare", *flags, "--shard=3/3", "--workers=1"]) == 0
    assert trainit_command(["prepare", *flags, "--join"]) == 0
    assert content(tmp_path / "tasks") == content(undisturbed[kind])
    assert trainit_command(["prepare", *flags, "--workers=1"]) == 0  # is finished already


def test_a_join_that_was_stopped_is_done_again(corpus, undisturbed, tmp_path, monkeypatch):
    """Stopped when all shards are in their places but dataset.json is not."""
    flags = "--tokenizer=gpt2", "--deduplicate", "--workers=1", f"--output={tmp_path}/out"
    write, full = merge.write_atomically, OSError(28, "No space left on device")

    def fail(path, content):
        if path.name == "dataset.json":
            raise full
        write(path, content)

    monkeypatch.setattr(merge, "write_atomically", fail)
    assert trainit_command(["prepare", *arguments(corpus, *flags)]) == 1
    monkeypatch.undo()
    assert trainit_command(["prepare", *arguments(corpus, *flags)]) == 0
    assert content(tmp_path / "out") == content(undisturbed["unique"])


KILLED = """
import os, signal, sys
from trainit.__main__ import main
from trainit.prepare import prepare
join, (output, arguments) = prepare.join, (sys.argv[1], sys.argv[2:])

def run(kill_at):
    count = 0
    def look(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    def watched(*args):
        sys.addaudithook(look)
        return join(*args)
    prepare.join = watched
    os._exit(main(["prepare", f"--output={output}-{kill_at}", *arguments]))

kill_at, status = 0, 9
while status == 9:
    kill_at += 1
    if not (process := os.fork()):
        run(kill_at)
    status = os.waitpid(process, 0)[1]
print(kill_at)
"""


def test_a_join_that_was_killed_leaves_nothing(tmp_path):
    """Killed before each of its operations on files; the same command makes the same folder."""
    for name, seed in (("train", 0), ("val", 1)):
        write(tmp_path / f"{name}.jsonl", documents(12, seed) * 2)
    flags = [f"--input={tmp_path}/train.jsonl", f"--validation={tmp_path}/val.jsonl", "--deduplicate"]
    flags += ["--tokenizer=bytes", "--workers=1", "--shard_tokens=9000"]
    killed = [sys.executable, "-c", KILLED, f"{tmp_path}/out", *flags]
    output = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    last = int(output.split()[-1])
    assert last > 50
    undisturbed = content(tmp_path / f"out-{last}")
    for kill_at in range(1, last):
        assert trainit_command(["prepare", f"--output={tmp_path}/out-{kill_at}", *flags]) == 0
        assert content(tmp_path / f"out-{kill_at}") == undisturbed, kill_at


@pytest.mark.evidence("preparing killed and stopped again and again: the same files, byte for byte")
def test_kills_and_stops_change_nothing(corpus, undisturbed, tmp_path):
    """kill -9 at random moments, then SIGTERM, each followed by the same command again."""
    draw, flags = np.random.default_rng(1), ["--tokenizer=gpt2", f"--output={tmp_path / 'out'}"]
    slow = (
        "import sys, time; from trainit.data.documents import decompress, reader;"
        "from trainit.__main__ import main; from trainit.prepare import workers;"
        "reader.BATCH, decompress.CHUNK = 20_000, 5_000;"
        "workers.COMMIT_SECONDS = 0; write = workers.UnitWriter.write\n"
        "def slowly(*args): time.sleep(0.05); write(*args)\n"
        "workers.UnitWriter.write = slowly; sys.exit(main(['prepare', *sys.argv[1:]]))"
    )
    journals, finished = set(), False
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *arguments(corpus, *flags), f"--workers={attempt % 2 + 1}"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = _journals(tmp_path)
        while process.poll() is None and _journals(tmp_path) == before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGTERM if attempt == 4 else signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (0, -9, 75), errors
        finished = process.returncode == 0
        journals.add(_journals(tmp_path))
        if attempt == 4:
            assert finished or (process.returncode == 75 and "stopped on request" in errors)
    assert len(journals) == 6 and not finished  # each of them did a part of the work
    assert trainit_command(["prepare", *arguments(corpus, *flags), "--workers=1"]) == 0
    assert content(tmp_path / "out") == content(undisturbed["plain"])


def _journals(folder: Path) -> str:
    files = sorted((folder / "out" / "unfinished").glob("*-?????.json"))
    return "".join(file.read_text() for file in files)


def test_awkward_and_huge_documents(tmp_path):
    """50 MB with and without spaces, in bounded memory; a .txt that goes in piece by piece."""
    word = "a long document, été 😀 and more\n"
    rows = [
        (word * (50_000_000 // len(word.encode())), ""),
        ("", "e"),
        ("NUL \x00 \ud83d lone", "e"),
        ("x" * 1_000_000, ""),
    ]
    write(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.txt").write_text(word * 100_000)
    (tmp_path / "val.txt").write_text("validation")
    flags = [f"--input={tmp_path}/in.*", f"--validation={tmp_path}/val.txt", "--tokenizer=gpt2"]
    code = (
        "import pathlib, re, sys; from trainit.__main__ import main; code = main(['prepare', *sys.argv[1:]]);"
        # ru_maxrss would be at least that of the process which has started this one.
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) >> 10); sys.exit(code)"
    )
    flags += [f"--output={tmp_path}/out", "--workers=1"]
    output = subprocess.check_output([sys.executable, "-c", code, *flags], cwd=ROOT, text=True)
    assert int(output.split()[-1]) < 1430  # MiB: 1.5 GB
    assert read_back(tmp_path / "out", "train") == [*rows, (word * 100_000, "")]


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_other_tokenizers(tokenizer, corpus, tmp_path):
    """One of them trained on the way, on the input's own beginning."""
    if tokenizer == "sentencepiece":
        tokenizer = f"sentencepiece:{tmp_path}/made/m.model"
        train = arguments(corpus, f"--tokenizer={tokenizer}", "--train_tokenizer", "--vocab_size=400")
        assert trainit_command(["prepare", *train]) == 0
        SentencePieceTokenizer((tmp_path / "made/m.model").read_bytes())
    flags = arguments(corpus, f"--tokenizer={tokenizer}", f"--output={tmp_path}/out", "--workers=1")
    assert trainit_command(["prepare", *flags]) == 0
    rows = [json.loads(line) for line in (corpus / "val.jsonl").read_text().splitlines()]
    assert read_back(tmp_path / "out", "validation") == [
        (row["text"], row["meta"]["pile_set_name"]) for row in rows
    ]
    assert not any(verify(tmp_path / "out"))


def test_validation_by_hash(corpus, tmp_path):
    """Documents are put aside by what they say: equal ones together, about as many as asked for."""
    flags = [f"--input={corpus}/train/*", "--validation_fraction=0.2", "--tokenizer=bytes", "--workers=1"]
    assert trainit_command(["prepare", *flags, f"--output={tmp_path}/out"]) == 0
    train, validation = (read_back(tmp_path / "out", name) for name in ("train", "validation"))
    assert not set(train) & set(validation)
    assert 0.12 < len(validation) / len(train + validation) < 0.28
    for text, _ in validation[:20]:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big")
        assert number < 0.2 * 2**64
    check_counts(tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ('{"text": "some text"}', ["--validation_fraction=1e-9"], "split validation has no text to use"),
        ('{"text": "some text"}', ["--validation=empty.jsonl"], "split validation has no text to use"),
        ('{"text": "some text"}', ["--validation=blank.jsonl"], "split validation has no text to use"),
        ('{"text": ""}\n\n', ["--validation=full.jsonl"], "split train has no text to use"),
        ("", ["--validation_fraction=0.5"], "split train has no text to use"),
    ],
)
def test_a_split_without_text_is_an_error(train, validation, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(train)
    for name, text in (("full", '{"text": "ab"}'), ("empty", ""), ("blank", '{"text": ""}\n{"text": ""}')):
        Path(f"{name}.jsonl").write_text(text)
    flags = ["--input=train.jsonl", *validation, "--tokenizer=bytes", "--workers=1", "--output=out"]
    for _ in range(2):  # once finished, too
        assert trainit_command(["prepare", *flags]) == 1
        assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_size_is_refused(corpus, tmp_path, capsys):
    flags = arguments(corpus, f"--tokenizer=sentencepiece:{tmp_path}/m.model", "--train_tokenizer")
    assert trainit_command(["prepare", *flags, "--vocab_size=400"]) == 0
    model = (tmp_path / "m.model").read_bytes()
    assert trainit_command(["prepare", *flags, "--vocab_size=500"]) == 2
    assert f"--vocab_size=500, but {tmp_path}/m.model has 400 ids" in capsys.readouterr().err
    assert trainit_command(["prepare", *flags, "--vocab_size=400"]) == 0
    assert (tmp_path / "m.model").read_bytes() == model


def test_broken_input(tmp_path, capsys):
    """Stops with file, line and reason; or counts and lists. A torn file is never a success."""
    write(tmp_path / "a.jsonl", documents(20, 0))
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:5], b'{"text": \n', *lines[5:], b"\xff\n"]))
    flags = [f"--input={tmp_path}/*.jsonl*", "--validation_fraction=0.1", "--tokenizer=bytes", "--workers=1"]
    flags.append(f"--output={tmp_path}/out")
    assert trainit_command(["prepare", *flags]) == 1
    (message,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "a.jsonl: line 6: invalid JSON at character" in message
    assert trainit_command(["prepare", *flags, "--on_error=skip"]) == 2  # was begun otherwise
    assert "on_error=stop, not skip" in capsys.readouterr().err
    flags[-1] += "2"
    assert trainit_command(["prepare", *flags, "--on_error=skip"]) == 0
    info = json.loads((tmp_path / "out2/dataset.json").read_text())
    assert info["broken"]["count"] == 2
    assert [row[:2] for row in info["broken"]["list"]] == [["a.jsonl", 6], ["a.jsonl", 22]]
    assert sum(split["documents"] for split in info["splits"].values()) == 20
    write(tmp_path / "b.jsonl.zst", documents(300, 1))
    torn = (tmp_path / "b.jsonl.zst").read_bytes()
    (tmp_path / "b.jsonl.zst").write_bytes(torn[: len(torn) // 2])
    flags[-1] += "3"
    for _ in range(2):  # once finished, too
        assert trainit_command(["prepare", *flags, "--on_error=skip"]) == 1
        assert "1 files are damaged or truncated" in capsys.readouterr().err
    info = json.loads((tmp_path / "out23/dataset.json").read_text())
    assert info["broken"]["damaged_files"] == 1
    assert "truncated zstd frame" in info["broken"]["list"][-1][2]


def test_a_dead_worker_is_an_error(corpus, tmp_path):
    process = start(*arguments(corpus, "--tokenizer=gpt2", f"--output={tmp_path}/out", "--workers=2"))
    children = []
    while process.poll() is None and len(children) < 2:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
        children = found.stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "a worker process died" in output


def test_a_subset_field_that_no_document_has_is_named(tmp_path, capsys):
    rows = [{"raw.text": "a", "set": "x"}, {"raw.text": "b", "set": None}, {"raw.text": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--input={tmp_path}/a.jsonl", "--tokenizer=bytes", "--text_field=raw.text", "--workers=1"]
    flags += ["--validation_fraction=0.5"]
    for field, names in (("set", ["x", ""]), ("sets", [""])):
        output = tmp_path / field
        assert trainit_command(["prepare", *flags, f"--subset_field={field}", f"--output={output}"]) == 0
        assert json.loads((output / "dataset.json").read_text())["subsets"] == names
        named = f"no document has a subset: --subset_field={field} is missing" in capsys.readouterr().out
        assert named == (names == [""])


def test_verify_names_what_is_torn(undisturbed, tmp_path, capsys):
    copy = shutil.copytree(undisturbed["plain"], tmp_path / "copy")
    assert trainit_command(["verify", str(copy)]) == 0
    count = len([file for file in copy.iterdir() if file.is_file()]) - 1
    assert capsys.readouterr().out == f"{copy}: {count} files were compared with dataset.json\n"
    for part in ("tokens", "documents", "subsets"):
        path = copy / f"train-00001-00000.{part}"
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        (copy / "train-00000-00000.bytes").rename(copy / "moved")
        assert trainit_command(["verify", str(copy)]) == 1
        first, second, _ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{copy}/train-00000-00000.bytes: No such file")
        assert second.startswith(f"{copy}/train-00001-00000.{part} has SHA-256")
        (copy / "moved").rename(copy / "train-00000-00000.bytes")
        path.write_bytes(good)
    # A hash that fits does not help ids that the vocabulary lacks.
    path = copy / "train-00001-00000.tokens"
    ids = np.fromfile(path, "<u2")
    ids[3] = 60_000
    ids.tofile(path)
    info = json.loads((copy / "dataset.json").read_text())
    (shard,) = (s for s in info["splits"]["train"]["shards"] if s["file"] == path.name)
    shard["sha256"]["tokens"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "dataset.json").write_text(json.dumps(info))
    assert trainit_command(["verify", str(copy)]) == 1
    assert f"{path} has the id 60000; the vocabulary has 50257" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inputs=a"], "unknown flag --inputs, did you mean --input?"),
        (["--output=x"], "--input= is missing"),
        (["--tokenizer=bytes", "--output=x"], "--input= is missing"),
        (["--input=nowhere/*", "--tokenizer=bytes", "--output=x", "--validation=y"], "no such file"),
        ([f"--input={ROOT}/README.md", "--tokenizer=bytes", "--output=x", "--validation=y"], ".jsonl.zst"),
        (["--input=x", "--tokenizer=bytes", "--output=x"], "--validation_fraction"),
        (["--input=x", "--tokenizer=bytes", "--output=x", "--validation=y", "--workers=0"], "--workers=0"),
    ],
)
def test_usage(flags, message, capsys):
    assert trainit_command(["prepare", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "²/3"])
def test_shards_count_from_one(shard, corpus, tmp_path, capsys):
    flags = ["--tokenizer=bytes", f"--output={tmp_path}/out", f"--shard={shard}"]
    assert trainit_command(["prepare", *arguments(corpus, *flags)]) == 2
    assert "the first is 1/30" in capsys.readouterr().err


def test_a_link_to_the_train_file_is_no_validation(tmp_path, capsys):
    write(tmp_path / "t.jsonl", documents(9, 0))
    (tmp_path / "v.jsonl").symlink_to("t.jsonl")
    flags = ["--tokenizer=bytes", "--workers=1", f"--output={tmp_path}/out"]
    flags += [f"--input={tmp_path}/t.jsonl", f"--validation={tmp_path}/v.jsonl"]
    assert trainit_command(["prepare", *flags]) == 2
    assert f"{tmp_path}/t.jsonl is in --input and in --validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("", 2, "--output= is missing"),  # as an unset variable of a shell gives it
        ("file", 1, "file/unfinished: Not a directory"),
        ("empty", 1, "empty/dataset.json is damaged ("),
        ("other", 1, "other/dataset.json is damaged (KeyError('source')): remove its folder"),
        ("begun", 1, "begun/unfinished/recipe.json is damaged ("),
    ],
)
def test_outputs_that_cannot_be(output, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.jsonl", documents(9, 0))
    for name, content in (("empty/dataset.json", ""), ("other/dataset.json", "{}")):
        Path(name).parent.mkdir()
        Path(name).write_text(content)
    Path("begun/unfinished").mkdir(parents=True)
    for name in ("file", "begun/unfinished/recipe.json"):
        Path(name).touch()
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    flags = ["--tokenizer=bytes", "--workers=1", f"--output={output}", "--input=t.jsonl"]
    assert trainit_command(["prepare", *flags, "--validation_fraction=0.2"]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert message in line
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_verify_of_a_damaged_description(tmp_path, capsys):
    (tmp_path / "dataset.json").write_text('{"format": ')
    assert trainit_command(["verify", str(tmp_path)]) == 1
    assert f"{tmp_path}/dataset.json is damaged" in capsys.readouterr().out


def test_a_full_disk_is_reported_with_the_file(tmp_path, capsys):
    """A shard's files while they grow, and the one that the join writes."""
    shard = GrowingFile(tmp_path / "a.tokens")
    named = rf"No space left on device: '{tmp_path}/a.tokens'"
    with Path("/dev/full").open("wb", buffering=0) as shard.file, pytest.raises(OSError, match=named):
        shard.write(np.zeros(9, np.uint8))
    write(tmp_path / "t.jsonl", documents(9, 0))
    full = tmp_path / "out/train-00000-00000.subsets"
    full.parent.mkdir()
    full.with_name(f"{full.name}.tmp").symlink_to("/dev/full")
    flags = ["--tokenizer=bytes", "--workers=1", f"--output={tmp_path}/out", "--validation_fraction=0.2"]
    assert trainit_command(["prepare", f"--input={tmp_path}/t.jsonl", *flags]) == 1
    assert f"error: {full}: No space left on device" in capsys.readouterr().err


def test_a_vocabulary_that_does_not_fit_the_texts_is_wrong_usage(tmp_path, capsys):
    write(tmp_path / "t.jsonl", documents(2, 0))
    flags = [f"--tokenizer=sentencepiece:{tmp_path}/m", "--train_tokenizer", "--vocab_size=9"]
    assert trainit_command(["prepare", f"--input={tmp_path}/t.jsonl", *flags]) == 2
    assert "sentencepiece cannot train with vocab_size=9" in capsys.readouterr().err
