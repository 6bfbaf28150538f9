"""The permutation of trainit.data.rows.order again: one position, in plain integers."""

import math

WORD = 2**64


def splitmix64(x: int) -> int:
    """The finalizer of Steele, Lea & Flood 2014, with the constants of Java's SplittableRandom."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def reference(position: int, size: int, *key: int) -> int:
    """Where a position goes in the permutation of [0, size) that the key selects."""
    step, state = 0x9E3779B97F4A7C15, 0
    for number in key:
        state = splitmix64((state + step) % WORD ^ number)
    width = next(w for w in range(math.isqrt(size), size + 1) if w * w >= size)
    height = math.ceil(size / width)
    while True:
        a, b = divmod(position, height)
        for i in range(40 if size <= 1024 else 10):
            hashed = splitmix64((splitmix64((state + (i + 1) * step) % WORD) + b) % WORD) // 2**32
            modulus = height if i % 2 else width
            a, b = b, (a + hashed * modulus // 2**32) % modulus
        position = a * height + b
        if position < size:
            return position
