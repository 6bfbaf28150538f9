"""Where metrics go: metrics.jsonl, W&B, a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from absl import logging
from tqdm import tqdm

from trainit.files import write_atomically
from trainit.logs import quantity

LINE_SECONDS = 10.0  # between progress lines where there is no terminal


class JsonLines:
    """metrics.jsonl: one JSON object per logged step, appended."""

    def __init__(self, path: Path, keep_through: int):
        """
        Args:
            path: the file's.
            keep_through: lines of later steps are dropped, since a resume does these steps again; so is a
                last line that a crash left unfinished.
        """
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept += [line + "\n"] if json.loads(line)["step"] <= keep_through else []
                except json.JSONDecodeError:
                    continue
        write_atomically(path, "".join(kept))
        self._file = path.open("a")

    def log(self, record: Mapping):
        # JSON has no NaN and no infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def sync(self):
        """Returns when all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self):
        self._file.close()


class WeightsAndBiases:
    """A W&B run that a resumed job continues. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, workdir: Path, project: str, name: str, run_id: str, config: Mapping):
        import wandb  # here, because it is slow to import and not installed everywhere

        self._run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=workdir, config=dict(config)
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping):
        self._run.log(dict(record))

    def close(self, code: int):
        self._run.finish(exit_code=code)


class Progress:
    """Shows how far the run is: a bar on a terminal, otherwise a line every `LINE_SECONDS`."""

    def __init__(self, start: int, steps: int):
        """
        Args:
            start: steps done so far.
            steps: how many the whole run has.
        """
        self._start, self._steps = start, steps
        self._newest: dict = {}  # the newest value of each metric: not every step has all of them
        self._line_at, self._bar = 0.0, None
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}% {bar:24} step {n_fmt}/{total_fmt}{postfix} [{elapsed} < {remaining}]"
            self._bar = tqdm(total=steps, initial=start, bar_format=layout, dynamic_ncols=True, smoothing=0.1)

    def show(self, step: int, metrics: Mapping):
        if step == self._start:
            return
        self._newest |= metrics
        text = ""
        if "train/loss" in self._newest:
            text = f"loss {self._newest['train/loss']:.3f}"
        if "throughput/tokens_per_second" in self._newest:
            text += f"  {quantity(self._newest['throughput/tokens_per_second'])} tokens/s"
        if "throughput/mfu" in self._newest:
            text += f"  MFU {self._newest['throughput/mfu']:.1%}"
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


class RunLogger:
    """Logs a run's metrics: to metrics.jsonl, W&B and the progress bar. Only process 0 does anything."""

    def __init__(
        self, lead: bool, workdir: Path, config: Mapping, start: int, keep_through: int, wandb_id: str
    ):
        """
        Args:
            lead: whether this process is the one that writes.
            workdir: the run's folder.
            config: the resolved config.
            start: steps done so far.
            keep_through: see `JsonLines`.
            wandb_id: the W&B run to begin or to continue.
        """
        self._jsonl: JsonLines | None = None
        self._progress: Progress | None = None
        self._wandb: WeightsAndBiases | None = None
        if not lead:
            return
        self._jsonl = JsonLines(workdir / "metrics.jsonl", keep_through)
        if config["wandb"]["project"]:
            name = config["wandb"]["name"] or workdir.name
            self._wandb = WeightsAndBiases(workdir, config["wandb"]["project"], name, wandb_id, config)
        self._progress = Progress(start, config["steps"])

    def log(self, step: int, metrics: Mapping, write: bool = True):
        """Shows the metrics of a step on the progress bar and, if `write`, appends them to the records."""
        record = {"step": step, **metrics}
        if self._progress:
            self._progress.show(step, metrics)
        if self._jsonl and write:
            self._jsonl.log(record)
        if self._wandb and write:
            self._wandb.log(record)

    def sync(self):
        """Returns when everything that was logged is on disk."""
        if self._jsonl:
            self._jsonl.sync()

    def close(self, code: int):
        """Closes everything; W&B learns the exit code."""
        for part in (self._progress, self._jsonl):
            if part:
                part.close()
        if self._wandb:
            self._wandb.close(code)
