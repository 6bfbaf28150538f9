"""Grain's index shuffle for many positions at once: a permutation that needs no memory.

Grain's own function takes one position and 3 us; a batch of rows wants less. The numbers are the same, but
for sizes 4^k + 1 from 65,537 on, of which Grain's is no permutation: it counts one bit too few. It is a
cipher over blocks of B bits, B even and at least 16, that hold the positions; what it maps out of the range
goes through it again (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). The cipher is Simon
(Beaulieu et al. 2013, eprint.iacr.org/2013/404) of four rounds, with keys from C++'s std::seed_seq.
"""

import functools

import numpy as np

ROUNDS = 4
SMALL = 1 << 13


def permute(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where positions, integers (n,) in [0, size), go in a permutation of `size` numbers: int64 (n,)."""
    if size == 1:
        return np.zeros(len(positions), np.int64)
    half, keys = (max((size - 1).bit_length(), 16) + 1) // 2, _keys(seed % 2**32)
    if size < SMALL:  # a block goes through it many times until it is in the range
        table = _encrypt(np.arange(1 << 2 * half, dtype=np.uint64), half, keys).tolist()
        return np.array([_follow(table, position, size) for position in positions.tolist()], np.int64)
    result = _encrypt(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _encrypt(result[outside], half, keys)
    return result.astype(np.int64)


def _follow(table: list[int], position: int, size: int) -> int:
    position = table[position]
    while position >= size:
        position = table[position]
    return position


def _encrypt(blocks: np.ndarray, half: int, keys: tuple[int, ...]) -> np.ndarray:
    """Simon's rounds on blocks of two words of `half` bits, uint64 (n,)."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)

    def rotate(word: np.ndarray, by: int) -> np.ndarray:
        return word << np.uint64(by) | word >> (bits - np.uint64(by))

    def mix(word: np.ndarray) -> np.ndarray:
        return rotate(word, 1) & rotate(word, 8) ^ rotate(word, 2)

    left, right = blocks >> bits, blocks & mask
    for one, two in zip(keys[::2], keys[1::2], strict=True):
        left = (left ^ mix(right) ^ np.uint64(one)) & mask
        right = (right ^ mix(left) ^ np.uint64(two)) & mask
    return left << bits | right


@functools.lru_cache(maxsize=256)
def _keys(seed: int) -> tuple[int, ...]:
    """std::seed_seq{seed}.generate of ROUNDS words: C++ standard, rand.util.seedseq."""
    n, words = ROUNDS, 2**32
    p, q = 1, 2  # as the standard has them for four words; and as many steps, of one word of seed
    table = [0x8B8B8B8B] * n

    def spread(x: int) -> int:
        return (x ^ (x >> 27)) % words

    for k in range(n):
        first = 1664525 * spread(table[k % n] ^ table[(k + p) % n] ^ table[(k - 1) % n]) % words
        second = (first + (1 if k == 0 else k % n + seed if k == 1 else k % n)) % words
        table[(k + p) % n] = (table[(k + p) % n] + first) % words
        table[(k + q) % n] = (table[(k + q) % n] + second) % words
        table[k % n] = second
    for k in range(n, 2 * n):
        first = 1566083941 * spread((table[k % n] + table[(k + p) % n] + table[(k - 1) % n]) % words) % words
        second = (first - k % n) % words
        table[(k + p) % n] ^= first
        table[(k + q) % n] ^= second
        table[k % n] = second
    return tuple(table)
