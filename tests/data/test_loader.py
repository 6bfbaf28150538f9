"""Law 1: global batch t is a pure function of (dataset, seed, t), for whoever reads it."""

import hashlib
import json

import jax
import numpy as np
import pytest
from permutation_reference import reference
from processes import Fork, free_port
from read_batches import BATCHES, FIRST_ROW, LENGTH, ROWS, SEED

from trainit.data import loader
from trainit.data.dataset import open_dataset
from trainit.data.rows.order import Ordered, Shuffled, Spaced
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh


def expected_batches(folder) -> list[np.ndarray]:
    """The batches written out: the reference's shuffle over all tokens read at once."""
    info = json.loads((folder / "dataset.json").read_text())
    shards = info["splits"]["train"]["shards"]
    assert len(shards) > 2  # sequences cross from shard to shard
    tokens = np.concatenate([np.fromfile(folder / shard["file"], info["dtype"]) for shard in shards])
    count = -(-(len(tokens) - 1) // LENGTH)
    batches = []
    for t in range(BATCHES):
        batch = np.zeros((ROWS, LENGTH + 1), info["dtype"])
        for r in range(ROWS):
            position = FIRST_ROW + t * ROWS + r
            sequence = reference(position % count, count, SEED, position // count)
            piece = tokens[sequence * LENGTH : sequence * LENGTH + LENGTH + 1]
            batch[r, : len(piece)] = piece
        batches.append(batch)
    return batches


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.evidence(
    "global batches have the same hashes with 1, 2, 3 and 4 processes, and with 0, 1 and 2 workers"
)
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_processes_or_workers(processes, random_dataset, tmp_path):
    """Real processes, each with 0, 1 and 2 workers: the assembled batches' hashes."""
    address = f"localhost:{free_port()}"
    started = [
        Fork(random_dataset, tmp_path, address, processes, i, module="tests.data.read_batches")
        for i in range(processes)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    hashes = [digest(batch) for batch in expected_batches(random_dataset)]
    assert len(set(hashes)) == BATCHES
    for workers in (0, 1, 2):
        batches = np.zeros((BATCHES, ROWS, LENGTH + 1), np.uint16)
        readers = np.zeros((BATCHES, ROWS), int)
        for process in range(processes):
            part = np.load(tmp_path / f"{workers}-{process}.npz")
            for t in range(BATCHES):
                batches[t, part["rows"]] = part["tokens"][t]
                readers[t, part["rows"]] += 1
        assert (readers == 1).all()  # each process read its own rows and no others
        assert [digest(batch) for batch in batches] == hashes, f"{workers} workers"


@pytest.mark.parametrize("shape", [(1, 24), (3, 8), (6, 4)])
def test_micro_steps_and_meshes_only_arrange_the_rows(shape, random_dataset):
    split = open_dataset(random_dataset).splits["train"]
    order = Shuffled(split.sequences(LENGTH), SEED)
    expected = expected_batches(random_dataset)
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 1}):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = make_mesh(sizes | {"context": 1}, devices)
        batches = loader.batches(
            Ordered(split, order), (*shape, LENGTH), batch_sharding(mesh), FIRST_ROW, BATCHES
        )
        for batch, wanted in zip(batches, expected, strict=True):
            assert batch["tokens"].dtype == np.uint16
            assert batch["tokens"].sharding.spec == batch_sharding(mesh).spec
            np.testing.assert_array_equal(np.asarray(batch["tokens"]).reshape(ROWS, LENGTH + 1), wanted)


@pytest.mark.evidence("every token except a split's first is a target once an epoch")
def test_every_token_but_the_first_is_a_target_once_an_epoch(random_dataset):
    """Over one epoch of batches of 7, and over the next, in another order."""
    split = open_dataset(random_dataset).splits["train"]
    count = split.sequences(LENGTH)
    order = Shuffled(count, SEED)
    epochs = []
    for epoch in range(2):
        sequences = order(np.arange(epoch * count, (epoch + 1) * count))
        epochs.append(sequences)
        targets = np.zeros(split.tokens, int)
        _, lengths = split.read(sequences, LENGTH)
        for sequence, length in zip(sequences, lengths, strict=True):
            targets[sequence * LENGTH + 1 : sequence * LENGTH + 1 + length] += 1
        assert targets[0] == 0
        assert (targets[1:] == 1).all()
        # Shuffled: neighbours are hardly ever neighbours.
        assert np.mean(np.diff(sequences) == 1) < 0.02
    assert (epochs[0] != epochs[1]).mean() > 0.9


def test_order_is_that_of_the_permutation():
    """A run of positions over two epochs is what the permutation gives for each position by itself."""
    for count in (1, 2, 37, 1000, 65536, 70001, 262144, 262146):
        positions = np.arange(3 * count) if count < 2000 else np.arange(count - 2000, count + 2000, 3)
        expected = [reference(int(p) % count, count, 9, int(p) // count) for p in positions]
        assert Shuffled(count, 9)(positions).tolist() == expected
    assert Shuffled(3_000_000_000, 2**32 - 1)(np.array([2_999_999_999, 3_000_000_000])).max() < 3e9


def test_a_position_counts_only_in_its_order():
    """Checkpoints from before the shuffles had a version have another order, unless nothing was shuffled."""
    config = {"dataset": {"order": "shuffled"}, "model": {"context_length": 32}}
    meta = {"config": config, **loader.DataPosition(7).to_meta()}
    assert loader.has_same_order(meta)
    assert loader.DataPosition.from_meta(meta, 32) == loader.DataPosition(7)
    assert loader.DataPosition.from_meta(meta, 16) == loader.DataPosition(14)
    config["dataset"]["mixture"] = "web 1"
    assert loader.has_same_order(meta)
    assert not loader.has_same_order({**meta, "order": 2})  # the last version of which only mixtures differ
    del config["dataset"]["mixture"]
    assert loader.has_same_order({**meta, "order": 2})
    del meta["order"]
    assert not loader.has_same_order(meta)
    config["dataset"]["order"] = "sequential"
    assert loader.has_same_order(meta)
    config["dataset"]["streams"] = 4  # whose windows are shuffled
    assert not loader.has_same_order(meta)


def test_spaced_validation_covers_everything_once_or_evenly(random_dataset):
    assert Spaced(10, 10)(np.arange(12)).tolist() == [*range(10), -1, -1]
    assert Spaced(10, 4)(np.arange(5)).tolist() == [0, 2, 5, 7, -1]
    split = open_dataset(random_dataset).splits["validation"]
    ids, lengths = split.read(np.array([0, -1]), LENGTH)
    assert lengths.tolist() == [LENGTH, 0]
    assert not ids[1].any()


def test_a_dead_worker_is_an_error(random_dataset, tmp_path):
    """kill -9 of the reading process: the run ends with an error within seconds, not in a wait."""
    args = random_dataset, tmp_path, f"localhost:{free_port()}", 1, 0, "kill"
    process = Fork(*args, module="tests.data.read_batches")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "worker" in output.lower()
