"""Where the time goes from the launch of a process to the end of its first step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from trainit.cluster.process import age


class StartupTimer:
    """Measures the time since this process was launched, and how the main thread has spent it."""

    def __init__(self):
        """Call it when everything is imported: the time until then is counted as "import"."""
        now = time.monotonic()
        self.launched = now - age()  # by time.monotonic
        self.is_over = False
        self._parts = {"import": now - self.launched}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts this time as a part of the start-up. Parts of the same name add up; they must not nest."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.monotonic() - begun

    def over(self) -> str:
        """Ends the start-up. Returns its seconds as text: the total, the parts, and the rest as "other"."""
        self.is_over = True
        total = time.monotonic() - self.launched
        parts = self._parts | {"other": total - sum(self._parts.values())}
        return f"{total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
