"""Validation: total nats over total tokens, total bits over total bytes; overall and for each subset."""

import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import jax
import numpy as np
from absl import logging

from trainit.cluster.monitor import JobMonitor
from trainit.config import Config
from trainit.data.documents.targets import Targets
from trainit.data.training_data import TrainingData, validation_batches
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import RunShape
from trainit.train import tasks
from trainit.train.reports.startup_timer import StartupTimer
from trainit.train.step import CompiledSteps

MAX_SUBSETS = 256  # a split with more of them is validated as a whole only
SUMS = ("loss", "correct", "count", "bytes")  # that the eval step gives


@dataclass
class Validation:
    """Validates the parameters of a run: always on the same sequences of the split."""

    config: Config
    data: TrainingData
    shape: RunShape
    steps: CompiledSteps
    monitor: JobMonitor | None = None  # None: no job that could be stopped
    timer: StartupTimer | None = None

    def __post_init__(self):
        self._token_bytes, split = self.data.tokenizer.token_bytes(), self.data.validation
        # Of tokens that other programs made, the text is not known: they count as what their ids stand for.
        self._targets = Targets(split, self._token_bytes) if split.bytes is not None else None
        self._is_compiled = False
        stop_reason = self.monitor.stop_reason if self.monitor else str
        self._tasks = [tasks.read(given) for given in self.config.eval.tasks]
        self._answers = tasks.Answers(self.config, self.shape, self.steps, self.data.tokenizer, stop_reason)

    def __call__(self, step: int, params: dict) -> dict[str, float] | None:
        """The validation metrics of the parameters after `step` steps; None if the job stops meanwhile.

        "valid/loss" (nats per token), "valid/accuracy" and "valid/bits_per_byte" (NaN if no target is text)
        are over all tokens. If the dataset has several subsets, there are also "valid/loss/SUBSET" and
        "valid/bits_per_byte/SUBSET" of those that occur, and their plain means, "..._macro". With eval.tasks,
        "tasks/TASK/accuracy" and what else `tasks.Answers` gives.
        """
        # The first time compiles, which may take minutes: the watchdog must not take it for a stall.
        assert self.monitor is not None
        assert self.timer is not None
        watchdog = self.monitor.watchdog
        patience = nullcontext() if self._is_compiled else watchdog.long_task("compiling the evaluation")
        self._is_compiled = True
        with patience, self.timer.part("validation"):
            metrics = self.measure(params)
        if metrics is not None:
            loss, bits = metrics["valid/loss"], metrics["valid/bits_per_byte"]
            logging.info("step %d: validation loss %.4f, %.4f bits per byte", step, loss, bits)
        return metrics

    def measure(self, params: dict) -> dict[str, float] | None:
        """What a call returns, outside of a training run."""
        split, shape = self.data.validation, (1, *self.shape.batch_at(0)[1:])
        names = list(split.subsets) if 1 < len(split.subsets) <= MAX_SUBSETS else []
        layout, e = batch_sharding(self.shape.device_mesh), self.config.eval
        sums: list[dict] = []
        for batch in validation_batches(split, e.sequences, e.first, shape, layout, self._targets):
            if self.monitor is not None and self.monitor.stop_reason():
                return None
            sums.append(self.steps.evaluate(params, batch, self._token_bytes, len(names) or 1))
            jax.block_until_ready(sums[-2:-1])  # wait for the batch before; the devices work on this one
        metrics = _metrics(jax.device_get(sums), names)
        for task in self._tasks:
            begun, answers = time.monotonic(), self._answers(params, task)
            if not answers:
                return None
            metrics |= {f"tasks/{task.name}/{name}": value for name, value in answers.items()}
            text = f"{task.name}: accuracy {answers['accuracy']:.4f}, standard error {answers['stderr']:.4f}"
            seconds = time.monotonic() - begun
            logging.info("task       %s, %d questions in %.1f s", text, len(task.questions), seconds)
        return metrics


def _metrics(sums: list[dict], names: list[str]) -> dict[str, float]:
    """The metrics, from each batch's sums by subset; without names, only those of all tokens."""
    totals = {name: sum(batch[name].astype(np.float64) for batch in sums) for name in SUMS}
    loss, correct, count, bytes_ = (float(sum(totals[name])) for name in SUMS)
    result = {
        "valid/loss": loss / (count or math.nan),
        "valid/accuracy": correct / (count or math.nan),
        "valid/bits_per_byte": loss / math.log(2) / bytes_ if bytes_ else math.nan,
    }
    if not names:
        return result

    unnamed = "unnamed"  # documents without a subset
    while unnamed in names:
        unnamed = f"({unnamed})"
    names = [name or unnamed for name in names]
    rows = list(zip(names, *(totals[name].tolist() for name in ("loss", "count", "bytes")), strict=True))
    losses = {name: loss / count for name, loss, count, _ in rows if count}
    bits = {name: loss / math.log(2) / bytes_ for name, loss, count, bytes_ in rows if count and bytes_}
    result |= {f"valid/loss/{name}": value for name, value in losses.items()}
    result |= {f"valid/bits_per_byte/{name}": value for name, value in bits.items()}
    result["valid/loss_macro"] = statistics.mean(losses.values())
    result["valid/bits_per_byte_macro"] = statistics.mean(bits.values()) if bits else math.nan
    return result
