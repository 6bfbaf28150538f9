"""Snapshots of a run: taken every few steps, found again after a restart."""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging

from trainit import __version__
from trainit.checkpoints.snapshots import folder, parts
from trainit.checkpoints.snapshots.neighbours import Neighbours
from trainit.checkpoints.state import TrainState
from trainit.cluster import sync
from trainit.cluster.transfers import Wire
from trainit.cluster.watchdog import Watchdog
from trainit.config import FREE, Config, flatten, require

SHARE = 0.01  # of the time of all steps that snapshots may take of it, where the run proposes how often
MEASURED = 3  # snapshots after which it does; the first one is slower
BUSY, FAILED, WHOLE = range(3)  # what has become of the newest one


@dataclass(frozen=True)
class Snapshot:
    """One that is whole, in the memory of the job's processes."""

    step: int
    own: parts.Part

    @property
    def meta(self) -> dict:
        """What a checkpoint's meta data are."""
        return self.own.header["meta"]

    def state(self, abstract_state: TrainState) -> TrainState:
        """Lays the state out as `abstract_state`. All processes call it together."""
        return parts.restore(self.own, abstract_state)


class Snapshots:
    """The snapshots of one run, on the hosts of its processes.

    Each process copies its shards of the state, and what a checkpoint's meta data are, to its memory. A
    thread writes them to a folder of the host while the run continues. The newest two stay: one that is
    whole, and one that is being written. All processes call all methods except `is_due` together.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        about: Mapping[str, Any],
        abstract_state: TrainState,
        watchdog: Watchdog,
        wire: Wire,
    ):
        """`about` has to be the same in all starts that use each other's; ConfigError for a bad folder."""
        self._every, self._steps = config.checkpoint.local_steps, config.steps
        self._workdir, self._abstract, self._watchdog = workdir, abstract_state, watchdog
        if not self._every:
            return
        self._process, self._count = jax.process_index(), jax.process_count()
        require(
            self._count == 1 or bool(wire.token),
            f"checkpoint.local_steps={self._every} gives the state to other processes, and this job has no "
            "token to know them by: set TRAINIT_TOKEN to one secret in the environment of all processes",
        )
        about = {**about, "config": _hash(config), "processes": self._count, "version": __version__}
        run = folder.run_id(workdir)
        self._folder = folder.PartFolder(
            config.checkpoint.local_folder,
            run,
            self._process,
            {"run": f"{run} in {workdir.absolute()}"} | about,
        )
        self._others = Neighbours(self._folder, wire) if self._count > 1 else None
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._writing: Future[None] | None = None
        self._newest = self._whole = -1
        self._blocked: list[float] = []  # seconds for which the loop has waited

    def newest(self, after: int) -> Snapshot | None:
        """The newest snapshot of a step after `after` that all processes can read; None: there is none."""
        if not self._every:
            return None
        files = self._folder.find()
        known = [json.loads(text) for text in sync.gather_text(json.dumps(sorted(files)))]
        newest = max((step for own in known for step, _ in own), default=-1)
        for step in folder.whole_steps(known, after):
            part = self._read(step, files.get((step, self._process), [])) or self._fetch(step, known)
            if all(sync.gather(part is not None)):
                assert part is not None
                self._newest = self._whole = step
                break
        else:
            part, step = None, -1
        if newest > max(step, after):
            place = f"snapshot {step}" if part else f"checkpoint {after}" if after >= 0 else "the beginning"
            logging.warning(
                "snapshots  that of step %d is not whole: the run continues from %s", newest, place
            )
        if part and self._others and [step, self._process] not in known[self._others.keeper]:
            self._writing = self._thread.submit(self._give, step, part.path)
        return Snapshot(step, part) if part else None

    def _read(self, step: int, paths: list[Path]) -> parts.Part | None:
        """This process's part of a snapshot; None if it has none that is whole."""
        for path in paths:
            try:
                part = parts.read(path)
                if part.header["arrays"] == parts.layout(self._abstract):
                    return part
                logging.warning("snapshots  %s is of another layout: not used", path)
            except (OSError, ValueError) as error:
                logging.warning("snapshots  %s: not used", error)
        return None

    def _fetch(self, step: int, known: list[list]) -> parts.Part | None:
        """This process's part of a snapshot, from another host."""
        for process, own in enumerate(known):
            if self._others and process != self._process and [step, self._process] in own:
                try:
                    path = self._others.fetch(process, step)
                except OSError as error:
                    logging.warning("snapshots  part %d of step %d: %s", self._process, step, error)
                else:
                    logging.info(
                        "snapshots  part %d of step %d: from process %d", self._process, step, process
                    )
                    if part := self._read(step, [path]):
                        return part
        return None

    def forget_others(self):
        """Removes all except the one from which the run continues. Call it once nothing can refuse the start.

        A part that stayed could be taken for one of a later snapshot of the same step.
        """
        if self._every:
            self._folder.keep({self._whole})

    def is_due(self, step: int) -> bool:
        """Whether one is due after `step` steps."""
        return self._every > 0 and 0 < step < self._steps and step % self._every == 0 and step != self._newest

    def take(self, step: int, state: TrainState, meta: Mapping[str, Any]):
        """Copies the state after `step` steps; the caller may reuse its memory as soon as this returns.

        If the one before is not yet whole on all hosts, there is none of this step.
        """
        jax.block_until_ready(state)
        begun = time.perf_counter()
        before = sync.gather(self._outcome())
        if BUSY in before:
            logging.info(
                "snapshots  none of step %d: that of step %d is still being written", step, self._newest
            )
            return
        if FAILED not in before:
            self._whole = self._newest
        shards = parts.copy(state)
        self._newest = step
        self._blocked.append(time.perf_counter() - begun)  # before the thread counts them
        self._writing = self._thread.submit(self._write, step, self._whole, meta, shards, begun)

    def _outcome(self) -> int:
        if self._writing is None:
            return WHOLE
        return BUSY if not self._writing.done() else FAILED if self._writing.exception() else WHOLE

    def _write(self, step: int, whole: int, meta: Mapping, shards: list, begun: float):
        """Writes this process's part, in the thread; `begun` is when it was copied."""
        try:
            self._folder.keep({whole, step})
            header = {"about": self._folder.about, "arrays": parts.layout(self._abstract), "meta": meta}
            path = self._folder.path(step, self._process)
            size = parts.write(path, header, shards)
            shards.clear()  # their memory is free again while the file is sent
            self._give(step, path)
        except Exception as error:
            shards.clear()
            logging.warning("snapshots  that of step %d is not whole: %s", step, error)
            raise
        if len(self._blocked) == MEASURED:
            self._propose(size, time.perf_counter() - begun, time.thread_time() / len(self._blocked))

    def _give(self, step: int, path: Path):
        if self._others:
            self._others.give(step, path)

    def _propose(self, size: int, written: float, used: float):
        """Logs what snapshots cost, and how often to take them; `used` is the thread's time on a core."""
        blocked, step = statistics.median(self._blocked), self._watchdog.usual_seconds()
        if not step:
            return
        if jax.local_devices()[0].platform == "cpu":  # steps want the thread's core
            blocked += used / (os.cpu_count() or 1)
        proposed = max(math.ceil(blocked / (SHARE * step)), math.ceil(written / step), 1)
        logging.info(
            "snapshots  of %.1f MB a process in %s: each costs the loop %.3g ms, and is whole after %.3g s; "
            "a step takes %.3g s. Every %d steps, they cost %.2g %%; checkpoint.local_steps=%d costs "
            "at most 1 %%",
            *(size / 1e6, self._folder.root, 1e3 * blocked, written, step, self._every),
            *(100 * blocked / (step * self._every), proposed),
        )

    def close(self):
        """Removes all snapshots: what the run has done is durable."""
        if self._every:
            self._thread.shutdown()
            sync.agree(0)  # no process writes any more
            if self._others:
                self._others.close()
            self._folder.remove()
            if sync.is_lead():
                (self._workdir / folder.ID_FILE).unlink(missing_ok=True)


def _hash(config: Config) -> str:
    """What is the same in configs of which one continues with the other's snapshots.

    They differ in what a resume may change. Statistics are not among it, since the state has some, nor is
    skipped data, which may send a run further back.
    """
    fields = {
        name: value
        for name, value in flatten(config.to_dict()).items()
        if name.startswith(("diagnostics.", "spikes.")) or not FREE.match(name)
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
