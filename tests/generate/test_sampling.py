"""Counts of drawn tokens next to the distribution that NumPy computes."""

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from trainit.generate.sampling import Sampling

DRAWS = 20_000
CASES = (
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
)


def oracle(logits: np.ndarray, seen: np.ndarray, temperature, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    """The probabilities, filter after filter, each on the distribution that the one before leaves."""
    logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits) / temperature
    p = np.exp(logits - logits.max())
    order, keep = np.argsort(-p), np.ones(len(p), bool)
    if top_k:
        keep[order[top_k:]] = False
    p = np.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        total = 0.0
        for token in order:
            keep[token] &= total < top_p
            total += p[token]
    p = np.where(keep, p, 0) / p[keep].sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.evidence("sampled tokens have the distribution asked for, by counts")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counts(case, dtype):
    draw = np.random.default_rng(0)
    logits = jax.numpy.asarray(draw.normal(0, 2, 40), dtype)
    seen = draw.random(40) < 0.3
    penalty = case.get("repetition_penalty", 1.0)
    rest = {name: value for name, value in case.items() if name != "repetition_penalty"}
    expected = oracle(np.asarray(logits, np.float64), seen, **rest, penalty=penalty)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    rows = jax.numpy.broadcast_to(logits, (DRAWS, 40))
    seen_rows = np.broadcast_to(seen, (DRAWS, 40)) if penalty != 1 else None
    tokens = np.asarray(Sampling(**case).arguments().choose(rows, seen_rows, keys))
    counts = np.bincount(tokens, minlength=40)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    common = expected * DRAWS >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*(expected[common] * DRAWS), expected[~common].sum() * DRAWS]
    used = np.array(wanted) > 0
    result = chisquare(np.array(observed)[used], np.array(wanted)[used])
    assert result.pvalue > 1e-3


def test_equal_logits_in_bfloat16_are_all_drawn():
    """Random numbers of bfloat16 have 8 bits and reach few of them."""
    rows = jax.numpy.zeros((4000, 1024), "bfloat16")
    tokens = (
        Sampling(temperature=1.0).arguments().choose(rows, None, jax.random.split(jax.random.key(2), 4000))
    )
    assert len(np.unique(tokens)) > 950  # 1003 are expected
    assert np.bincount(tokens).max() < 20


def test_the_most_likely_token_needs_no_key_and_is_lowered_by_the_penalty():
    logits = jax.numpy.asarray([[1.0, 2.0, -1.0], [-3.0, -2.0, -2.5]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert Sampling().arguments().choose(logits, None, keys).tolist() == [1, 1]
    seen = np.array([[False, True, False], [False, True, False]])
    assert Sampling(repetition_penalty=2.5).arguments().choose(logits, seen, keys).tolist() == [0, 2]
