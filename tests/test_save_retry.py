"""Saves that fail on some processes: threads of one process, which exchange what processes would."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from trainit.checkpoints import retry
from trainit.checkpoints.retry import SaveError, SaveRetry

COUNT = 3


class Sync:
    """The collectives that SaveRetry uses, between threads."""

    def __init__(self):
        self.own, self.numbers = threading.local(), [0] * COUNT
        self.barrier = threading.Barrier(COUNT, timeout=20)

    def gather(self, number: int) -> list[int]:
        self.numbers[self.own.rank] = number
        self.barrier.wait()
        numbers = list(self.numbers)
        self.barrier.wait()
        return numbers

    def is_lead(self) -> bool:
        return self.own.rank == 0


class Store:
    """Checkpoints of a process: while saves fail on any, they fail on some, and on the others never end."""

    folder = "here"

    def __init__(self, fails: bool, saves: int):
        self.fails, self.left, self.saved, self.is_opened = fails, saves, [], True

    def save(self, step, state, meta):
        self.saved.append(step)
        self.left -= 1
        self.is_opened = False

    def is_bad(self) -> bool:
        return not self.is_opened and self.left >= 0

    def error(self):
        return OSError("disk full") if self.is_bad() and self.fails else None

    def busy(self) -> bool:
        return self.is_bad() and not self.fails

    def reopen(self) -> bool:
        self.is_opened = True
        return False


@pytest.fixture
def together(monkeypatch):
    """Calls a function of each process's SaveRetry on all of them; returns their stores."""
    sync = Sync()
    monkeypatch.setattr(retry, "sync", sync)
    monkeypatch.setattr(retry, "RETRY_SECONDS", (0, 0, 0))
    watchdog = SimpleNamespace(long_task=lambda doing: contextlib.nullcontext())
    agreement = SimpleNamespace(clear_failed_save=lambda: None, report_failed_save=lambda reason: None)

    def call(failing, saves, *functions) -> list[Store]:
        stores = [Store(rank in failing, saves) for rank in range(COUNT)]

        def process(rank):
            sync.own.rank = rank
            one = SaveRetry(stores[rank], SimpleNamespace(watchdog=watchdog, agreement=agreement), dict, None)
            for function in functions:
                function(one)

        with ThreadPoolExecutor(COUNT) as threads:
            list(threads.map(process, range(COUNT)))
        return stores

    return call


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1}])
def test_a_save_that_fails_on_some_is_repeated_by_all(failing, together):
    """In the midst of a run, when all have agreed on it, before the next save, and at the end."""
    repeat = lambda one: one.save_again(8, "state")  # noqa: E731
    stores = together(failing, 1, lambda one: one.save(3, "state"), repeat)
    assert [store.saved for store in stores] == [[3, 8]] * COUNT
    stores = together(failing, 1, lambda one: one.save(3, "state"), lambda one: one.save(6, "state"))
    assert [store.saved for store in stores] == [[3, 6]] * COUNT
    stores = together(failing, 2, lambda one: one.save(3, "state"), lambda one: one.settle(5, "state"))
    assert [store.saved for store in stores] == [[3, 5, 5]] * COUNT


def test_a_save_that_keeps_failing_is_an_error(together):
    with pytest.raises(SaveError, match="could not be saved in 4 attempts in here: "):
        together({1}, 9, lambda one: one.save(3, "state"), lambda one: one.settle(4, "state"))
