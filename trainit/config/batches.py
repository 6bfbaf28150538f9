"""How many sequences each step has: `batch_size`, and from given steps on others."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from trainit.config.fields import duration, require


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of every step of a run."""

    starts: tuple[int, ...]  # steps from which on a size holds; the first is 0
    sizes: tuple[int, ...]

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


def batch_sizes(config: Mapping) -> BatchSizes:
    """Of a run: `batch_size`, and what `batch_schedule` says, as in "20%: 256; 50%: 512".

    Args:
        config: whole, at least as long as `steps`.

    Raises:
        ConfigError: it is written otherwise, or its steps do not rise.
    """
    text = config["batch_schedule"]
    starts, sizes = [0], [config["batch_size"]]
    for stage in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"([\d.]+\s*%?)\s*:\s*(\d+)", stage)
        require(
            bool(match and int(match[2])),
            f"batch_schedule={text!r}: {stage!r} is no 'WHEN: SIZE', as in '20%: 256; 50%: 512', WHEN in "
            f"steps or percent",
        )
        starts.append(duration(match[1], config["steps"], 0, "batch_schedule"))
        sizes.append(int(match[2]))
    require(
        all(a < b for a, b in pairwise(starts)),
        f"batch_schedule={text!r} begins at the steps {starts[1:]}, which must be above 0 and rise",
    )
    return BatchSizes(tuple(starts), tuple(sizes))


def tokens_per_step(config: Mapping) -> int:
    """For durations in tokens; 0 where steps have different numbers, and there can be none."""
    return 0 if config["batch_schedule"] else config["batch_size"] * config["model"]["context_length"]
