"""Mixtures: exact proportions over every thousand batches, sources in their own orders, changing weights."""

import pickle
from fractions import Fraction

import numpy as np
import pytest

from trainit.data.rows.mixture import PERIOD, Mixture, stage
from trainit.data.rows.order import Ordered, Sequential, Shuffled


class Numbers:
    """A split whose sequence i reads as i, and as what it is of."""

    def __init__(self, name: int, dtype: str):
        self.name, self.dtype = name, dtype

    def read(self, sequences, length):
        ids = np.zeros((len(sequences), length + 1), self.dtype)
        ids[:, 0], ids[:, 1] = self.name, sequences
        return ids, np.full(len(sequences), length, np.int32)


def fractions(*texts) -> list[Fraction]:
    return [Fraction(text) for text in texts]


@pytest.mark.evidence("mixtures have their shares in any thousand batches")
@pytest.mark.parametrize(
    "weights",
    [
        ("1", "1"),
        ("0.7", "0.3"),
        ("3", "2", "2"),
        ("0.123", "0.456", "0.421"),
        ("1", "0", "2"),
        ("0.999", "0.001"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 16, 100])
def test_proportions_of_every_thousand_batches(weights, batch_size):
    """In any thousand batches in a row, each source has its share to one row."""
    mixture = Mixture((None,) * len(weights), (stage(0, fractions(*weights)),))
    rows = 1000 * batch_size
    for first in (0, batch_size, 37 * batch_size, 10**12 * batch_size):
        number, _ = mixture.where(np.arange(first, first + rows))
        counts = np.bincount(number, minlength=len(weights))
        for count, weight in zip(counts, fractions(*weights), strict=True):
            share = weight / sum(fractions(*weights)) * rows
            assert abs(count - share) <= (0 if share.denominator == 1 and batch_size == 100 else 1)


def test_the_piles_weights_in_any_window():
    """Percent with two decimals of 22 parts: any thousand batches, wherever they begin, within two rows."""
    percent = """18.11 15.40 12.07 9.65 8.98 7.60 6.12 5.13 3.89 3.65 3.17 2.66 1.76 1.30 1.26 1.20 1.04 1.03
        0.63 0.41 0.27 0.16""".split()
    weights = fractions(*percent)
    made = stage(0, weights)
    rows, period = 1000, sum(made.counts)
    number, _ = Mixture((None,) * 22, (made,)).where(np.arange(period + rows))
    for k, weight in enumerate(weights):
        before = np.concatenate([[0], np.cumsum(number == k)])
        windows = before[rows:] - before[:-rows]
        share = float(weight / sum(weights) * rows)
        assert abs(windows - share).max() < 2


def test_shares_that_no_short_period_has():
    """Weights as of token counts: rounded to one in a million."""
    weights = fractions("227.12", "18000.123457", "5.000001")
    made = stage(0, weights)
    assert sum(made.counts) == PERIOD
    for count, weight in zip(made.counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * PERIOD) < 1


@pytest.mark.evidence("each part of a mixture is read in its own order, without gaps")
def test_each_source_is_read_in_its_own_order_without_gaps():
    """Over a change of weights too, and from any position: what each source gives is 0, 1, 2, ..."""
    stages = (
        stage(0, fractions("0.7", "0.2", "0.1")),
        stage(1003, fractions("1", "0", "1")),
        stage(1500, fractions("1", "5", "3")),
    )
    mixture = Mixture((None,) * 3, stages)
    number, at = mixture.where(np.arange(4000))
    for k in range(3):
        np.testing.assert_array_equal(at[number == k], np.arange(np.count_nonzero(number == k)))
    assert not np.isin(1, number[1003:1500])
    assert abs(np.bincount(number[1500:2400]) - [100, 500, 300]).max() <= 1
    later = mixture.where(np.arange(900, 2000))
    np.testing.assert_array_equal(later, (number[900:2000], at[900:2000]))


def test_sources_alternate_evenly():
    number, _ = Mixture((None,) * 2, (stage(0, fractions("0.75", "0.25")),)).where(np.arange(400))
    for i in range(0, 390):
        assert 1 <= np.count_nonzero(number[i : i + 8]) <= 3


def test_reading_and_travelling():
    sources = (
        Ordered(Numbers(1, "<u2"), Shuffled(50, 9)),
        Ordered(Numbers(2, "<u4"), Sequential(7)),
    )
    mixture = Mixture(sources, (stage(0, fractions("1", "2")),))
    positions = np.arange(30)
    ids, lengths = mixture.read(positions, 4)
    assert ids.dtype == mixture.dtype == np.uint32
    assert (lengths == 4).all()
    assert ids[ids[:, 0] == 1, 1].tolist() == Shuffled(50, 9)(np.arange(10)).tolist()
    assert ids[ids[:, 0] == 2, 1].tolist() == (np.arange(20) % 7).tolist()
    only_narrow = mixture.read(np.flatnonzero(ids[:, 0] == 1), 4)[0]
    assert only_narrow.dtype == np.uint32  # whatever a batch happens to hold
    again = pickle.loads(pickle.dumps(mixture)).read(positions, 4)[0]
    np.testing.assert_array_equal(again, ids)
