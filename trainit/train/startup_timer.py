"""Where the time goes from the launch of a process to the end of its first step."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StartupTimer:
    """A clock that runs from the launch of this process, with the time of the main thread in parts."""

    def __init__(self):
        """To be made where all is imported: until then, it was importing."""
        now = time.monotonic()
        self.launched = now - age()  # by time.monotonic
        self.is_over = False
        self._parts = {"import": now - self.launched}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts this time as a part of the start; parts of one name are added up, none contains another.

        When the start is over, parts may go on and are told to nobody.
        """
        begun = time.monotonic()
        try:
            yield
        finally:
            self._parts[name] = self._parts.get(name, 0.0) + time.monotonic() - begun

    def over(self) -> str:
        """The start is over. Its seconds as text: the total, its parts, and what is in none of them."""
        self.is_over = True
        total = time.monotonic() - self.launched
        parts = self._parts | {"other": total - sum(self._parts.values())}
        return f"{total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


def age() -> float:
    """Seconds since the kernel started this process; where it does not say, the processor time used."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.process_time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
