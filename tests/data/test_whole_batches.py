"""dataset.whole_batches and eval.first: the order of modded-nanoGPT's loader."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from trainit import config as config_lib
from trainit.config import MESH_AXES, ConfigError, resolve
from trainit.data import training_data
from trainit.generate.evaluate import loaded
from trainit.optimizers import choices
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh

ROOT = Path(__file__).parents[2]
ROWS, LENGTH = 4, 8
BATCH = ROWS * LENGTH


def write(path, ids):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


@pytest.fixture
def shards(tmp_path):
    """Three shards: the rest of one, exactly two ids more than a batch, and one id too few for three."""
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 256, size) for size in (3 * BATCH + 17, BATCH + 2, 3 * BATCH + 1)]
    for number, ids in enumerate(found):
        write(tmp_path / f"fineweb_train_{number + 1:06}.bin", ids)
    write(tmp_path / "fineweb_val_000000.bin", np.arange(250))
    return found


def theirs(shards):
    """What the track's loader gives: batches in a row, and the next shard where not one id would be left."""
    for ids in shards:
        at = 0
        while at + BATCH + 1 < len(ids):
            for row in range(ROWS):
                begin = at + row * LENGTH
                yield ids[begin : begin + LENGTH + 1]
            at += BATCH


def opened(folder, **dataset):
    config = config_lib.defaults()
    config.update(batch_size=ROWS, steps=5)
    config.optimizer = choices()["adamw"]()
    config.model.update(dim=8, num_heads=1, num_blocks=1, context_length=LENGTH)
    config.dataset.update(
        path=str(folder), tokenizer="bytes", order="sequential", whole_batches=True, **dataset
    )
    return training_data.read(config, str(folder), resolve, folder)[1]


@pytest.mark.evidence("the order of tokens of modded-nanoGPT's loader, shard after shard, on .bin files")
def test_order_is_the_tracks(shards, tmp_path):
    expected = list(theirs(shards))
    data = opened(tmp_path)
    # Their loader ends there, ours begins again.
    count = len(expected)
    assert count == (3 + 1 + 2) * ROWS
    ids, lengths = data.rows.read(np.arange(2 * count), LENGTH)
    assert (lengths == LENGTH).all()
    np.testing.assert_array_equal(ids, expected * 2)


def test_validation_takes_the_first(shards, tmp_path):
    split, layout = (
        opened(tmp_path).validation,
        batch_sharding(make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])),
    )
    read = {
        first: [
            np.asarray(jax.device_get(batch["tokens"]))[0]
            for batch in training_data.validation_batches(split, 6, first, (1, 3, LENGTH), layout, None)
        ]
        for first in (True, False)
    }
    np.testing.assert_array_equal(
        np.concatenate(read[True]), [np.arange(LENGTH + 1) + row * LENGTH for row in range(6)]
    )
    assert np.concatenate(read[False])[-1][0] > 6 * LENGTH


def test_what_has_no_whole_batches(shards, tmp_path):
    with pytest.raises(ConfigError, match="is not for a dataset"):
        opened(tmp_path, mixture=f"{tmp_path} 1")
    for number in (1, 3):
        (tmp_path / f"fineweb_train_{number:06}.bin").unlink()
    write(tmp_path / "fineweb_train_000002.bin", np.arange(BATCH + 1))
    message = f"a batch of batch_size={ROWS} takes {BATCH + 2} ids of one shard, the largest has {BATCH + 1}"
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_an_evaluation_cuts_nothing():
    """Its batches are others than those of the run, which may be larger than a shard."""
    config = runpy.run_path(str(ROOT / "configs/track3.py"))["get_config"]()
    assert config.dataset.whole_batches
    wanted = loaded._config(config_lib.Config(config), None)
    assert (wanted.dataset.whole_batches, wanted.dataset.order) == (False, "sequential")
