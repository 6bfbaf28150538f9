"""The processes of one job: that all have come, that all are alive, and when they stop.

Each process holds a connection to process 0, the lead, from before JAX starts until it leaves. A thread
of its own sends and hears signs of life there, whatever the main thread does: compile, wait for data,
save. Nothing of this is a collective, and a step costs it one comparison.
"""

import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from absl import logging

from trainit.cluster.process import STOP_SIGNALS
from trainit.cluster.watchdog import Watchdog
from trainit.cluster.watchdog import stacks as stacks_of_all

BEAT_SECONDS = 2.0  # between signs of life


@dataclass
class Peer:
    """Another process, as the lead (or for the lead, any other) knows it."""

    process: int
    host: str
    pid: int
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    status: dict = field(default_factory=dict)  # polls, doing and for how long, as it last said
    unread: bytes = b""
    left: bool = False  # it has said that it leaves

    def __str__(self) -> str:
        return f"process {self.process} ({self.host}, pid {self.pid})"


class JobMonitor:
    """This process's tie to the others, and its ear for requests to stop. One thread."""

    def __init__(self, process: int, count: int, leave: Callable[[int], None], silence_seconds: float):
        """To be made before anything slow, so that no signal ends a process that is still starting.

        Args:
            process: number of this one, from 0.
            count: processes of the job.
            leave: ends the process with an exit code; called by the thread.
            silence_seconds: without any sign of life for so long, a process counts as lost.
        """
        self._process, self._count, self._leave = process, count, leave
        self._silence_seconds = silence_seconds
        self._peers: list[Peer] = []
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._inbox, wake = socket.socketpair()  # signals arrive here even while the main thread compiles
        wake.setblocking(False)
        self._wake, self._selector = wake, selectors.DefaultSelector()
        self._selector.register(self._inbox, selectors.EVENT_READ)
        self._deadline, self._interrupted = float("inf"), -float("inf")
        self._wanted = {"stop": "", "save": ""}  # why the run should stop, or save anew, if it should
        self._event, self._frozen, self._agreed = {}, False, None  # what is to be done, at which poll
        self._polls, self._save_here = 0, False
        self._listening: set[socket.socket] = set()
        self._answers: dict[int, dict] = {}  # the lead's: how far each process is, when asked to stop
        self._fresh = True  # nothing is trained yet that a save could keep
        self.watchdog, self._behind = Watchdog(), ""
        self._stacks: Path | None = None
        self._over = False
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        # The thread alone takes these signals: data workers, and whatever else is started, are born deaf.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    # What the main thread calls.

    def stop_requested(self) -> str:
        """Why somebody wants the run to stop, or "": before all have agreed where."""
        return self._wanted["stop"]

    def connect(self, connections: list[tuple[int, str, int, socket.socket]]):
        """From now on each hears of the others.

        Args:
            connections: (process, host, pid, connection): to all others on process 0, to process 0 on these.
        """
        self._peers = [Peer(*connection) for connection in connections]
        for peer in self._peers:
            peer.connection.setblocking(False)
        self._wake.send(b"\0")

    def watch(self, stall_seconds: float, stacks: Path):
        """Ends the run when it stalls: when no step is done for so long, or for 20 usual step times.

        Args:
            stall_seconds: at least; 0: never.
            stacks: file that each thread's stack is then added to.
        """
        self.watchdog.stall_seconds, self._stacks = stall_seconds, stacks

    def stop_after(self, max_minutes: float, started: float):
        """Asks to stop so many minutes after `started` (`time.monotonic()`); 0: never."""
        if max_minutes:
            self._deadline = started + 60 * max_minutes

    def stop_reason(self) -> str:
        """Why to stop here, or "". To be called at the same places by every process; all stop at the same."""
        with self._changed:
            while self._frozen and self._agreed is None:
                self._changed.wait()
            self.watchdog.progress()
            if self._due("stop"):
                return self._event["reason"]
            if self._due("save"):
                self._save_here = True
            else:
                self._polls += 1
            return ""

    def stop_is_due(self) -> bool:
        """Whether `stop` would now say so; for whoever waits between two calls of it."""
        return self._due("stop")

    def report_failed_save(self, reason: str):
        """Tells all that this process's part of a save failed."""
        if not self._wanted["save"]:
            self._wanted["save"] = reason
            self._wake.send(b"\0")

    def save_failed_somewhere(self) -> bool:
        """Whether a process has said so, as far as is known here."""
        return bool(self._wanted["save"])

    def must_save_again(self) -> bool:
        """Whether to repeat a save here, as the newest `stop` has found: the same on all processes."""
        return self._save_here

    def clear_failed_save(self):
        """That is done with. On the lead after, on the others before, a collective that parts the two."""
        with self._changed:
            self._wanted["save"], self._save_here = "", False
            if self._event.get("kind") != "stop":
                self._event, self._frozen, self._agreed, self._answers = {}, False, None, {}
        self._wake.send(b"\0")

    def _due(self, kind: str) -> bool:
        agreed = self._agreed
        return agreed is not None and self._polls >= agreed and self._event["kind"] == kind

    def step_done(self):
        """A step is done: from the first one on, a stop saves."""
        self.watchdog.step_done()
        with self._changed:
            self._fresh = False

    def report_failure(self, error: Exception, code: int, patience: float = 0.0):
        """Tells the others that this process ends on an error.

        Args:
            error: what it is.
            code: with which all exit.
            patience: seconds in which it may turn out that another process is lost, and the error follows
                from that; then this call does not return.
        """
        if self._peers and not self._over:
            time.sleep(patience)
            text = f"{self._me()} failed: {' '.join(str(error).split())[:500]}"
            self._tell({"lost": text, "code": code, "stacks": False})
            self._hand_over()

    def close(self):
        """All have done their part: leaving is no loss from here on."""
        self._over = True
        self._tell({"bye": self._process})

    # What the thread does.

    def _run(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            self._watch()
        except Exception as error:  # nobody would notice anything any more
            logging.exception("trainit: error: %s", error)
            self._leave(1)

    def _watch(self):
        beat, before = 0.0, time.monotonic()
        while True:
            events = self._selector.select(0.25)
            now = time.monotonic()
            if now - before > self._silence_seconds / 4:  # it was itself suspended, others perhaps too
                self.watchdog.restart_clock()
                for peer in self._peers:
                    peer.heard = now
            before = now
            for key, _ in events:
                if key.data is None:
                    self._on_wake(self._inbox.recv(64))
                else:
                    self._read(key.data)
            if now > self._deadline and self._process == 0:
                self._request("stop", "max_minutes")
            if now - beat > BEAT_SECONDS:
                beat = now
                self._beat()
            self._check(now)

    def _on_wake(self, numbers: bytes):
        for number in numbers:
            if number == 0:  # from this process
                self._listen()
                continue
            if number == signal.SIGINT:  # a launcher may pass on what the terminal has sent as well
                if 1 < time.monotonic() - self._interrupted < float("inf"):
                    os._exit(130)
                self._interrupted = time.monotonic()
            self._request("stop", signal.Signals(number).name)

    def _listen(self):
        """The others are known, or an event is over: what was wanted meanwhile is now asked for."""
        for peer in self._peers:
            if peer.connection not in self._listening:
                self._listening.add(peer.connection)
                self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        for kind, reason in self._wanted.items():
            if reason:
                self._request(kind, reason)

    def _request(self, kind: str, reason: str):
        """Somebody wants all to stop, or to save anew."""
        self._wanted[kind] = self._wanted[kind] or reason
        if self._count > 1 and not self._peers:
            return  # told as soon as there is somebody to tell
        if self._process > 0:
            self._tell({"want": kind, "reason": reason})
        elif not self._frozen:
            self._event = {"kind": kind, "reason": reason}
            self._tell({"ask": self._event})
            self._answer()

    def _answer(self):
        """Stays where it is until all have said how far they are."""
        with self._changed:
            self._frozen = True
            answer = {"polls": self._polls, "fresh": self._fresh}
        if self._process == 0:
            self._collect(0, answer)
        else:
            self._tell({"answer": answer})

    def _collect(self, process: int, answer: dict):
        self._answers[process] = answer
        if len(self._answers) < self._count:
            return
        if self._event["kind"] == "stop" and all(a["fresh"] for a in self._answers.values()):
            self._tell({"leave": self._event})
            self._leave_fresh()
        agreed = max(a["polls"] for a in self._answers.values())
        self._tell({"agreed": agreed})
        self._agree(agreed)

    def _agree(self, polls: int):
        with self._changed:
            self._agreed = polls
            self._changed.notify_all()

    def _leave_fresh(self):
        reason = self._event["reason"]
        logging.info(
            "stopped    on %s, before the first step was done; run the same command to go on", reason
        )
        self._hand_over()
        self._leave(75)

    def _read(self, peer: Peer):
        try:
            data = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.connection)
            if not (peer.left or self._over):
                self.end_job(f"{peer} is gone: it was killed or has crashed")
            peer.left = True
            return
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            self._hear(peer, json.loads(line))

    def _hear(self, peer: Peer, message: dict):
        match message:
            case {"status": status}:
                peer.status = status
            case {"behind": text}:
                self._behind = text
            case {"want": kind, "reason": reason}:
                self._request(kind, reason)
            case {"ask": event}:
                self._event = event
                self._wanted[event["kind"]] = event["reason"]
                self._answer()
            case {"answer": answer}:
                self._collect(peer.process, answer)
            case {"agreed": polls}:
                self._agree(polls)
            case {"leave": event}:
                self._event = event
                self._leave_fresh()
            case {"bye": _}:
                peer.left = True
            case {"lost": text, "code": code, "stacks": stacks}:
                self.end_job(text, code, stacks, first=False)

    def _beat(self):
        mine = {"polls": self._polls, "doing": self.watchdog.doing, "seconds": round(self.watchdog.seconds())}
        if self._process:
            self._tell({"status": mine})
            return
        known = [(mine["polls"], self._me(), mine)]
        known += [(p.status["polls"], str(p), p.status) for p in self._peers if p.status]
        least, most = min(known)[0], max(known)[0]
        late = [f"{name}: {s['doing']} for {s['seconds']} s" for polls, name, s in known if polls == least]
        self._behind = "; ".join(late[:8]) if least < most else "none: all are equally far"
        self._tell({"behind": self._behind})

    def _check(self, now: float):
        """Is somebody silent, or does this process stall?"""
        for peer in self._peers:
            if now - peer.heard > self._silence_seconds and not (peer.left or self._over):
                silence = f"no sign of life for {now - peer.heard:.0f} s"
                self.end_job(f"{peer} is lost: {silence}; it is suspended, or its host is down", stacks=True)
        if (stall := self.watchdog.stall_message()) and not self._over:
            self._beat()
            behind = f"; behind: {self._behind}" if self._peers else ""
            self.end_job(f"{self._me()} stalls: {stall}{behind}", stacks=True)

    def end_job(self, text: str, code: int = 1, stacks: bool = False, first: bool = True):
        """The job cannot go on: tells the others, says why, ends the process."""
        self._over = True
        if self._process == 0 or first:
            self._tell({"lost": text, "code": code, "stacks": stacks})
        speaks = self._process == (1 if text.startswith("process 0 ") else 0)
        logging.log(logging.ERROR if speaks else logging.INFO, "trainit: error: %s", text)
        if stacks and self._stacks:
            with self._stacks.open("a") as file:
                file.write(stacks_of_all())
            logging.info("every thread's stack is in %s", self._stacks)
        self._hand_over()
        self._leave(code)

    def _hand_over(self):
        """Lets what was said arrive: the lead leaves last, when all others have closed, or soon."""
        self._over, until = True, time.monotonic() + 10
        for peer in self._peers:
            try:
                if self._process == 0:
                    peer.connection.shutdown(socket.SHUT_WR)
                while time.monotonic() < until:
                    peer.connection.settimeout(until - time.monotonic())
                    if not peer.connection.recv(1 << 16):
                        break
            except (OSError, ValueError):
                continue

    def _tell(self, message: dict):
        """Sends to all that this process is connected to."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in self._peers:
                try:
                    peer.connection.send(line)
                except OSError:  # if it is lost, that is noticed where it is read
                    continue

    def _me(self) -> str:
        return f"process {self._process} ({socket.gethostname()}, pid {os.getpid()})"
