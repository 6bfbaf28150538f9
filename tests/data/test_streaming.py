"""Training straight from .jsonl: every document once, the same batches whoever reads, exact resumes."""

import gzip
import itertools
import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import zstandard
from processes import ROOT, TWO, exact, last_step, metrics, run, run_imported, start, wait_for

from trainit.config import ConfigError, jsonl, resolve
from trainit.data import loader
from trainit.data.dataset import DatasetError, find_tokenizer
from trainit.data.documents import reader as readers
from trainit.data.documents.reader import BrokenInputError
from trainit.data.documents.targets import Targets
from trainit.data.jsonl import dataset as streaming
from trainit.data.jsonl.stream import Corpus, State, Stream, deal
from trainit.data.loader import DataPosition
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh
from trainit.tokenizers import ByteTokenizer

END = 256
LENGTH = 16
SETS = "alpha", "beta", "gamma"


def texts(count: int, seed: int) -> list[str]:
    """Documents, each unlike all others; some are longer than windows, one is empty."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 120, count)
    sizes[count // 2] = 3000
    drawn = ["".join(map(chr, draw.integers(97, 123, size))) for size in sizes]
    return [f"{seed}.{i} {text}" for i, text in enumerate(drawn)]


def lines(documents: list[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "meta": {"set": SETS[i % 3]}}) + "\n" for i, text in enumerate(documents)
    ).encode()


def write(folder, sizes: tuple[int, ...]) -> list[str]:
    """Writes `sizes` documents to files of all kinds in turn; returns all documents."""
    everything = []
    for i, size in enumerate(sizes):
        content = lines(documents := texts(size, i))
        everything += documents
        half = content.index(b"\n", len(content) // 2) + 1
        if i % 3 == 0:  # of two frames
            parts = content[:half], content[half:]
            (folder / f"{i}.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
        elif i % 3 == 1:  # with a blank line, and none at its end
            (folder / f"{i}.jsonl").write_bytes(content[:half] + b"\n" + content[half:-1])
        else:
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(content))
    return everything


def corpus_of(folder, streams: int, window: int, seed: int = 3, length: int = LENGTH) -> Corpus:
    validation = folder.with_name(folder.name + "-validation.jsonl")
    validation.write_bytes(lines(texts(20, 99)))
    config = jsonl(str(folder), str(validation))
    config.update(streams=streams, window=window)
    return streaming.open_files(config, ByteTokenizer(), seed, length, 8).corpus


def take(corpus: Corpus, number: int, count: int, state: State | None = None) -> np.ndarray:
    return Stream(corpus, number, state or State()).take(count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One big file for all streams, of a few thousand documents."""
    folder = tmp_path_factory.mktemp("streamed") / "train"
    folder.mkdir()
    write(folder, (600,))
    return folder


def documents_until_repeated(corpus: Corpus, number: int) -> list[str]:
    """A stream's documents up to the first that comes again, out of its unshuffled sequences."""
    stream, ids, seen = Stream(corpus, number, State()), [], []
    while True:
        ids += stream.take(1)[0, :-1].tolist()
        while END in ids:
            at = ids.index(END)
            text, ids = bytes(ids[:at]).decode(), ids[at + 1 :]
            if text in seen:
                return seen
            seen.append(text)


