"""How many sequences each step has, `batch_size` and from given steps on others, and durations in steps."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from trainit.config.schema import ConfigError, require


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step of a run."""

    starts: tuple[int, ...]  # steps from which on a size holds; the first is 0
    sizes: tuple[int, ...]
    run_steps: int  # of the whole run
    context_length: int  # tokens of a sequence

    def at(self, step: int) -> int:
        """Sequences of the step behind `step` others."""
        stages = zip(reversed(self.starts), reversed(self.sizes), strict=True)
        return next(size for start, size in stages if step >= start)

    def rows(self, steps: int) -> int:
        """Sequences of the first `steps` steps."""
        return sum(size * count for size, count in self.stages(0, steps))

    def stages(self, step: int, steps: int) -> list[tuple[int, int]]:
        """What is left from `step` until `steps` are done: [(size, number of steps), ...]."""
        ends = [*self.starts[1:], steps]
        left = [min(end, steps) - max(start, step) for start, end in zip(self.starts, ends, strict=True)]
        return [(size, count) for size, count in zip(self.sizes, left, strict=True) if count > 0]

    def duration(self, value: int | str, field: str = "duration", begin: int = 0, last: bool = False) -> int:
        """A duration in steps, as `fields.duration`. One in tokens is as long as it takes to see so many.

        Args:
            value: 500, "10%" or "2e9 tokens".
            field: that errors name.
            begin: step at which it begins.
            last: it ends with the run instead.
        """

        def of_tokens(tokens: float) -> float:
            stages = self.stages(0, self.run_steps)[::-1] if last else self.stages(begin, _NEVER)
            return _steps(tokens / self.context_length, stages)

        return duration(value, self.run_steps, of_tokens, field)


_NEVER = 1 << 62  # a step that no run reaches


def _steps(rows: float, stages: list[tuple[int, int]]) -> float:
    """How many steps, not whole, have so many sequences; the last of the stages goes on."""
    done = 0
    for size, count in stages[:-1]:
        if rows <= size * count:
            return done + rows / size
        done, rows = done + count, rows - size * count
    return done + rows / stages[-1][0]


def duration(value: int | str, steps: int, of_tokens: Callable[[float], float], field: str) -> int:
    """A duration in steps: 500, "500", "10%" of `steps`, or "2e9 tokens", which `of_tokens` turns into steps.

    Errors name `field`.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(%|tokens)?\s*", str(value))
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} is not a duration: write 500, '10%' or '2e9 tokens'") from None
    require(number < 1e18, f"{field}={value!r} is too long")
    whole = match[2] is not None or number == int(number)
    require(whole, f"{field}={value!r} is not a whole number of steps")
    return round(of_tokens(number) if match[2] == "tokens" else number * (steps / 100 if match[2] else 1))


def batch_sizes(config: Mapping) -> BatchSizes:
    """Of a run: `batch_size`, and what `batch_schedule` says, as in "20%: 256; 2e9 tokens: 512".

    Args:
        config: whole, at least as long as `steps`.

    Raises:
        ConfigError: it is written otherwise, or its steps do not rise.
    """
    text = config["batch_schedule"]
    run = config["steps"], config["model"]["context_length"]
    starts, sizes = [0], [config["batch_size"]]
    for stage in filter(None, (part.strip() for part in text.split(";"))):
        when, _, size = (word.strip() for word in stage.partition(":"))
        require(
            bool(re.fullmatch(r"\d*[1-9]\d*", size)),
            f"batch_schedule={text!r}: {stage!r} is no 'WHEN: SIZE', as in '20%: 256; 2e9 tokens: 512'",
        )
        before = BatchSizes(tuple(starts), tuple(sizes), *run)
        starts.append(before.duration(when, "batch_schedule"))
        sizes.append(int(size))
    require(
        all(a < b for a, b in pairwise(starts)),
        f"batch_schedule={text!r} begins at the steps {starts[1:]}, which must be above 0 and rise",
    )
    return BatchSizes(tuple(starts), tuple(sizes), *run)
