"""Where processes agree to stop or to save again, in one process: messages come in a seed's order."""

import random
import threading
import time

import pytest

from trainit.cluster.stopping import StopAgreement


class Job:
    """Agreements that exchange messages when `deliver` is called, each pair's in the order sent."""

    def __init__(self, count: int):
        self.left, self.queues = [], {}
        self.processes = [self._process(number, count) for number in range(count)]
        for process in self.processes:
            process.connected = True

    def _process(self, number: int, count: int) -> StopAgreement:
        def send(message: dict):
            for to in range(1, count) if number == 0 else (0,):
                self.queues.setdefault((number, to), []).append(message)

        return StopAgreement(number, count, send, lambda: None, self.left.append)

    def deliver(self, draw: random.Random | None = None):
        while waiting := [pair for pair, queue in self.queues.items() if queue]:
            sender, to = draw.choice(waiting) if draw else waiting[0]
            self.processes[to].handle(self.queues[sender, to].pop(0), sender)

    def run(self, process: StopAgreement, polls: int = 100) -> tuple[int, str]:
        """Polls until there is a reason to stop; how often that was, and the reason."""
        for _ in range(polls):
            process.step_done()
            if reason := process.poll():
                return process.polls, reason
        return process.polls, ""


@pytest.mark.parametrize("seed", range(20))
def test_all_stop_at_the_highest_count_whoever_asks(seed):
    draw = random.Random(seed)
    job = Job(4)
    counts = [draw.randrange(1, 9) for _ in job.processes]
    for process, count in zip(job.processes, counts, strict=True):
        assert job.run(process, count) == (count, "")
    job.processes[draw.randrange(4)].request("stop", "SIGTERM")
    job.processes[draw.randrange(4)].request("stop", "SIGTERM")
    job.deliver(draw)
    for process in job.processes:
        assert process.is_due("stop") == (process.polls == max(counts))
        assert job.run(process) == (max(counts), "SIGTERM")


def test_nobody_has_done_a_step():
    job = Job(3)
    job.processes[0].poll()
    job.processes[2].request("stop", "SIGUSR1")
    job.deliver()
    assert job.left == ["SIGUSR1"] * 3


def test_one_process_alone():
    job = Job(1)
    assert job.run(job.processes[0], 3) == (3, "")
    job.processes[0].request("stop", "max_minutes")
    assert job.run(job.processes[0]) == (3, "max_minutes")


def test_what_is_asked_before_the_processes_are_connected_is_asked_later():
    job = Job(2)
    for process in job.processes:
        process.connected = False
    job.processes[1].step_done()
    job.processes[1].request("stop", "SIGINT")
    assert job.processes[1].stop_requested() == "SIGINT"
    assert not job.queues
    for process in job.processes:
        process.connected = True
        process.repeat_requests()
    job.deliver()
    assert [job.run(process) for process in job.processes] == [(0, "SIGINT")] * 2


def test_a_failed_save_is_repeated_and_then_a_stop_that_came_meanwhile():
    job = Job(2)
    lead, other = job.processes
    for process in job.processes:
        job.run(process, 2)
    other.report_failed_save("disk full")
    other.repeat_requests()
    job.deliver()
    other.request("stop", "SIGTERM")
    job.deliver()
    for process in job.processes:
        assert process.poll() == ""
        assert process.must_save_again()
    for process in (other, lead):
        process.clear_failed_save()
        assert not process.must_save_again()
    for process in (other, lead):
        process.repeat_requests()
    job.deliver()
    assert [process.poll() for process in job.processes] == ["SIGTERM", "SIGTERM"]


def test_a_poll_waits_until_all_have_answered():
    job = Job(2)
    lead, other = job.processes
    lead.step_done()
    lead.request("stop", "SIGTERM")
    reasons = []
    thread = threading.Thread(target=lambda: reasons.append(lead.poll()), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    job.deliver()
    thread.join(10)
    assert reasons == ["SIGTERM"]
    assert other.poll() == "SIGTERM"