@pytest.mark.evidence("straight from `.jsonl`: every document once an epoch")
@pytest.mark.parametrize(
    ("sizes", "streams"), [((90,), 4), ((60, 60), 4), ((50, 9, 30), 2), ((40,) * 6, 2), ((30,) * 4, 4)]
)
def test_every_document_is_some_streams_once_an_epoch(sizes, streams, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    everything = write(folder, sizes)
    corpus = corpus_of(folder, streams, window=1)
    given = [documents_until_repeated(corpus, number) for number in range(streams)]
    assert Counter(itertools.chain.from_iterable(given)) == Counter(everything)
    assert min(map(len, given)) > 0


def test_epochs_have_orders_of_their_own(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    write(folder, (30,) * 8)
    corpus = corpus_of(folder, 2, 4)
    orders = [tuple(corpus.files(0, epoch)) for epoch in range(5)]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len(set(orders)) > 2


def test_files_are_dealt_to_groups_of_equal_size():
    assert deal([7], 16) == [[0]]  # all streams share it
    assert deal([5] * 32, 16) == [[i, i + 16] for i in range(16)]
    assert [len(files) for files in deal([100, 99, 101] * 10, 16)] == [15, 15]  # the Pile's 30 files
    assert deal([1000, 1], 4) == [[0, 1]]  # or half of all rows were those of the small one
    assert sorted(map(len, deal([6, 3, 3], 4))) == [1, 2]


def test_sequences_overlap_and_windows_are_shuffled(folder):
    plain = take(corpus_of(folder, 4, window=1), 1, 96)
    assert plain.shape == (96, LENGTH + 1)
    assert plain.dtype == np.uint16
    assert (plain[1:, 0] == plain[:-1, -1]).all()
    shuffled = take(corpus_of(folder, 4, window=32), 1, 96)
    orders = []
    for window in range(3):
        of_window = slice(32 * window, 32 * window + 32)
        expected = [tuple(row) for row in plain[of_window]]
        order = [expected.index(tuple(row)) for row in shuffled[of_window]]
        assert sorted(order) == list(range(32))
        assert np.mean(np.diff(order) == 1) < 0.2
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    assert (take(corpus_of(folder, 4, window=32, seed=4), 1, 32) != shuffled[:32]).any()


@pytest.mark.evidence("straight from `.jsonl`: the same batches after a resume at any position")
@pytest.mark.parametrize("sizes", [(90,), (30, 30, 30, 30)])
def test_resume_is_exact_at_any_position(sizes, tmp_path):
    """Over windows, files and epochs; a window of this stream is as long as its longest document."""
    folder = tmp_path / "train"
    folder.mkdir()
    write(folder, sizes)
    corpus = corpus_of(folder, 4, window=5)
    stream, rows, states = Stream(corpus, 2, State()), [], [State()]
    for _ in range(350):
        rows.append(stream.take(1)[0])
        states.append(State(*json.loads(json.dumps(stream.state))))
    assert states[-1].epoch > 0
    assert max(state.token for state in states) > 0
    for at in [*range(12), *range(30, 340, 23)]:
        np.testing.assert_array_equal(take(corpus, 2, 10, states[at]), rows[at : at + 10])


def batches_of(corpus, hosts: int, states, count: int, shape, monkeypatch, first_row=0):
    """The next batches (count, G, b, L + 1) out of what hosts read, and where all streams are afterwards."""
    layout = batch_sharding(make_mesh({"data": 1, "fsdp": 4, "tensor": 1, "context": 1}, jax.devices()[:4]))
    batches, behind = np.zeros((count, *shape[:2], shape[2] + 1), np.uint16), {}
    for host in range(hosts):
        mine = slice(host * shape[1] // hosts, (host + 1) * shape[1] // hosts)
        monkeypatch.setattr(loader, "local_rows", lambda *_, mine=mine: mine)
        reader = streaming.StreamReader(corpus, shape, layout, DataPosition(first_row, states))
        for t, record in enumerate(itertools.islice(reader.records(), count)):
            batches[t, :, mine] = record["tokens"]
            assert (record["lengths"] == shape[2]).all()
        behind |= reader.states_after[first_row + count * shape[0] * shape[1]]
    return batches, [list(behind[number]) for number in sorted(behind)]


@pytest.mark.evidence("straight from `.jsonl`: the same batches for 1, 2, 4 and 8 hosts' rows")
def test_batches_do_not_depend_on_hosts_or_micro_steps(folder, monkeypatch):
    """Nor do resumes: what one number of hosts has left, another one continues."""
    corpus = corpus_of(folder, 8, window=4)
    expected, _ = batches_of(corpus, 1, None, 9, (1, 16, LENGTH), monkeypatch)
    expected = expected.reshape(9, 16, LENGTH + 1)
    streams = np.stack([take(corpus, number, 18) for number in range(8)])
    np.testing.assert_array_equal(expected[3], streams[:, 6:8].reshape(16, -1))
    for before, after, shape in (
        (1, 2, (1, 16)),
        (2, 4, (1, 16)),
        (4, 1, (2, 8)),
        (2, 8, (2, 8)),
        (8, 2, (1, 16)),
    ):
        first, states = batches_of(corpus, before, None, 4, (*shape, LENGTH), monkeypatch)
        second, _ = batches_of(corpus, after, states, 5, (*shape, LENGTH), monkeypatch, first_row=4 * 16)
        joined = np.concatenate([first, second]).reshape(9, 16, LENGTH + 1)
        np.testing.assert_array_equal(joined, expected)


def test_batches_on_devices(folder):
    corpus = corpus_of(folder, 4, window=4)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    reader = streaming.StreamReader(corpus, (2, 8, LENGTH), batch_sharding(mesh), prefetch=1)
    batches = list(reader.batches(3))
    assert len(batches) == 3
    assert batches[0]["tokens"].sharding.spec == batch_sharding(mesh).spec
    expected = np.stack([take(corpus, number, 4) for number in range(4)]).reshape(2, 8, LENGTH + 1)
    np.testing.assert_array_equal(np.asarray(batches[0]["tokens"]), expected)


def test_the_first_batch_needs_the_beginning_of_the_files_alone(tmp_path, monkeypatch):
    folder = tmp_path / "train"
    folder.mkdir()
    letters = np.random.default_rng(0).integers(97, 123, (2000, 10_000), np.uint8)
    (folder / "0.jsonl.zst").write_bytes(
        zstandard.compress(lines([row.tobytes().decode() for row in letters]))
    )
    read = []
    chunks = readers.chunks

    def counted(*args):
        for chunk in chunks(*args):
            read.append(len(chunk))
            yield chunk

    monkeypatch.setattr(readers, "chunks", counted)
    take(corpus_of(folder, 4, window=8), 3, 8)
    assert 0 < sum(read) < 4 << 20


def test_broken_input_names_file_line_and_reason(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    good = lines(texts(50, 0)).splitlines(keepends=True)
    cases = {
        b'{"text": 1}\n': "line 31: field text is not a text",
        b'{"body": "a"}\n': "line 31: field text is missing",
        b'{"text": \n': "line 31: invalid JSON",
        b'{"text": "\xff"}\n': "line 31: invalid UTF-8",
    }
    for bad, message in cases.items():
        (folder / "a.jsonl").write_bytes(b"".join([*good[:30], bad, *good[31:]]))
        with pytest.raises(BrokenInputError, match=f"a.jsonl: {message}"):
            take(corpus_of(folder, 5, window=2), 0, 100)
        take(corpus_of(folder, 5, window=2), 1, 100)  # whose line it is not
    (folder / "a.jsonl").unlink()
    torn = zstandard.compress(b"".join(good))[:-20]
    (folder / "a.jsonl.zst").write_bytes(torn)
    with pytest.raises(BrokenInputError, match=r"a.jsonl.zst: after line \d+: truncated zstd frame"):
        take(corpus_of(folder, 5, window=2), 0, 500)


def test_files_that_change_or_go_are_noticed(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    documents = write(folder, (60, 60))
    corpus = corpus_of(folder, 1, window=4)
    stream = Stream(corpus, 0, State())
    stream.take(30)
    file = folder / "1.jsonl"
    content = file.read_bytes()
    state = stream.state
    while corpus.names[corpus.files(0, state.epoch)[state.file]] != file.name:
        stream.take(4)
        state = stream.state
    take(corpus, 0, 4, state)
    file.write_bytes(content.replace(b"}\n", b"}", 1).ljust(len(content)))  # a line less
    with pytest.raises(BrokenInputError, match=r"1.jsonl( has changed)?: line"):
        take(corpus, 0, 4, state)
    file.write_bytes(content[:-100])
    with pytest.raises(BrokenInputError, match=rf"1.jsonl has \d+ bytes; .* had {len(content)}"):
        take(corpus, 0, 4, state)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"1.jsonl"):
        take(corpus, 0, 4, state)
    assert corpus_of(folder, 1, 4).names == ("0.jsonl.zst",)
    assert documents


def test_what_cannot_work_is_said_before_the_run(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    with pytest.raises(DatasetError, match=r"dataset.path='.*/train': there is no such file \(.jsonl,"):
        corpus_of(folder, 1, 4)
    write(folder, (3,))
    with pytest.raises(DatasetError, match=r"stream 3 has no documents: .* dataset.streams=4"):
        take(corpus_of(folder, 4, 4), 3, 1)
    config = jsonl(str(folder), str(folder / "*"))
    with pytest.raises(DatasetError, match=r"is in dataset\.path and in dataset\."):
        streaming.open_files(config, ByteTokenizer(), 0, LENGTH, 8)
    (folder / "a.txt").write_text("text")
    config.path = str(folder / "a.txt")
    with pytest.raises(DatasetError, match=r"dataset.path: .*a.txt is no file that ends in one of .jsonl"):
        streaming.open_files(config, ByteTokenizer(), 0, LENGTH, 8)
    with pytest.raises(DatasetError, match=r"^dataset.tokenizer=gpt9: there are bytes, gpt2"):
        find_tokenizer("gpt9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 24}, "batch_size=24 is not a multiple of dataset.streams=16"),
        (
            {"batch_schedule": "10%: 256; 20%: 264"},
            "batch_schedule's size 264 is not a multiple of dataset.streams=16",
        ),
        ({"dataset.streams": 0}, "dataset.streams=0 must be above 0"),
        ({"dataset.window": 0}, "dataset.window=0 must be above 0"),
    ],
)
def test_config_errors(changes, message):
    from test_config import make

    config = make("dataset=jsonl")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        resolve(config, 50257)


def test_fingerprint_and_validation(folder):
    corpus = corpus_of(folder, 4, 8)
    dataset = streaming.StreamedData("", corpus, None)
    assert dataset.fingerprint == streaming.StreamedData("elsewhere", corpus, None).fingerprint
    for change in ({"streams": 8}, {"window": 9}, {"seed": 1}, {"sizes": (1,)}, {"text_field": "body"}):
        assert streaming.StreamedData("", replace(corpus, **change), None).fingerprint != dataset.fingerprint
    expected = [token for text in texts(600, 0) for token in [*text.encode(), END]]
    held = streaming.hold(corpus, "validation", 10)
    assert held.sequences(LENGTH) == 10
    assert held.tokens == 10 * LENGTH + 1
    ids, lengths = held.read(np.array([0, 9, -1]), LENGTH)
    assert ids[1].tolist() == expected[9 * LENGTH : 10 * LENGTH + 1]
    assert lengths.tolist() == [LENGTH, LENGTH, 0]
    assert held.bytes == sum(token != END for token in expected[: held.tokens])
    assert held.subsets == ("",)
    everything = streaming.hold(replace(corpus, subset_field="meta.set"), "validation", 0)
    assert everything.tokens == len(expected)
    assert everything.subsets == SETS
    of = [i % 3 for i, text in enumerate(texts(600, 0)) for _ in range(len(text.encode()) + 1)]
    for sequence in (0, 7, everything.sequences(LENGTH) - 1):
        targets = of[sequence * LENGTH + 1 : sequence * LENGTH + LENGTH + 1]
        numbers, _ = Targets(everything, corpus.tokenizer.token_bytes()).read(np.array([sequence]), LENGTH)
        assert numbers[0, : len(targets)].tolist() == targets


@pytest.fixture(scope="module")
def command(folder):
    validation = folder.with_name("validation.jsonl")
    validation.write_bytes(lines(texts(60, 98)))
    return (
        f"--config={ROOT}/tests/tiny.py:dataset=jsonl",
        f"--config.dataset.path={folder}",
        f"--config.dataset.validation_path={validation}",
        *("--config.dataset.tokenizer=bytes", "--config.dataset.streams=4", "--config.dataset.window=8"),
        "--config.dataset.subset_field=meta.set",
        *TWO,
    )


@pytest.mark.evidence("straight from `.jsonl`: a killed run resumes bit for bit")
def test_a_killed_run_goes_on_bit_for_bit(command, tmp_path):
    """Two worker processes, killed in the middle of a window; then a thread; against a thread all along."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    output = run_imported(*command, f"--workdir={calm}", "--config.dataset.workers=0")
    assert "GB in 4 streams with windows of 8 sequences to train, 1.28" in output
    process = start(*command, f"--workdir={killed}", "--config.dataset.workers=2")
    assert wait_for(process, lambda: last_step(killed) >= 7)
    process.kill()
    process.communicate(timeout=60)  # ends when the workers have, too
    assert last_step(killed) < 40
    run_imported(*command, f"--workdir={killed}", "--config.dataset.workers=0")
    assert exact(metrics(killed)) == exact(metrics(calm))
    last = metrics(calm)[-1]
    assert last["valid/bits_per_byte"] > 0
    for kind in ("loss", "bits_per_byte"):
        parts = [last[f"valid/{kind}/{name}"] for name in SETS]
        assert min(parts) <= last[f"valid/{kind}"] <= max(parts)
        assert last[f"valid/{kind}_macro"] == pytest.approx(np.mean(parts))


def test_a_batch_that_grows_is_the_run_gone_on_with_a_larger_one(command, tmp_path):
    """Bit for bit; streams continue from where they are, within a window."""
    plain = [*command, "--config.batch_size=8"]
    plain += ["--config.eval.every_steps=0", "--config.eval.sequences=8"]
    plain[0] += ",schedule=constant"
    plain += ["--config.schedule.warmup=1", "--config.dataset.workers=0"]
    grown = "--config.steps=6", "--config.batch_schedule=3: 16", f"--workdir={tmp_path}/grown"
    run_imported(*plain, *grown)
    by_hand = [*plain, f"--workdir={tmp_path}/by_hand"]
    run_imported(*by_hand, "--config.steps=3")
    larger = "--config.batch_size=16", "--config.checkpoint.overwrite_config=True"
    run_imported(*by_hand, "--config.steps=6", *larger)
    once, twice = (
        [(r["step"], r["tokens"], r["train/loss"]) for r in metrics(tmp_path / name)]
        for name in ("grown", "by_hand")
    )
    assert [tokens for _, tokens, _ in once] == [32 * n for n in (8, 16, 24, 40, 56, 72)]
    assert once == twice


def test_broken_input_ends_a_run(command, folder, tmp_path):
    """The error of a worker process reaches the terminal, and the exit code."""
    content = lines(texts(600, 0)).splitlines(keepends=True)
    content[99] = b"{\n"
    (tmp_path / "train.jsonl").write_bytes(b"".join(content))
    more = f"--workdir={tmp_path / 'run'}", f"--config.dataset.path={tmp_path / 'train.jsonl'}"
    *lines_before, last = run(*command, *more, expect=1).splitlines()
    assert last.startswith("trainit: error: train.jsonl: line 100: invalid JSON at character")
    assert not [line for line in lines_before if "Traceback" in line or "error" in line.lower()]
