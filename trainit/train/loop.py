"""Training: `run` has the order of events; each of them is in a file of its own."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import logging

from trainit import __version__
from trainit.checkpoints.retry import SaveRetry
from trainit.checkpoints.snapshots.keeper import Snapshots
from trainit.checkpoints.state import TrainState
from trainit.checkpoints.store import CheckpointStore, due
from trainit.cluster import device_checks, devices, files, sync
from trainit.cluster.monitor import JobMonitor
from trainit.cluster.transfers import Wire
from trainit.config import Config
from trainit.config.exit_codes import DONE, FAILED, STOPPED, USAGE
from trainit.data.documents.inputs import fingerprint
from trainit.data.training_data import TrainingData
from trainit.parallel.mesh import RunShape
from trainit.prepare import background
from trainit.train.evaluate import Validation
from trainit.train.feed import BatchFeed
from trainit.train.profiling.tracer import Tracer
from trainit.train.recorder import NonFiniteError, StepRecorder
from trainit.train.reports import metrics, startup_report
from trainit.train.reports.startup_timer import StartupTimer
from trainit.train.reports.trackers import JsonLines, RunLogger, usable_trackers
from trainit.train.resume import Resume, warm_up_again
from trainit.train.skipped.lines import SkippedSteps
from trainit.train.step import build

WriteTexts = Callable[[int, dict, RunShape], list[dict]]  # of step and parameters, for samples.jsonl


def run(job: "Job") -> int:
    """Trains until all steps are done or the job is asked to stop; returns the exit code.

    All processes of a job take the same way through it. `step` counts the steps that are done, so that the
    next one trains on batch number `step`. Raises ConfigError, NonFiniteError or SaveError; anything else if
    a data worker died or another process is lost.
    """
    if job.is_complete():
        job.snapshots.close()
        return DONE
    job.open()
    state, step, monitor, exit_code = job.start.state, job.start.step, job.monitor, FAILED
    try:
        while True:
            # 1. Is the job to stop? All processes get the same answer at the same step.
            reason = monitor.stop_reason()

            # 2. Validate and save, if that is due after this step or the job stops here.
            reason = job.validate_and_save(step, state, reason)
            if reason or step == job.config.steps:
                break

            # 3. Save again, if a process could not write its part of the newest checkpoint.
            if monitor.agreement.must_save_again():
                job.recorder.flush()
                job.saves.save_again(step, state)

            # 4. Keep a snapshot on the hosts, if that is due.
            job.keep_snapshot(step, state)

            # 5. Wait for the next batch. A request to stop ends the wait; then save, and stop.
            with job.timer.part("data"):
                batch = job.feed.next()
            if reason := monitor.stop_reason():
                job.recorder.flush()
                job.saves.save(step, state)
                break

            # 6. Start the train step. It runs on the devices while this process continues.
            state, on_device = job.train(step, state, batch)
            step += 1

            # 7. Meanwhile: fetch the next batch, log the step before, report a save that has failed.
            job.feed.advance()
            job.recorder.add(step, on_device)
            job.saves.check()
        job.saves.settle(step, state)
        job.snapshots.close()
        exit_code = STOPPED if reason else DONE
    except NonFiniteError:
        job.saves.save(step, state)
        job.saves.settle(step, state)
        raise
    finally:
        job.logger.close(exit_code)
    job.report_end(step, reason)
    return exit_code


@dataclass
class Job:
    """The parts of a run that work together, and the events of `run` that need several of them."""

    config: Config
    data: TrainingData  # to train on and to validate with
    shape: RunShape  # how the run lies on the devices
    workdir: Path  # the run's folder; a checkpoint in it is resumed
    monitor: JobMonitor  # connects this process with the others of the job
    wire: Wire  # on which the others reach this one directly, for snapshots
    timer: StartupTimer  # measures what this process does until its first step is done
    write_texts: WriteTexts = lambda *_: []

    def __post_init__(self):
        """Makes the functions of the run, and the state and position that it begins with."""
        c, data, shape = self.config, self.data, self.shape
        with self.timer.part("shapes"):
            self._steps = build(c, shape)
        # A tracker that lacks something, such as a login, is reported before anything is compiled.
        self._trackers = usable_trackers(c) if sync.is_lead() else ()
        startup_report.report(c, self._steps, shape, data, self.workdir)
        self._checkpoints = CheckpointStore(self.workdir, c.checkpoint.keep)
        about = {"data": fingerprint(data.identity), "mesh": shape.sizes}
        own = about, self._steps.abstract_state, self.monitor.watchdog
        self.snapshots = Snapshots(self.workdir, c, *own, self.wire)
        resume = Resume(c, data, shape, self._steps, self._checkpoints, self.snapshots)
        with self.timer.part("restore" if resume.reads_checkpoint else "init"):
            self.start = resume.start_point()
        self.snapshots.forget_others()

    def is_complete(self) -> bool:
        """Whether the run needs nothing more: all steps are done, and the last one is validated."""
        steps = self.config.steps
        if is_complete := self.start.step >= steps and self.start.is_validated(self.workdir):
            if sync.is_lead() and self.start.metrics:  # lines that were damaged since the end are found again
                JsonLines(self.workdir / "metrics.jsonl", steps, self.start.metrics).close()
            logging.info("complete   all %d steps are done; nothing to do", steps)
        return is_complete

    def open(self):
        """Opens the run's files, and starts to read its data."""
        c, start, is_lead = self.config, self.start, sync.is_lead()
        skipped = int(start.state.skipped_in_a_row)
        if skipped >= c.max_skipped:
            raise NonFiniteError(
                f"the run ended at step {start.step} after {skipped} steps in a row "
                f"that were skipped; raise max_skipped={c.max_skipped}, or go back: spikes.skip_data"
            )
        if is_lead:
            files.write_json(self.workdir / "config.json", c.to_dict())
            facts = metrics.facts(c.model, self._steps.abstract_state, self.shape)
            files.write_json(self.workdir / "run.json", facts | {"changes": start.changes})

        data, shape, meter, monitor = self.data, self.shape, metrics.Meter(c.model), self.monitor
        self.feed = BatchFeed(data, shape, monitor, meter, start.step, start.position)
        fail = functools.partial(monitor.end_job, code=USAGE)
        background.compare(data.digests, jax.process_index(), jax.process_count(), fail)
        self._validate = Validation(c, data, shape, self._steps, monitor, self.timer)

        # Lines of metrics.jsonl that this job is going to write again are dropped.
        last_kept = start.step - (start.postponed is not None) if start.is_resumed else -1
        with self.timer.part("trackers"):
            kept = last_kept, start.wandb_id, start.metrics, self._trackers
            self.logger = RunLogger(is_lead, self.workdir, c.to_dict(), start.step, *kept)
        about = self.logger, meter, monitor, start.postponed, SkippedSteps(c, int(start.state.skipped))
        self.recorder = StepRecorder(c, start.position.tokens, *about)
        store, every = self._checkpoints, c.check.every_steps
        self._check = device_checks.DeviceCheck(every, self._steps, monitor.watchdog, store)
        self.saves = SaveRetry(self._checkpoints, monitor, self._checkpoint_meta, start.saved_step)
        self.saves.check_state = self._check.replicas
        self._tracer = Tracer(c, self.workdir, monitor.watchdog)

    def validate_and_save(self, step: int, state: TrainState, reason: str) -> str:
        """Validates and saves if that is due after `step` steps; returns why to stop here, or ""."""
        # What is due? If this job has just resumed at `step`, the job before has saved and validated there,
        # unless it was stopped before the validation: then `postponed` holds the record that waits for it.
        c, recorder = self.config, self.recorder
        is_last, is_new = step == c.steps, step != self.saves.saved_step
        is_postponed = recorder.postponed is not None
        is_done = self.start.is_resumed and step == self.start.step
        validate = (is_last or due(c.eval.every_steps, step)) and (is_postponed or not is_done)
        save = is_last or (step > 0 and due(c.checkpoint.save_steps, step))
        if not (validate or is_postponed or (is_new and (save or reason))):
            return reason

        # Validation comes before the save: if the job stops meanwhile, the checkpoint says that it is due.
        record = recorder.newest()
        validation = self._validate(step, state.params) if validate and not reason else None
        reason = reason or self.monitor.stop_reason()
        if validation and c.eval.prompts:
            with self.monitor.watchdog.long_task("writing texts"):
                self.logger.log_texts(step, self.write_texts(step, state.params, self.shape))
        recorder.finish(step, record, validate, validation)
        if save or reason:
            self.saves.save(step, state)
        return reason

    def keep_snapshot(self, step: int, state: TrainState):
        """Copies the state to the hosts, if that is due after `step` steps."""
        if self.snapshots.is_due(step):
            self.recorder.flush()
            self._check.replicas(step, state)
            self.snapshots.take(step, state, self._checkpoint_meta(is_durable=False))

    def train(self, step: int, state: TrainState, batch: dict | None) -> tuple[TrainState, dict]:
        """Starts the train step after `step` others: the state after it, and its metrics on the device."""
        self._check(step, state, batch)
        if self.timer.is_over:
            return self._start_step(step, state, batch)
        # The first step of this process is waited for, and ends its start-up. Compiling it began in another
        # thread, in Resume; here this process waits for the rest. A request to stop ends it at once, by the
        # monitor's thread: no step is done, so nothing is lost.
        with self.timer.part("compile"):
            self._steps.train.compiled(state, batch)
        with self.timer.part("step"):
            result = jax.block_until_ready(self._start_step(step, state, batch))
        logging.info("start      to the end of step %d: %s", step + 1, self.timer.over())
        return result

    def _start_step(self, step: int, state: TrainState, batch: dict | None) -> tuple[TrainState, dict]:
        sizes = self.shape.batch_sizes
        if step == 0 or step not in sizes.starts:
            start = functools.partial(self._steps.train, state, batch)
            compiled = functools.partial(self._steps.train.compiled, state, batch)
            return self._tracer.run(step, state, start, compiled)
        # Batches of another size need another program, which is compiled here.
        logging.info("batch      %d sequences from step %d on", sizes.at(step), step)
        with self.monitor.watchdog.long_task("compiling for another batch size"):
            return self._steps.train(state, batch)

    def _checkpoint_meta(self, is_durable: bool = True) -> dict:
        """What a checkpoint holds in addition to the state. All processes call it when a save starts."""
        # Metrics that a resume will not write again must be on disk before a durable one.
        return {
            "metrics": self.logger.sync() if is_durable else self.logger.newest_lines(),
            "config": self.config.to_dict(),
            **self.feed.position()._replace(tokens=self.recorder.tokens).to_meta(),
            **self.data.identity,
            "wandb_id": self.start.wandb_id,
            "postponed": self.recorder.postponed,
            "changes": self.start.changes,
            "version": __version__,
            "computed_on": devices.computed_on(self.shape.sizes, self.shape.attention),
        }

    def report_end(self, step: int, reason: str):
        """Logs how the job ended, and how to continue."""
        if reason:
            logging.info("stopped    on %s at step %d; run the same command to continue", reason, step)
            return
        logging.info("done       all %d steps; metrics in %s", step, self.workdir / "metrics.jsonl")
        logging.info("           checkpoint in %s", self._checkpoints.folder / str(step))
        logging.info("           train on: --config.steps=N --config.checkpoint.overwrite_config=True")
        logging.info("           and warm up again: %s", warm_up_again(self.config, step))
