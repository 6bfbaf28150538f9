"""Where metrics go: metrics.jsonl, trackers such as W&B, a progress bar."""

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from trainit.cluster.files import errors_name, write_atomically
from trainit.cluster.logs import quantity
from trainit.config import Config
from trainit.train.reports import tensorboard, wandb
from trainit.train.reports.background import BackgroundTracker, Tracker
from trainit.train.reports.tensorboard import TensorBoard
from trainit.train.reports.wandb import WandB

SAVED_LINES = 1000  # of metrics.jsonl, in each checkpoint
CLOSE_SECONDS = 30.0  # that a run which has ended waits for its trackers
LINE_SECONDS = 10.0  # between progress lines where there is no terminal
SHOWN = {  # as progress
    "train/loss": "loss {:.3f}".format,
    "throughput/tokens_per_second": lambda value: f"{quantity(value)} tokens/s",
    "throughput/mfu": "MFU {:.1%}".format,
}


class JsonLines:
    """metrics.jsonl: one JSON object per logged step, appended.

    Lines of steps after `keep_through`, which a resume does again, are dropped, and such as are no steps.
    Lines that a checkpoint has `saved` (see `sync`) replace those that are missing or damaged.
    """

    def __init__(self, path: Path, keep_through: float, saved: Mapping | None = None):
        self._path = path
        self._open(keep_through, saved or {"lines": 0, "newest": []})

    def _open(self, keep_through: float, saved: Mapping):
        """Reads the file, writes it again as it should be, and opens it to append."""
        kept: dict[int, list[str]] = {}
        self.newest = -1  # step that was there before
        for line in self._path.read_text(errors="replace").splitlines() if self._path.exists() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                self.newest = int(json.loads(line)["step"])
                kept.setdefault(self.newest, []).append(line + "\n")
        known: dict[int, list[str]] = {}
        for line in saved["newest"]:
            known.setdefault(json.loads(line)["step"], []).append(line)
        found = [line for step, own in known.items() for line in own if line not in kept.get(step, ())]
        lines = [line for step, own in sorted((kept | known).items()) if step <= keep_through for line in own]
        if found or len(lines) < saved["lines"]:
            text = "metrics    %s lacked %d of %d lines or had others: %d are written again, %d are lost"
            lost = max(saved["lines"] - len(lines), 0)
            logging.warning(text, self._path, len(found) + lost, saved["lines"], len(found), lost)
        write_atomically(self._path, "".join(lines))
        self._file = self._path.open("a", buffering=1)  # each line is written at once
        self._lines, self._bytes = len(lines), self._path.stat().st_size
        self._last = collections.deque(lines[-SAVED_LINES:], SAVED_LINES)

    def log(self, record: Mapping):
        # JSON has no NaN and no infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._check()
        self._last.append(json.dumps(finite) + "\n")
        with errors_name(self._path):
            self._bytes += self._file.write(self._last[-1])
        self._lines += 1

    def _check(self):
        """Writes the newest lines again if the file was deleted, replaced or cut off."""
        try:
            now, own = self._path.stat(), os.fstat(self._file.fileno())
            is_whole = os.path.samestat(now, own) and now.st_size >= self._bytes
        except FileNotFoundError:
            is_whole = False
        if not is_whole:
            self._file.close()
            self._open(math.inf, {"lines": self._lines, "newest": list(self._last)})

    def sync(self) -> dict:
        """Forces all lines to the disk; returns what `newest_lines` does."""
        self._check()
        with errors_name(self._path):
            os.fsync(self._file.fileno())
        return self.newest_lines()

    def newest_lines(self) -> dict:
        """What checkpoints and snapshots keep of the lines: how many they are, and the newest."""
        return {"lines": self._lines, "newest": list(self._last)}

    def close(self):
        with contextlib.suppress(OSError):  # all lines are written, unless `log` has failed
            self._file.close()


