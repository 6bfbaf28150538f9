"""What Orbax does not report by itself about a save that is under way."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbax.checkpoint import multihost


def watch(handler, on_error: Callable[[Exception], None], on_written: Callable[[Path], None]):
    """Returns the handler of an item, changed so that it reports how this process's part of a save ends.

    `on_written` is called with the item's folder when all is written, `on_error` at once when a write fails.
    Orbax reports a failed write only after every process has finished, and the processes that succeeded wait
    for the one that failed: without this, a full disk on one host delays the job until the save times out.
    Orbax has no hook for either, hence the replaced method.
    """
    save = handler.async_save

    async def async_save(directory, *args, **kwargs):
        futures = await save(directory, *args, **kwargs) or []
        last = len(futures) - 1
        calls = [(lambda: on_written(Path(directory))) if i == last else None for i in range(len(futures))]
        return [_WatchedFuture(*each, on_error) for each in zip(futures, calls, strict=True)]

    handler.async_save = async_save
    return handler


def barrier(on_error: Callable[[BaseException], None]) -> Callable[..., None]:
    """Returns the barrier for Orbax's threads, which reports an exception that a thread comes with.

    When all have written their parts, process 0 makes the checkpoint complete, and the others wait for it. If
    it fails in this, it waits for the others at the end of its save, in a `finally`, before it reports why.
    """

    def wait(*, key: str, timeout_ms: int):
        if error := sys.exception():
            on_error(error)
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    return wait


@dataclass(frozen=True)
class _WatchedFuture:
    """One of Orbax's futures: calls `then` after it, `on_error` before it raises."""

    future: Any
    then: Callable[[], None] | None
    on_error: Callable[[Exception], None]

    def result(self, timeout: float | None = None):
        try:
            result = self.future.result(timeout=timeout)
            if self.then:
                self.then()
            return result
        except Exception as error:
            self.on_error(error)
            raise
