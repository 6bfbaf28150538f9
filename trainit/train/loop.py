"""The loop: the order of events, and nothing else."""

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path

import jax
from absl import logging

from trainit import __version__
from trainit.cluster import run_lock as folders
from trainit.cluster import sync
from trainit.cluster.monitor import JobMonitor
from trainit.config import Config
from trainit.data import training_data
from trainit.data.training_data import TrainingData
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import run_shape
from trainit.train import diagnostics, loss_scale, metrics, step
from trainit.train.checkpoint import CheckpointStore, due
from trainit.train.evaluate import evaluate
from trainit.train.resume import Resume
from trainit.train.save_retry import SaveRetry
from trainit.train.startup_report import describe
from trainit.train.startup_timer import StartupTimer
from trainit.train.state import TrainState
from trainit.train.trackers import RunLogger

DONE, STOPPED = 0, 75  # exit codes


class NonFiniteError(RuntimeError):
    """Too many steps in a row in which the loss, the gradient or the update was not finite."""


class Run:
    """One process's part of a training run."""

    def __init__(
        self,
        config: Config,
        dataset: TrainingData,
        workdir: Path,
        monitor: JobMonitor,
        start: StartupTimer,
        debug: bool = False,
    ):
        """
        Args:
            config: resolved.
            dataset: what the run trains on and validates with.
            workdir: the run's folder; what it holds is resumed.
            monitor: tells when to stop, and is told how far this process is.
            start: of this process, whose parts are counted up to the first step.
            debug: let the mesh shrink to the devices that there are.

        Raises:
            ConfigError: the config does not fit the devices, the run folder or the checkpoint.
        """
        self.config, self.dataset, self.workdir, self.monitor = config, dataset, workdir, monitor
        self.start = start
        self.token_bytes = dataset.tokenizer.token_bytes()
        self.shape = run_shape(config, jax.devices(), shrink_to_fit=debug)
        self.batch_sizes = self.shape.batch_sizes
        self.batch_sharding = batch_sharding(self.shape.mesh)
        self.checkpoints = CheckpointStore(workdir, config.checkpoint.keep)
        with start.part("shapes"):
            self.steps = step.build(config, self.shape)
        describe(config, self.steps, self.shape, dataset, workdir)
        newest = sync.agree(-1 if (latest := self.checkpoints.latest()) is None else latest)
        self.resumed = newest >= 0
        origin = Resume(config, dataset, self.steps, self._compile_ahead)
        with start.part("restore" if self.resumed or config.checkpoint.load_path else "init"):
            state = origin.resume(self.checkpoints, newest) if self.resumed else origin.begin()
            self.state = jax.block_until_ready(state)
        self.step = int(self.state.step)
        self.rows, self.position = origin.position.rows, origin.position
        if origin.trained_as:
            dataset.check_resume(origin.trained_as, self.position, self.step)
        self.wandb_id = origin.meta.get("wandb_id") or secrets.token_hex(4)
        self.postponed = origin.meta.get("postponed")  # measured at a step whose validation is to be done
        self.saved = self.step if self.resumed else None  # step of the newest checkpoint
        self.evaluated = False  # by this process, so that the program is compiled
        self.saves = SaveRetry(self.checkpoints, monitor, self._start_save)
        self.pending: tuple[int, dict] | None = None  # the newest step's metrics, still on the device

    def _compile_ahead(self, number: int):
        """Begins to compile the step behind step `number`, while its state is made or read."""
        if number < self.config.steps:
            shape = self.shape.batch_at(number)
            batch = training_data.abstract_batch(self.dataset, shape, self.batch_sharding)
            self.steps.train.compile_ahead(self.steps.abstract_state, batch)

    def loop(self) -> int:
        """Trains until all steps are done or somebody asks to stop; returns the exit code.

        Raises:
            NonFiniteError: `max_skipped` steps in a row were not finite, now or before a resume.
            SaveError: a checkpoint could not be saved.
            Exception: a data worker died, another process is lost.
        """
        c = self.config
        if self.step >= c.steps and self._is_complete():
            logging.info("complete   all %d steps are done; nothing to do", c.steps)
            return DONE
        if int(self.state.skipped_in_a_row) >= c.max_skipped:
            raise NonFiniteError(
                f"the run ended at step {self.step} after {int(self.state.skipped_in_a_row)} steps in a row "
                f"that were not finite; raise max_skipped={c.max_skipped}, or load_path an earlier checkpoint"
            )
        self._write_config_and_facts()
        keep = self.step - (self.postponed is not None) if self.resumed else -1
        lead = sync.is_lead()
        with self.start.part("trackers"):
            self.tracker = RunLogger(lead, self.workdir, c.to_dict(), self.step, keep, self.wandb_id)
        self.meter = metrics.Meter(c.model)
        code = 1
        try:
            reason = self._loop()
            self.saves.settle()
            code = STOPPED if reason else DONE
        finally:
            self.tracker.close(code)
        if reason:
            logging.info("stopped    on %s at step %d; run the same command to go on", reason, self.step)
        else:
            logging.info("done       all %d steps; metrics in %s", c.steps, self.workdir / "metrics.jsonl")
            logging.info("           checkpoint in %s", self.checkpoints.folder / str(self.step))
            logging.info("           train on: --config.steps=N --config.checkpoint.overwrite_config=True")
        return code

    def _is_complete(self) -> bool:
        """Whether the last step, whose checkpoint there is, is validated too."""
        path, logged = self.workdir / "metrics.jsonl", False
        if self.postponed is not None and path.exists():
            last = (path.read_text().splitlines() or ["{}"])[-1]
            logged = f'"step": {self.step},' in last and '"valid/loss"' in last
        return bool(sync.agree(self.postponed is None or logged))

    def _loop(self) -> str:
        """The steps; returns why they were stopped, or "" when all are done."""
        c, monitor = self.config, self.monitor
        batches = self._batches()
        ahead = ThreadPoolExecutor(1, "data")  # not closed: it would wait for data that may never come
        following = ahead.submit(next, batches)
        while True:
            reason, last = monitor.stop_reason(), self.step == c.steps
            reason = self._milestone(last, reason)
            if reason or last:
                return reason
            if monitor.must_save_again():
                self._log(self._read_pending())
                self.saves.again()
            with self.start.part("data"):
                batch = self._wait_for(following)
            if reason := monitor.stop_reason():  # the same everywhere, also where data is missing
                self._log(self._read_pending())
                self._save()
                return reason
            self.state, on_device = self._train(batch) if self.start.is_over else self._train_first(batch)
            self.step, self.rows = self.step + 1, self.rows + self.batch_sizes.at(self.step)
            if self.step in self.batch_sizes.starts:
                self.position = self.reader.position(self.rows)
                batches = self._batches()
            following = ahead.submit(next, batches)
            before, self.pending = self.pending, (self.step, on_device)
            self._log(self._read(before))  # while this step runs
            self.saves.check()

    def _train_first(self, batch: dict[str, jax.Array]) -> tuple[TrainState, dict]:
        """The first step of this process, to its end."""
        with self.start.part("compile"):
            self.steps.train.compiled(self.state, batch)
        with self.start.part("step"):
            result = jax.block_until_ready(self._train(batch))
        logging.info("start      to the end of step %d: %s", self.step + 1, self.start.over())
        return result

    def _train(self, batch: dict[str, jax.Array]) -> tuple[TrainState, dict]:
        """A step. The first one with batches of another size is compiled before it runs."""
        grown = self.step > 0 and self.step in self.batch_sizes.starts
        if grown:
            logging.info("batch      %d sequences from step %d on", self.batch_sizes.at(self.step), self.step)
        with self.monitor.watchdog.long_task("compiling for another batch size") if grown else nullcontext():
            return self.steps.train(self.state, batch)

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        """Training batches from where the run is, up to the next change of batch size.

        They end there because the position of streamed data at that point is not known earlier.
        """
        c = self.config
        size, count = (self.batch_sizes.stages(self.step, c.steps) or [(c.batch_size, 0)])[0]
        self.reader = self.dataset.reader(self.shape.batch_of(size), self.batch_sharding, self.position)
        return self.reader.batches(count)

    def _wait_for(self, following: Future) -> dict[str, jax.Array] | None:
        """The next batch; None if it is still to come when all stop here."""
        waiting = time.perf_counter()
        self.monitor.watchdog.doing = "waiting for data"
        while not self.monitor.stop_is_due():
            if wait([following], timeout=0.2).done:
                batch = following.result()
                self.meter.waited_for_data(time.perf_counter() - waiting)
                self.monitor.watchdog.doing = "training"
                return batch
        return None

    def _milestone(self, last: bool, reason: str) -> str:
        """Validates and saves where this step asks for it; returns why to stop here, or ""."""
        c = self.config
        every, is_new = c.eval.every_steps, self.step != self.saved
        validate = last or (every > 0 and self.step % every == 0)
        validate = validate and (is_new or self.postponed is not None)
        save = last or (self.step > 0 and due(c.checkpoint.save_steps, self.step))
        if self.postponed is not None and not validate:  # it is no longer asked for
            self._log(self.postponed)
            self.postponed = None
        if not (validate or (is_new and (save or reason))):
            return reason
        record = (self.postponed or {}) | self._read_pending()
        validation = self._evaluate() if validate and not reason else None
        reason = reason or self.monitor.stop_reason()
        if validate and not validation:  # whoever resumes validates, and logs both as one
            self.postponed = record
        else:
            if validation:
                record |= {"step": self.step, "tokens": self._tokens(self.step)} | validation
            self._log(record)
            self.postponed = None
        if save or reason:
            self._save()
        self.meter.pause()
        return reason

    def _tokens(self, number: int) -> int:
        """Tokens trained on by the end of step `number`: rows consumed times the context length."""
        rows = self.rows - self.batch_sizes.rows(self.step) + self.batch_sizes.rows(number)
        return rows * self.config.model.context_length

    def _read_pending(self) -> dict:
        """The newest step's metrics, unless they have been read."""
        pending, self.pending = self.pending, None
        return self._read(pending)

    def _read(self, pending: tuple[int, dict] | None) -> dict:
        """A step's metrics as numbers; waits for that step alone."""
        if pending is None:
            return {}
        number, on_device = pending
        on_device = dict(on_device)
        measured = on_device.pop("diagnostics")  # placeholders where they are not due
        on_device |= measured if diagnostics.is_due(self.config.diagnostics, number) else {}
        values = {name: value.item() for name, value in jax.device_get(on_device).items()}
        in_a_row = values.pop("skipped_in_a_row")
        record = (
            {"step": number, "tokens": self._tokens(number)}
            | values
            | self.meter.step(self.batch_sizes.at(number - 1))
        )
        self.monitor.step_done()
        if in_a_row == self.config.max_skipped:
            self._give_up(record)
        return record

    def _give_up(self, record: dict):
        """Saves the state and ends the run: too many steps in a row were not finite."""
        self._log(record)
        if self.step > record["step"]:  # the step that is under way belongs to the checkpoint
            self._log(self._read(self.pending))
        self._save()
        self.saves.settle()
        raise NonFiniteError(
            f"loss, gradient or update were not finite in {self.config.max_skipped} steps in a row "
            f"(max_skipped), up to step {record['step']}; none of these updates was applied"
            + (f", at the lowest loss scale, {loss_scale.FLOOR:g}" if self.state.loss_scale else "")
            + f"; the state is in checkpoint {self.step}"
        )

    def _log(self, record: dict):
        if record:
            number = record["step"]
            write = number % self.config.log.every_steps == 0 or "valid/loss" in record
            write = write or diagnostics.is_due(self.config.diagnostics, number)
            self.tracker.log(number, record, write)

    def _evaluate(self) -> dict[str, float] | None:
        """Validation metrics; None if the run is to stop before they are complete."""
        _, rows, length = self.shape.batch_at(0)
        watchdog, self.evaluated, first = self.monitor.watchdog, True, not self.evaluated
        patience = watchdog.long_task("compiling the evaluation") if first else nullcontext()
        with patience, self.start.part("validation"):
            result = evaluate(
                self.steps,
                self.state.params,
                self.dataset.validation,
                self.token_bytes,
                self.config.eval.sequences,
                (1, rows, length),
                self.batch_sharding,
                self.monitor,
            )
        if result is None:
            return None
        logging.info(
            "step %d: validation loss %.4f, %.4f bits per byte",
            self.step,
            result["valid/loss"],
            result["valid/bits_per_byte"],
        )
        return result

    def _save(self):
        """Starts a save of this step, when the one before is durable."""
        if self.step != self.saved:
            self.saves.settle()
        if self.step != self.saved:
            self._start_save()

    def _start_save(self):
        self.tracker.sync()  # what a resume will not do again must be on disk before the checkpoint is
        meta = {
            "config": self.config.to_dict(),
            **self.reader.position(self.rows).to_meta(),
            "dataset": self.dataset.fingerprint,
            "wandb_id": self.wandb_id,
            "postponed": self.postponed,
            "version": __version__,
        }
        with self.monitor.watchdog.long_task("saving"):
            self.checkpoints.save(self.step, self.state, meta)
        self.saved = self.step

    def _write_config_and_facts(self):
        if sync.is_lead():
            facts = metrics.facts(self.config.model, self.steps.abstract_state)
            folders.write_json(self.workdir / "config.json", self.config.to_dict())
            folders.write_json(self.workdir / "run.json", facts)