class Progress:
    """Shows how far a run that begins at step `start` is: a bar on a terminal, otherwise lines."""

    def __init__(self, start: int, steps: int):
        self._start, self._steps = start, steps
        self._newest: dict = {}  # the newest value of each metric: not every step has all of them
        self._line_at, self._bar = 0.0, None
        if sys.stderr.isatty():
            # A terminal of 80 columns has room for the time left and the loss.
            layout = "{percentage:3.0f}% {bar:10} step {n_fmt}/{total_fmt} [{elapsed} < {remaining}]{postfix}"
            self._bar = tqdm(total=steps, initial=start, bar_format=layout, dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, metrics: Mapping):
        if step == self._start:
            return
        self._newest |= metrics
        text = "  ".join(show(self._newest[name]) for name, show in SHOWN.items() if name in self._newest)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._line_at > LINE_SECONDS or step == self._steps:
            self._line_at = time.monotonic()
            seconds = self._newest.get("time/step_seconds", 0) * (self._steps - step)
            left = f"  {tqdm.format_interval(seconds)} left" if seconds else ""
            logging.info("step %d/%d  %s%s", step, self._steps, text, left)

    def close(self):
        if self._bar is not None:
            self._bar.close()


def usable_trackers(config: Config) -> list[str]:
    """The trackers that the config names, without those that lack something here, which is one line each."""
    usable = []
    for name in config.trackers:
        try:
            lacking = {"tensorboard": tensorboard, "wandb": wandb}[name].lacks()
        except Exception as error:  # its package cannot be imported
            lacking = f"{type(error).__name__}: {error}"
        if lacking:
            logging.warning("%-10s %s; the run continues without it", name, lacking)
        else:
            usable.append(name)
    return usable


class RunLogger:
    """Logs a run's metrics: to metrics.jsonl, to trackers and as progress. Only process 0 does anything."""

    def __init__(
        self,
        lead: bool,
        workdir: Path,
        config: dict,
        start: int,
        keep: int,
        wandb_id: str = "",
        saved: Mapping | None = None,
        names: Sequence[str] = (),
    ):
        """Begins at step `start`, in metrics.jsonl after step `keep`, in a new or continued W&B run.

        `saved` is what the checkpoint has from `sync`, and `names` are those of the trackers to use.
        """
        self._lead = lead
        if not lead:
            return
        self._jsonl = JsonLines(workdir / "metrics.jsonl", keep, saved)
        self._samples: JsonLines | None = None
        self._open_samples = lambda: JsonLines(workdir / "samples.jsonl", keep)
        newest = self._jsonl.newest  # when this job begins
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(workdir / "tensorboard", config, keep + 1),
            "wandb": lambda: WandB(workdir, config, wandb_id, newest),
        }
        self._trackers = [BackgroundTracker(name, makers[name]) for name in names]
        self._progress = Progress(start, config["steps"])

    def log(self, step: int, metrics: Mapping, write: bool = True):
        """Shows the metrics of a step as progress and, if `write`, appends them to the records."""
        if self._lead:
            self._progress.show(step, metrics)
        if self._lead and write:
            self._jsonl.log({"step": step, **metrics})
            for tracker in self._trackers:
                tracker.call("log", step, {k: v for k, v in metrics.items() if k != "step"})

    def log_texts(self, step: int, texts: Sequence[Mapping]):
        """Appends objects of a prompt and its text to samples.jsonl, and shows them in trackers."""
        if self._lead:
            self._samples = self._samples or self._open_samples()
            for text in texts:
                self._samples.log(text)
            for tracker in self._trackers:
                tracker.call("log_texts", step, texts)

    def sync(self) -> dict:
        """Returns, when everything that was logged is on disk, what a checkpoint keeps of metrics.jsonl."""
        if self._lead and self._samples:
            self._samples.sync()
        return self._jsonl.sync() if self._lead else {}

    def newest_lines(self) -> dict:
        """As `sync`, but what was logged may still be on its way to the disk."""
        return self._jsonl.newest_lines() if self._lead else {}

    def close(self, code: int):
        """Closes everything; trackers learn the exit code, and have CLOSE_SECONDS for what is waiting."""
        if self._lead:
            self._progress.close()
            self._jsonl.close()
            if self._samples:
                self._samples.close()
            deadline = time.monotonic() + CLOSE_SECONDS
            for tracker in self._trackers:
                tracker.close(code)
            for tracker in self._trackers:
                tracker.wait(deadline)
