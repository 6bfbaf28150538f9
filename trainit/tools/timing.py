"""Times calls and iterators for the commands that measure."""

import time
from collections.abc import Callable, Iterator, Sequence

import jax

WARMUP = 2  # calls before those whose times count


def seconds(call: Callable[[], object]) -> float:
    """Returns the seconds of a call, until the arrays that it returns are computed."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, ...]]:
    """Returns the seconds of each call in each round. They take turns, so that all see the same machine."""
    times = [[seconds(call) for call in calls] for _ in range(WARMUP + rounds)]
    return list(zip(*times[WARMUP:], strict=True))


def rate(items: Iterator, duration: float) -> float:
    """Returns how many items an iterator yields in a second, measured for `duration` seconds."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < duration:
        next(items)
        count += 1
    return count / passed
