"""The orders of training data: permutations, found at any position as quickly as at the first."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from permutation_reference import reference
from scipy import stats

from trainit.data.rows import order


@pytest.mark.parametrize("name", ["shuffled", "blocks", "sequential"])
@pytest.mark.parametrize(("sequences", "block"), [(1, 4), (7, 7), (96, 8), (101, 8), (5, 100)])
def test_every_epoch_is_a_permutation(name, sequences, block):
    made = order.make(name, sequences, block, 3)
    for epoch in (0, 1, 10**9):
        there = made(np.arange(epoch * sequences, (epoch + 1) * sequences))
        assert sorted(there.tolist()) == list(range(sequences))


@pytest.mark.parametrize("name", ["shuffled", "blocks"])
def test_epochs_and_seeds_differ(name):
    first, other = (order.make(name, 1000, 50, seed) for seed in (3, 40))
    epochs = [first(np.arange(e * 1000, (e + 1) * 1000)) for e in range(3)]
    for i, one in enumerate([*epochs, other(np.arange(1000))]):
        assert all((one != another).mean() > 0.9 for another in epochs[:i])


@pytest.mark.parametrize("name", ["shuffled", "blocks"])
def test_close_seeds_and_epochs_are_independent(name):
    """Two permutations agree at about one position, also those of seed 1, epoch 2 and seed 2, epoch 1."""
    pairs = list(itertools.product(range(8), range(8)))  # seed and epoch
    made = {seed: order.make(name, 400, 20, seed) for seed in range(8)}
    rows = np.array([made[seed](np.arange(epoch * 400, (epoch + 1) * 400)) for seed, epoch in pairs])
    agreeing = [(rows[i] == rows[i + 1 :]).sum(axis=1) for i in range(len(rows))]
    assert 0.9 < np.concatenate(agreeing).mean() < 1.1
    assert np.concatenate(agreeing).max() < 50  # a block may come at the same place


def test_sequential_is_the_disks_order():
    assert order.make("sequential", 5, 1, 0)(np.arange(12)).tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_blocks_keep_neighbours_near_and_mix_them():
    """Each run of 64 positions reads one block, in mixed order; blocks follow in mixed order."""
    made = order.make("blocks", 1000, 64, 0)(np.arange(1000))
    blocks = [made[i : i + 64] for i in range(0, 1000, 64)]
    for block in blocks:
        assert block.max() // 64 == block.min() // 64
        assert (np.diff(block) == 1).mean() < 0.2
    numbers = [int(block[0]) // 64 for block in blocks]
    assert numbers[-1] == 15  # what follows the last whole block ends the epoch
    assert numbers[:-1] != sorted(numbers[:-1])
    assert len({tuple(block % 64) for block in blocks[:-1]}) == len(blocks) - 1


def test_any_position_of_any_size():
    for name in ("shuffled", "blocks", "sequential"):
        made = order.make(name, 300 * 10**6, 16384, 2**32 - 1)
        there = made(np.array([0, 10**15, 10**15 + 1]))
        assert ((there >= 0) & (there < 300 * 10**6)).all()


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**16 + 2, 2**18 + 1])
def test_large_permutations_are_permutations(size):
    """Also where the grid of the cipher has an edge: around the square of a power of two."""
    assert (np.sort(order.permute(np.arange(size), size, 5)) == np.arange(size)).all()


def test_small_permutations_are_permutations():
    for size in range(1, 300):
        assert sorted(order.permute(np.arange(size), size, size).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1024, 1025, 10**6, 2**40 + 1])
def test_a_permutation_is_the_references(size):
    draw = np.random.default_rng(size)
    positions = draw.integers(0, size, 50)
    for key in ((0,), (3, 10**9), (2**32 - 1, 5, 7)):
        expected = [reference(position, size, *key) for position in positions.tolist()]
        assert order.permute(positions, size, *key).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 5, 37, 1025, 10**6])
def test_keys_of_each_position_are_those_of_all(size):
    """Several permutations in one call, as by one call for each; also where points leave the range."""
    draw, count = np.random.default_rng(size), 40
    positions, seeds = draw.integers(0, size, count), draw.integers(0, 2**64, count, np.uint64)
    for key in (lambda seed: (seed,), lambda seed: (3, seed, 7)):
        one_by_one = [
            order.permute(positions[i : i + 1], size, *key(int(seed)))[0] for i, seed in enumerate(seeds)
        ]
        assert order.permute(positions, size, *key(seeds)).tolist() == one_by_one


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_small_permutations_are_equally_likely(size):
    """Chi-square over all permutations of a few numbers, 100 seeds for each."""
    count = math.factorial(size)
    seeds = np.arange(100 * count, dtype=np.uint64)
    draws = order.permute(np.tile(np.arange(size), len(seeds)), size, 1, np.repeat(seeds, size))
    seen = Counter(map(tuple, draws.reshape(-1, size).tolist()))
    assert stats.chisquare([seen[p] for p in itertools.permutations(range(size))]).pvalue > 1e-3


def test_any_position_goes_anywhere():
    """Chi-square over the places of one position, and of a pair's distance, for many seeds."""
    size = 1500
    seeds = np.arange(6000, dtype=np.uint64)
    moved = order.permute(np.tile([0, 1, 700], len(seeds)), size, np.repeat(seeds, 3)).reshape(-1, 3)
    for places in (*moved.T, (moved[:, 1] - moved[:, 0]) % size, (moved[:, 2] - moved[:, 1]) % size):
        counts = np.bincount(places // 15, minlength=100)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_positions_in_any_order_and_from_any_chunk():
    made = order.make("shuffled", 10_007, 1, 2)
    positions = np.random.default_rng(0).integers(0, 50_000, 700)
    one_by_one = [int(made(np.array([position]))[0]) for position in positions]
    assert made(positions).tolist() == one_by_one
