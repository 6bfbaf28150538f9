"""Signs of life that the processes of a job exchange: which are lost, and which are late."""

import time
from typing import Any

from trainit.cluster.messages import Peers, describe_process

BEAT_SECONDS = 2.0  # between signs of life


class Heartbeats:
    """One process's part: its own signs of life, and what it hears of the others'."""

    def __init__(self, process: int, peers: Peers, silence_seconds: float):
        """A peer without any sign of life for `silence_seconds` is lost."""
        self._process, self._peers, self._silence_seconds = process, peers, silence_seconds
        self._sent, self._checked = 0.0, time.monotonic()
        self.late = ""  # the processes that have done the fewest steps, as process 0 reports

    def was_suspended(self, now: float) -> bool:
        """Whether this process was itself suspended until now, and others perhaps too: then all are heard."""
        gap, self._checked = now - self._checked, now
        if gap <= self._silence_seconds / 4:
            return False
        for peer in self._peers:
            peer.heard = now
        return True

    def is_due(self, now: float) -> bool:
        """Whether it is time for the next sign of life; counts it as sent."""
        if now - self._sent <= BEAT_SECONDS:
            return False
        self._sent = now
        return True

    def send(self, polls: int, doing: str, seconds: float):
        """Sends a sign of life to process 0; process 0 sends all others the names of those that are late."""
        # How far this process is, what it does now, and for how long it has made no progress.
        own: dict[str, Any] = {"polls": polls, "doing": doing, "seconds": round(seconds)}
        if self._process:
            self._peers.send({"status": own})
            return
        known = [(describe_process(self._process), own)]
        known += [(str(peer), peer.status) for peer in self._peers if peer.status]
        counts = [status["polls"] for _, status in known]
        slow = [(name, status) for name, status in known if status["polls"] == min(counts)]
        late = "; ".join(f"{name}: {s['doing']} for {s['seconds']} s" for name, s in slow[:8])
        self.late = late if min(counts) < max(counts) else "none: all are equally far"
        self._peers.send({"late": self.late})

    def silent(self, now: float) -> str:
        """Which process is lost, or ""."""
        for peer in self._peers:
            if now - peer.heard > self._silence_seconds and not peer.left:
                silence = f"no sign of life for {now - peer.heard:.0f} s"
                return f"{peer} is lost: {silence}; it is suspended, or its host is down"
        return ""
