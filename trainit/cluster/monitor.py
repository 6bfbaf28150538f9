"""Watches the processes of one job: that all are alive and make progress, and when all of them should stop.

docs/explanation/faults.md, "How it works", describes it. Nothing of this is a collective.
"""

import selectors
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging

from trainit.cluster.heartbeats import Heartbeats
from trainit.cluster.messages import Peer, Peers, describe_process
from trainit.cluster.process import SignalInbox
from trainit.cluster.restart import report_fault
from trainit.cluster.stopping import StopAgreement
from trainit.cluster.watchdog import Watchdog, stacks_of_all_threads
from trainit.config.exit_codes import FAILED, STOPPED

DRAIN_SECONDS = 10.0  # in which the last messages must arrive


class JobMonitor:
    """This process's thread that watches the job. `watchdog` and `agreement` are parts of it for callers."""

    def __init__(self, process: int, count: int, leave: Callable[[int], None], silence_seconds: float):
        """Starts the thread, which calls `leave` with an exit code. To be made before anything slow."""
        self._process, self._leave = process, leave
        self._inbox, self._peers, self.watchdog = SignalInbox(), Peers(), Watchdog()
        self._heartbeats = Heartbeats(process, self._peers, silence_seconds)
        send, wake = self._peers.send, self._inbox.wake
        self.agreement = StopAgreement(process, count, send, wake, self._leave_untrained)
        self._stacks: Path | None = None
        self._over = False  # from here on, a process that leaves is not lost
        self._ending = False  # another thread ends this process, with the right code
        threading.Thread(target=self._run, name="monitor", daemon=True).start()

    # Called by the main thread.

    def connect(self, peers: Iterable[Peer]):
        """From now on each process hears of the others: process 0 from all of them, these from process 0."""
        self._peers.connect(peers)
        self.agreement.connected = True
        self._inbox.wake()

    def set_limits(self, stall_seconds: float, stacks: Path, max_minutes: float, started: float):
        """Ends the run from now on when it stalls, and stops it `max_minutes` after `started`; 0: never.

        No step for `stall_seconds`, and for 20 usual step times, is a stall: then each thread's stack is
        appended to the file `stacks`. `started` is a `time.monotonic()`.
        """
        self.watchdog.stall_seconds, self._stacks = stall_seconds, stacks
        self.agreement.deadline = started + 60 * max_minutes if max_minutes else float("inf")

    def stop_reason(self) -> str:
        """Why to stop here, or "". All processes call it at the same points, and all get the same."""
        reason = self.agreement.poll()
        self.watchdog.progress()
        return reason

    def stop_is_due(self) -> bool:
        """Whether `stop_reason` would return a reason now; for whoever waits between two calls of it."""
        return self.agreement.is_due("stop")

    def step_done(self):
        """Notes that a step is done."""
        self.watchdog.step_done()
        self.agreement.step_done()

    def report_failure(self, error: Exception, code: int, patience: float = 0.0):
        """Reports, after `patience` seconds, that an error ends this process, and all with this code.

        If the job ends for another reason, of which this may be a consequence, this call does not return.
        """
        if self._peers and not self._over:
            time.sleep(patience)
        if self._ending:
            time.sleep(2 * DRAIN_SECONDS)  # the thread that ends this process needs less
        text = f"{describe_process(self._process)} failed: {' '.join(str(error).split())[:500]}"
        report_fault(code, text, self.agreement.stop_requested())
        if self._peers and not self._over:
            self._peers.send({"lost": text, "code": code, "stacks": False})
            self._drain()

    def close(self):
        """All have done their part: if a process leaves from here on, it is not lost."""
        self._over = True
        self._peers.send({"bye": self._process})

    # Called by any thread.

    def end_job(self, text: str, code: int = FAILED, stacks: bool = False, first: bool = True):
        """Ends all processes, for a reason that this one has found first, or another one has reported."""
        self._over = self._ending = True
        report_fault(code, text, self.agreement.stop_requested())
        if self._process == 0 or first:
            self._peers.send({"lost": text, "code": code, "stacks": stacks})
        # One process prints the reason: the lead, or process 1 if the lead is what was lost.
        prints = self._process == (1 if text.startswith("process 0 ") else 0)
        logging.log(logging.ERROR if prints else logging.INFO, "trainit: error: %s", text)
        if stacks and self._stacks:
            with self._stacks.open("a") as file:
                file.write(stacks_of_all_threads())
            logging.info("every thread's stack is in %s", self._stacks)
        self._drain()
        self._leave(code)

    def _drain(self):
        """Lets messages arrive. Process 0 leaves last, when all others have closed, or after ten seconds."""
        self._over = True
        self._peers.drain(close_first=self._process == 0, seconds=DRAIN_SECONDS)

    # Called by the monitor's thread.

    def _run(self):
        self._inbox.unblock()
        try:
            self._watch()
        except Exception as error:  # without this thread, nobody would notice anything any more
            logging.exception("trainit: error: %s", error)
            self._leave(FAILED)

    def _watch(self):
        """Reads signals and messages as they arrive, and looks four times a second for what is late."""
        selector = selectors.DefaultSelector()
        selector.register(self._inbox.socket, selectors.EVENT_READ)
        while True:
            events = selector.select(0.25)
            now = time.monotonic()
            # A process that was suspended has heard nothing meanwhile: nobody is lost, no step was late.
            if self._heartbeats.was_suspended(now):
                self.watchdog.restart_clock()
            # What has arrived.
            for key, _ in events:
                if key.data is None:
                    self._read_inbox(selector)
                else:
                    self._read(key.data, selector)
            # What is due, and what is missing.
            self.agreement.request_if_due(now)
            if self._heartbeats.is_due(now):
                self._beat()
            if not self._over:
                self._check(now)

    def _read_inbox(self, selector: selectors.BaseSelector):
        """Asks to stop for each signal. If this process woke its own thread, others may have connected."""
        woken, names = self._inbox.read()
        if woken:
            for peer in self._peers:
                if peer.channel.connection not in selector.get_map() and not peer.left:
                    selector.register(peer.channel.connection, selectors.EVENT_READ, peer)
                    self._read(peer, selector)  # what has arrived with the last message of the meeting
            self.agreement.repeat_requests()
        for name in names:
            self.agreement.request("stop", name)

    def _read(self, peer: Peer, selector: selectors.BaseSelector):
        messages, trouble = None, "is gone: it was killed or has crashed"
        try:
            messages = peer.read()
        except ValueError as error:
            trouble = f"is cut off: its connection has brought what it has not sent, {error}"
        if messages is None:
            selector.unregister(peer.channel.connection)
            if not (peer.left or self._over):
                self.end_job(f"{peer} {trouble}")
            peer.left = True
        for message in messages or ():
            match message:
                case {"status": {"polls": int(), "doing": str(), "seconds": int()} as status}:
                    peer.status = status
                case {"late": text}:
                    self._heartbeats.late = text
                case {"bye": _}:
                    peer.left = True
                case {"lost": text, "code": code, "stacks": stacks}:
                    self.end_job(text, code, stacks, first=False)
                case _:
                    self.agreement.handle(message, peer.process)

    def _beat(self):
        self._heartbeats.send(self.agreement.polls, self.watchdog.doing, self.watchdog.seconds())

    def _check(self, now: float):
        """Ends the job if a process is silent, or if this one stalls."""
        if lost := self._heartbeats.silent(now):
            self.end_job(lost, stacks=True)
        if stall := self.watchdog.stall_message():
            self._beat()
            late = f"; behind: {self._heartbeats.late}" if self._peers else ""
            self.end_job(f"{describe_process(self._process)} stalls: {stall}{late}", stacks=True)

    def _leave_untrained(self, reason: str):
        """Ends this process with the code of a stopped run: there is nothing to save."""
        self._ending = True
        text = "stopped    on %s, before the first step was done; run the same command to continue"
        logging.info(text, reason)
        self._drain()
        self._leave(STOPPED)
