"""The metrics of steps: read from the devices, logged, and watched for updates that are not finite."""

from dataclasses import dataclass

from trainit.cluster.monitor import JobMonitor
from trainit.config import Config
from trainit.train import diagnostics
from trainit.train.reports import metrics
from trainit.train.reports.metrics import Meter
from trainit.train.reports.trackers import RunLogger
from trainit.train.skipped import loss_scale
from trainit.train.skipped.lines import SkippedSteps


class NonFiniteError(RuntimeError):
    """Too many steps in a row in which loss, gradient or update was not finite, or a spike."""


@dataclass
class StepRecorder:
    """Turns the metrics that steps leave on the devices into log records.

    It reads the metrics of a step while the next one runs, so that the devices never wait for this process,
    and raises NonFiniteError after `max_skipped` steps in a row that were skipped. Where validation is due
    after a step, its metrics join the step's record. If the job stops before the validation is done, the
    record is `postponed`: it goes into the checkpoint, and the job that resumes there does both.
    """

    config: Config
    tokens: int  # trained on in all steps that were read: targets, without padding
    logger: RunLogger
    meter: Meter
    monitor: JobMonitor
    postponed: dict | None
    skips: SkippedSteps
    _pending: tuple[int, dict] | None = None  # the newest step and its metrics, still on the device

    def add(self, step: int, on_device: dict):
        """Takes the metrics of a step that has just been started, and logs those of the step before."""
        self._log(self._read((step, on_device)))

    def flush(self):
        """Logs the newest step, for which it waits."""
        self._log(self._read())

    def newest(self) -> dict:
        """The record of the newest step, for which it waits; {} if that is logged already. For `finish`."""
        return (self.postponed or {}) | self._read()

    def finish(self, step: int, record: dict, is_due: bool, validation: dict | None):
        """Logs a record from `newest`, unless validation metrics are due for it and not there yet."""
        self.postponed = record if is_due and not validation else None
        if self.postponed is None:
            if validation:
                record |= {"step": step, "tokens": self.tokens} | validation
            self._log(record)
        self.meter.pause()

    def _read(self, newer: tuple[int, dict] | None = None) -> dict:
        """The metrics of the pending step as numbers, for which it waits; `newer` is pending from now on."""
        pending, self._pending = self._pending, newer
        if pending is None:
            return {}
        step, values = pending[0], metrics.numbers(self.config, *pending)
        skipped_in_a_row = values.pop("skipped_in_a_row")
        self.tokens += int(values.pop("tokens"))
        in_rows = int(values.pop("rows_tokens"))  # speed is that of all tokens, whether they count or not
        record = {"step": step, "tokens": self.tokens} | values | self.meter.step(in_rows)

        self.monitor.step_done()
        self.skips.add(record, skipped_in_a_row, now=newer is None)
        if skipped_in_a_row == self.config.max_skipped:
            self._give_up(record)
        return record

    def _give_up(self, record: dict):
        """Logs all that is known and ends the run: too many steps in a row were skipped."""
        self._log(record)
        # A step under way belongs to the checkpoint that is saved now.
        newest, last = self._pending[0] if self._pending else record["step"], self.skips.newest
        self.flush()
        raise NonFiniteError(
            f"{self.config.max_skipped} steps in a row (max_skipped) were skipped, up to {last}"
            + (f", at the lowest loss scale, {loss_scale.FLOOR:g}" if "train/loss_scale" in record else "")
            + f"; the state is in checkpoint {newest}"
        )

    def _log(self, record: dict):
        """Shows a record, and writes it where the config asks for it."""
        if record:
            step = record["step"]
            write = step % self.config.log.every_steps == 0 or "valid/loss" in record
            write = write or bool(diagnostics.is_due(self.config.diagnostics, step))
            self.logger.log(step, record, write)
