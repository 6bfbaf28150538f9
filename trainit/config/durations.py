"""Durations in steps, and how many sequences each step has.

The batch size may change during a run (`batch_schedule`), so a duration in tokens depends on when it begins.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainit.config.schema import ConfigError, require

_NEVER = 1 << 62  # a step that no run reaches


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step of a run."""

    starts: tuple[int, ...]  # steps at which a size begins to hold; the first is 0
    sizes: tuple[int, ...]
    run_steps: int  # of the whole run
    context_length: int  # tokens of a sequence

    def at(self, step: int) -> int:
        """Returns the sequences of a step, the first of which is 0."""
        stages = zip(reversed(self.starts), reversed(self.sizes), strict=True)
        return next(size for start, size in stages if step >= start)

    def rows(self, steps: int) -> int:
        """Returns the sequences of the first `steps` steps together."""
        return sum(size * count for size, count in self.stages(0, steps))

    def stages(self, step: int, steps: int) -> list[tuple[int, int]]:
        """Returns [(size, number of steps), ...] from `step` until `steps` steps are done."""
        ends = [*self.starts[1:], steps]
        counts = [min(end, steps) - max(start, step) for start, end in zip(self.starts, ends, strict=True)]
        return [(size, count) for size, count in zip(self.sizes, counts, strict=True) if count > 0]

    def duration(
        self, value: int | float | str, field: str = "duration", begin: int = 0, last: bool = False
    ) -> int:
        """Returns a duration in steps. In tokens, it lasts until as many tokens have been trained on.

        Args:
            value: 500, "10%" or "2e9 tokens".
            field: for errors.
            begin: step at which it begins.
            last: whether it ends with the run instead.

        Raises:
            ConfigError: the value is none of these.
        """

        def of_tokens(tokens: float) -> float:
            stages = self.stages(0, self.run_steps)[::-1] if last else self.stages(begin, _NEVER)
            return _steps(tokens / self.context_length, stages)

        return _duration(value, self.run_steps, of_tokens, field)


def _steps(rows: float, stages: list[tuple[int, int]]) -> float:
    """Returns in how many steps, perhaps a fraction, the sequences are used up. The last stage has no end."""
    done = 0
    for size, count in stages[:-1]:
        if rows <= size * count:
            return done + rows / size
        done, rows = done + count, rows - size * count
    return done + rows / stages[-1][0]


def _duration(value: int | float | str, steps: int, of_tokens: Callable[[float], float], field: str) -> int:
    """Returns a duration in steps: 500, "500", "10%" of `steps`, or "2e9 tokens".

    Args:
        value: the duration.
        steps: how many the whole run has.
        of_tokens: turns a number of tokens into steps.
        field: for errors.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(%|tokens)?\s*", str(value))
    try:
        number, unit = (float(match[1]), match[2]) if match else (None, None)
    except ValueError:  # such as "1.2.3"
        number = None
    if number is None:
        raise ConfigError(f"{field}={value!r} is not a duration: write 500, '10%' or '2e9 tokens'")
    require(number < 1e18, f"{field}={value!r} is too long")
    if unit == "tokens":
        return round(of_tokens(number))
    if unit == "%":
        return round(number * (steps / 100))
    require(number == int(number), f"{field}={value!r} is not a whole number of steps")
    return round(number)


def batch_sizes(config: Mapping[str, Any]) -> BatchSizes:
    """Returns the batch size of every step: `batch_size`, then what `batch_schedule` says.

    Args:
        config: a whole config, with a schedule such as "20%: 256; 2e9 tokens: 512".

    Raises:
        ConfigError: the schedule is written in another way, or its steps do not rise.
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
        # A start in tokens counts the batches of the stages before it.
        before = BatchSizes(tuple(starts), tuple(sizes), *run)
        starts.append(before.duration(when, "batch_schedule"))
        sizes.append(int(size))
    require(
        all(a < b for a, b in pairwise(starts)),
        f"batch_schedule={text!r} begins at the steps {starts[1:]}, which must be above 0 and rise",
    )
    return BatchSizes(tuple(starts), tuple(sizes), *run)
