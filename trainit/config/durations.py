"""Durations in steps, and how many sequences each step has.

The batch size may change during a run (`batch_schedule`), so a duration in tokens depends on when it begins.
"""

import bisect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    skipped: tuple[tuple[int, int], ...] = ()  # (step, batches before its own that are left out)

    def at(self, step: int) -> int:
        """The sequences of a step, the first of which is 0."""
        return self.sizes[bisect.bisect_right(self.starts, step) - 1]

    def rows(self, steps: int) -> int:
        """The sequences of the first `steps` steps together, and those that are left out between them."""
        left_out = sum(count * self.at(step) for step, count in self.skipped if step < steps)
        return left_out + sum(size * count for size, count in self.stages(0, steps))

    def stages(self, step: int, steps: int) -> list[tuple[int, int]]:
        """[(size, number of steps), ...] from `step` until `steps` steps are done."""
        ends = [*self.starts[1:], steps]
        counts = [min(end, steps) - max(start, step) for start, end in zip(self.starts, ends, strict=True)]
        return [(size, count) for size, count in zip(self.sizes, counts, strict=True) if count > 0]

    def stretches(self, step: int, steps: int) -> list[tuple[int, int, int]]:
        """[(batches left out before, size, number of steps), ...], as `stages`: what one reader can read."""
        skipped = dict(self.skipped)
        ends = sorted({step, steps, *(end for end in (*self.starts, *skipped) if step < end < steps)})
        return [(skipped.get(begin, 0), self.at(begin), end - begin) for begin, end in pairwise(ends)]

    def duration(self, value: float | str, name: str = "duration", begin: int = 0, last: bool = False) -> int:
        """A duration in steps: 500, "10%" of the run, or "2e9 tokens", until as many have been trained on.

        It begins at the step `begin`, or ends with the run if it is the `last` one. Errors begin with `name`.
        """
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%|tokens)?\s*", str(value))
        if match is None:
            raise ConfigError(f"{name}={value!r} is not a duration: write 500, '10%' or '2e9 tokens'")
        number, unit = float(match[1]), match[2]
        require(number < 1e18, f"{name}={value!r} is too long")
        if unit == "tokens":
            stages = self.stages(0, self.run_steps)[::-1] if last else self.stages(begin, _NEVER)
            return round(_steps(number / self.context_length, stages))
        if unit == "%":
            return round(number * (self.run_steps / 100))
        require(number == int(number), f"{name}={value!r} is not a whole number of steps")
        return round(number)


def _steps(rows: float, stages: list[tuple[int, int]]) -> float:
    """In how many steps, perhaps a fraction, the sequences are used up. The last stage has no end."""
    done = 0
    for size, count in stages[:-1]:
        if rows <= size * count:
            return done + rows / size
        done, rows = done + count, rows - size * count
    return done + rows / stages[-1][0]


def batch_sizes(config: Mapping[str, Any]) -> BatchSizes:
    """The batch size of every step of a config: `batch_size`, then what `batch_schedule` says.

    Raises ConfigError if that is no schedule, such as "20%: 256; 2e9 tokens: 512", or its steps do not rise.
    """
    text = config["batch_schedule"]
    run = config["steps"], config["model"]["context_length"]
    sizes = BatchSizes((0,), (config["batch_size"],), *run)
    for stage in filter(None, map(str.strip, text.split(";"))):
        when, _, size = map(str.strip, stage.partition(":"))
        require(
            bool(re.fullmatch(r"\d*[1-9]\d*", size)),
            f"batch_schedule={text!r}: {stage!r} is no 'WHEN: SIZE', as in '20%: 256; 2e9 tokens: 512'",
        )
        # A start in tokens counts the batches of the stages before it.
        start = sizes.duration(when, "batch_schedule")
        sizes = BatchSizes((*sizes.starts, start), (*sizes.sizes, int(size)), *run)
    require(
        all(a < b for a, b in pairwise(sizes.starts)),
        f"batch_schedule={text!r} begins at the steps {[*sizes.starts[1:]]}, which must be above 0 and rise",
    )
    text = config["spikes"]["skip_data"]
    ranges = [(int(begin), int(end)) for begin, end in re.findall(r"(\d{1,10}):(\d{1,10})", text)]
    require(
        ",".join(f"{begin}:{end}" for begin, end in ranges) == text.replace(" ", "")
        and all(begin < end and sizes.at(begin) == sizes.at(end - 1) for begin, end in ranges)
        and all(a < b for (a, _), (b, _) in pairwise(ranges)),
        f"spikes.skip_data={text!r} must be rising ranges of steps, '3:5, 20:22', each of one batch size",
    )
    return replace(sizes, skipped=tuple((begin, end - begin) for begin, end in ranges))
