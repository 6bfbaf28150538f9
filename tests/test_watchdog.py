"""From when on a process counts as stalled: by a clock that the tests turn."""

import pytest

from trainit.cluster import watchdog
from trainit.cluster.watchdog import PATIENCE, USUAL_STEPS, Watchdog


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: what the clock shows, to be turned by hand."""
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


def stepping(clock, seconds, count=10) -> Watchdog:
    """A process that has done steps of this many seconds, and stalls after 10 s at the earliest."""
    p = Watchdog()
    p.stall_seconds = 10.0
    for _ in range(count):
        clock[0] += seconds
        p.step_done()
    return p


def test_short_steps_stall_after_the_least_time(clock):
    p = stepping(clock, 0.1)
    clock[0] += 10
    assert not p.stall_message()
    clock[0] += 0.1
    p.doing = "waiting for data"
    assert "no step done for 10 s (limit 10 s, usual 0.1 s); now waiting for data" in p.stall_message()


def test_the_limit_follows_the_step_time_seen_so_far(clock):
    p = stepping(clock, 3.0)
    clock[0] += USUAL_STEPS * 3 - 1
    assert not p.stall_message()
    clock[0] += 2
    assert "limit 60 s, usual 3 s" in p.stall_message()


def test_one_long_step_does_not_change_the_usual_one(clock):
    p = stepping(clock, 0.1)
    clock[0] += 9
    p.step_done()
    clock[0] += 10.5
    assert p.stall_message()


def test_progress_between_steps_counts(clock):
    """An evaluation of a hundred batches, each shorter than the limit."""
    p = stepping(clock, 0.1)
    for _ in range(100):
        clock[0] += 6
        assert not p.stall_message()
        p.progress()


def test_before_the_first_step_and_in_saves_it_is_patient_but_not_for_ever(clock):
    p = stepping(clock, 0.1, count=0)
    clock[0] += 10 * PATIENCE
    assert not p.stall_message()  # compiling
    clock[0] += 1
    assert p.stall_message()
    p.step_done()
    assert not p.stall_message()
    with p.long_task("saving"):
        clock[0] += 100
        assert not p.stall_message()
        clock[0] += 21
        assert "now saving" in p.stall_message()
    assert not p.stall_message()
    clock[0] += 11
    assert p.stall_message()


def test_what_took_long_on_purpose_does_not_make_steps_look_long(clock):
    p = stepping(clock, 0.1)
    for _ in range(20):
        with p.long_task("saving"):
            clock[0] += 50
        clock[0] += 0.1
        p.step_done()
    clock[0] += 11
    assert "usual 0.1 s" in p.stall_message()


def test_suspended_time_is_forgiven(clock):
    p = stepping(clock, 0.1)
    clock[0] += 3600
    p.restart_clock()
    assert not p.stall_message()


def test_zero_never_stalls(clock):
    p = stepping(clock, 0.1)
    p.stall_seconds = 0.0
    clock[0] += 1e9
    assert not p.stall_message()


def test_stacks_name_threads_and_lines():
    assert "MainThread" in watchdog.stacks_of_all_threads()
    assert "test_stacks_name_threads_and_lines" in watchdog.stacks_of_all_threads()
