"""Lines about steps that were skipped."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from absl import logging

from trainit.cluster import sync
from trainit.config import Config


@dataclass
class SkippedSteps:
    """Reports skipped steps, in one line for each interval of logged steps that has some."""

    config: Config
    total: int  # skipped before the next step that is added
    newest: str = ""  # the newest of them, its values, and why it was skipped
    _unreported: int = 0

    def add(self, record: Mapping, in_a_row: int, now: bool):
        """Takes a step's metrics. The line comes at the end of the interval, or `now`."""
        if record["train/skipped"] > self.total:
            self._unreported += 1
            times = f"{in_a_row} of {self.config.max_skipped} in a row"
            self.newest = _describe(record, times if in_a_row else "the loss scale is lowered")
        self.total = record["train/skipped"]
        if self._unreported and (now or record["step"] % self.config.log.every_steps == 0):
            several = f"{self._unreported} steps, the last is " * (self._unreported > 1)
            level = logging.WARNING if sync.is_lead() else logging.INFO  # all processes know the same
            logging.log(level, "skipped    %s%s", several, self.newest)
            self._unreported = 0


def _describe(record: Mapping, times: str) -> str:
    values = [record[f"train/{name}"] for name in ("loss", "grad_norm", "update_norm")]
    bounds = [record.get(f"train/{name}_bound", math.inf) for name in ("loss", "grad_norm")]
    reason = "not finite"
    if all(map(math.isfinite, values)) and (values[0] > bounds[0] or values[1] > bounds[1]):
        reason = "a spike, above loss {:.4g} or gradient norm {:.4g}".format(*bounds)
    text = "step {}: loss {:.4g}, gradient norm {:.4g}, update norm {:.4g}: {}; no update ({})"
    return text.format(record["step"], *values, reason, times)
