"""Agrees, over all processes of a job, at which point to stop, or to repeat a save that failed.

All processes call `poll` at the same points of their loops, and each counts its calls. When somebody wants
to stop, process 0 asks all for their counts; from its answer on, a process waits in its next `poll`.
Process 0 then announces the highest count, and all stop there: those that are not so far first do the steps
that are missing. So nobody enters a collective that another process never reaches. Until somebody asks, a
poll costs one comparison.
"""

import threading
from collections.abc import Callable

from trainit.cluster.process import Launcher


class StopAgreement:
    """One process's part. The main thread polls, the monitor's thread exchanges the messages."""

    def __init__(
        self,
        process: int,
        count: int,
        send: Callable[[dict], None],
        wake: Callable[[], None],
        leave_untrained: Callable[[str], None],
    ):
        """Process 0 of `count` sends to all others, these to process 0.

        `wake` makes the monitor's thread call `repeat_requests` soon. `leave_untrained` ends this process for
        a reason, when no process has done a step.
        """
        self._process, self._count = process, count
        self._send, self._wake, self._leave_untrained = send, wake, leave_untrained
        self.connected = count == 1  # until then, requests wait
        self.deadline, self._launcher = float("inf"), Launcher()  # a `time.monotonic()`
        self._requested = {"stop": "", "save": ""}  # why somebody wants all to stop, or to save again
        # What all processes are deciding on, or have decided. The condition guards it and the count of polls.
        self._changed = threading.Condition()
        self._event: dict = {}  # {"kind": "stop" or "save", "reason": ...}
        self._due_at: int | None = None  # the count of polls at which it is due, once that is decided
        self.polls = 0  # how far this process is
        self._trained = False  # whether a step is done, which a save could keep
        self._must_save_again = False
        self._answers: dict[int, dict] = {}  # process 0's: how far each process is

    # Called by the main thread.

    def poll(self) -> str:
        """Why to stop here, or "". All processes get the same answer at the same call."""
        with self._changed:
            while self._event and self._due_at is None:
                self._changed.wait()
            if self.is_due("stop"):
                return self._event["reason"]
            if self.is_due("save"):
                self._must_save_again = True
            else:
                self.polls += 1
            return ""

    def is_due(self, kind: str) -> bool:
        """Whether the next `poll` would return a reason to stop, or ask for another save."""
        due_at = self._due_at
        return due_at is not None and self.polls >= due_at and self._event["kind"] == kind

    def step_done(self):
        """Notes that a step is done: from the first one on, a stop saves."""
        with self._changed:
            self._trained = True

    def report_failed_save(self, reason: str):
        """Reports to all processes that this one's part of a save failed."""
        if not self._requested["save"]:
            self._requested["save"] = reason
            self._wake()

    def must_save_again(self) -> bool:
        """Whether the newest `poll` asks for another save here: the same on all processes."""
        return self._must_save_again

    def clear_failed_save(self):
        """Clears the pending request to save.

        Process 0 calls this after the collective in `SaveRetry.settle`, all others before it, so that a new
        request cannot be mistaken for the old one.
        """
        with self._changed:
            self._requested["save"], self._must_save_again = "", False
            if self._event.get("kind") != "stop":
                self._event, self._due_at, self._answers = {}, None, {}
        self._wake()

    # Called by the monitor's thread.

    def stop_requested(self) -> str:
        """Why somebody wants to stop, or "", before all have agreed where. Any thread may call it."""
        return self._requested["stop"]

    def request_if_due(self, now: float):
        """Asks to stop when the time is over, or whoever has started this process is gone."""
        if self._requested["stop"]:
            return
        if now > self.deadline and self._process == 0:
            self.request("stop", "max_minutes")
        elif self._launcher.is_gone():
            self.request("stop", "the end of its launcher")

    def request(self, kind: str, reason: str):
        """Asks all processes to stop, or to save again."""
        self._requested[kind] = self._requested[kind] or reason
        if not self.connected:
            return  # `repeat_requests` asks as soon as somebody can hear it
        if self._process > 0:
            self._send({"want": kind, "reason": reason})
        elif not self._event:
            event = {"kind": kind, "reason": reason}
            self._send({"ask": event})
            self._answer(event)

    def repeat_requests(self):
        """Asks for what was requested before the processes were connected, or while another event was due."""
        for kind, reason in self._requested.items():
            if reason:
                self.request(kind, reason)

    def handle(self, message: dict, sender: int):
        """Takes part in an exchange: want, to process 0; ask, answer, agreed or leave, in this order."""
        match message:
            case {"want": kind, "reason": reason}:
                self.request(kind, reason)
            case {"ask": event}:
                self._requested[event["kind"]] = event["reason"]
                self._answer(event)
            case {"answer": answer}:
                self._collect(sender, answer)
            case {"agreed": polls}:
                self._decide(polls)
            case {"leave": event}:
                self._leave_untrained(event["reason"])

    def _answer(self, event: dict):
        """Reports how far this process is, and keeps it there until all have answered."""
        with self._changed:
            self._event = event
            answer = {"polls": self.polls, "trained": self._trained}
        if self._process == 0:
            self._collect(0, answer)
        else:
            self._send({"answer": answer})

    def _collect(self, process: int, answer: dict):
        """Process 0's part: decides when all have answered."""
        self._answers[process] = answer
        if len(self._answers) < self._count:
            return
        if self._event["kind"] == "stop" and not any(a["trained"] for a in self._answers.values()):
            self._send({"leave": self._event})
            self._leave_untrained(self._event["reason"])
        polls = max(a["polls"] for a in self._answers.values())
        self._send({"agreed": polls})
        self._decide(polls)

    def _decide(self, polls: int):
        with self._changed:
            self._due_at = polls
            self._changed.notify_all()
