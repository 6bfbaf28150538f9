"""The loop: the order of events, and nothing else."""

import json
import secrets
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from trainit import __version__, distributed, metrics, sharding, step
from trainit import config as config_lib
from trainit.checkpoint import Checkpoints, check_same_run, due
from trainit.config import Config, ConfigError
from trainit.data import loader
from trainit.data.tokens import Dataset
from trainit.evaluate import evaluate
from trainit.trackers import Trackers, quantity

DONE, STOPPED = 0, 75  # exit codes


class NonFiniteError(RuntimeError):
    """Too many steps in a row in which the loss, the gradient or the update was not finite."""


class Run:
    """One process's part of a training run."""

    def __init__(self, config: Config, dataset: Dataset, workdir: Path, debug: bool = False):
        """
        Args:
            config: resolved.
            dataset: prepared, with splits "train" and "validation".
            workdir: the run's folder; what it holds is resumed.
            debug: let the mesh shrink to the devices that there are.

        Raises:
            ConfigError: the config does not fit the devices, the run folder or the checkpoint.
        """
        self.config, self.dataset, self.workdir = config, dataset, workdir
        self.token_bytes = dataset.tokenizer.token_bytes()
        sizes = sharding.mesh_sizes(config, jax.device_count(), shrink_to_fit=debug)
        self.batch_shape = sharding.batch_shape(config, sizes)
        self.mesh = sharding.make_mesh(sizes)
        self.checkpoints = Checkpoints(workdir, config.checkpoint.keep)
        self.steps = step.build(config, self.mesh)
        self._describe(sizes)
        self.rows, self.wandb_id = 0, secrets.token_hex(4)  # rows of the training data consumed
        self.postponed: dict | None = None  # what was measured at a step whose validation is still to be done
        newest = distributed.agree(-1 if (latest := self.checkpoints.latest()) is None else latest)
        self.resumed = newest >= 0
        self.state = self._resume(newest) if self.resumed else self._begin()
        self.step = int(self.state.step)
        self.saved = self.step if self.resumed else None  # step of the newest checkpoint
        self.pending: tuple[int, dict] | None = None  # the newest step's metrics, still on the device

    def _describe(self, sizes: dict[str, int]):
        c, devices = self.config, jax.devices()
        micro_steps, rows, length = self.batch_shape
        parameters = metrics.parameter_count(self.steps.abstract_state.params)
        train, validation = (self.dataset.splits[name] for name in ("train", "validation"))
        for topic, text in {
            "run": self.workdir,
            "devices": f"{len(devices)} × {devices[0].device_kind}, processes: {jax.process_count()}, "
            f"Trainit {__version__}, JAX {jax.__version__}",
            "mesh": " × ".join(f"{axis} {sizes[axis]}" for axis in config_lib.MESH_AXES),
            "model": f"{quantity(parameters)} parameters, {c.model.num_blocks} layers of width "
            f"{c.model.dim}, attention {self.steps.attention}, precision {c.precision}",
            "dataset": f"{self.dataset.folder}: {quantity(train.tokens)} tokens to train, "
            f"{quantity(validation.tokens)} to validate",
            "tokenizer": f"{self.dataset.tokenizer.name}, vocabulary {self.dataset.vocab_size}",
            "batch": f"{c.batch_size} sequences of {length} tokens; {micro_steps} × "
            f"{rows // (sizes['data'] * sizes['fsdp'])} on each device",
            "optimizer": f"{c.optimizer.name}, learning rate {c.optimizer.learning_rate:g}, "
            f"schedule {c.schedule.name}",
        }.items():
            logging.info("%-10s %s", topic, text)
        if jax.process_count() > 1:
            self._describe_processes()

    def _describe_processes(self):
        """One line a process: its host, its devices and where they are in the mesh."""
        for process, host in enumerate(distributed.gather_hosts()):
            mine = [at for at, device in np.ndenumerate(self.mesh.devices) if device.process_index == process]
            ranges = (
                f"{axis} {min(at)}" + f"-{max(at)}" * (min(at) < max(at))
                for axis, at in zip(config_lib.MESH_AXES, zip(*mine, strict=True), strict=True)
            )
            logging.info("process %-3d%s: %d devices, %s", process, host, len(mine), ", ".join(ranges))

    def _begin(self) -> step.TrainState:
        """The state at the start: new, or from another run's checkpoint."""
        c = self.config.checkpoint
        if not c.load_path:
            return self.steps.init()
        source = Checkpoints(Path(c.load_path), read_only=True)
        steps = source.steps()
        number = max(steps, default=None) if c.load_step < 0 else c.load_step
        if number not in steps:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} has no checkpoint of "
                f"load_step={c.load_step}; there are {steps or 'none'}"
            )
        self._accept(source, number)
        if c.overwrite_optimizer:
            logging.info("start      parameters of %s step %d, new optimizer", c.load_path, number)
            fresh = self.steps.init()
            layout = self.steps.abstract_state.params
            return step.TrainState(**vars(fresh) | {"params": source.restore_params(number, layout)})
        if number >= self.config.steps:
            raise ConfigError(
                f"checkpoint.load_path={c.load_path!r} is at step {number}, steps={self.config.steps}: "
                f"nothing is left to do; raise steps, or take its parameters alone with "
                f"checkpoint.overwrite_optimizer=True"
            )
        logging.info("start      %s step %d", c.load_path, number)
        return source.restore(number, self.steps.abstract_state)

    def _resume(self, number: int) -> step.TrainState:
        """The state of this run's checkpoint."""
        meta = self._accept(self.checkpoints, number)
        self.wandb_id, self.postponed = meta["wandb_id"], meta["postponed"]
        logging.info("resume     at step %d of %d", number, self.config.steps)
        return self.checkpoints.restore(number, self.steps.abstract_state)

    def _accept(self, source: Checkpoints, number: int) -> dict:
        """The meta data of a checkpoint of this config and dataset; sets the position in the data."""
        meta, c = source.meta(number), self.config
        origin = f"checkpoint {source.folder / str(number)}"
        overwrite = c.checkpoint.overwrite_config
        for line in check_same_run(meta["config"], c.to_dict(), overwrite, origin):
            logging.info("changed    %s", line)
        if meta["dataset"] != self.dataset.fingerprint and not overwrite:
            raise ConfigError(
                f"{origin} was trained on dataset {meta['dataset']}, but dataset.path={c.dataset.path!r} is "
                f"{self.dataset.fingerprint}; set --config.checkpoint.overwrite_config=True to go on with it"
            )
        if meta["dataset"] == self.dataset.fingerprint:  # else from the start of the new one
            self.rows = meta["rows"] * meta["config"]["model"]["context_length"] // c.model.context_length
        return meta

    def loop(self, stop: distributed.StopRequest) -> int:
        """Trains until all steps are done or `stop` asks to; returns the exit code.

        Raises:
            NonFiniteError: `max_skipped` steps in a row were not finite, now or before a resume.
            Exception: a save failed, a data worker died, another process is lost.
        """
        c = self.config
        if self.step >= c.steps:
            logging.info("complete   all %d steps are done; nothing to do", c.steps)
            return DONE
        if int(self.state.skipped_in_a_row) >= c.max_skipped:
            raise NonFiniteError(
                f"the run ended at step {self.step} after {int(self.state.skipped_in_a_row)} steps in a row "
                f"that were not finite; raise max_skipped={c.max_skipped}, or load_path an earlier checkpoint"
            )
        self._write_config()
        keep = self.step - (self.postponed is not None) if self.resumed else -1
        lead = distributed.is_lead()
        self.tracker = Trackers(lead, self.workdir, c.to_dict(), self.step, keep, self.wandb_id)
        self.meter = metrics.Meter(c.batch_size * c.model.context_length, c.model)
        code = 1
        try:
            reason = self._loop(stop)
            self.checkpoints.wait()
            code = STOPPED if reason else DONE
        finally:
            self.tracker.close(code)
            self.checkpoints.close()
        if reason:
            logging.info("stopped    on %s at step %d; run the same command to go on", reason, self.step)
        else:
            logging.info("done       all %d steps; metrics in %s", c.steps, self.workdir / "metrics.jsonl")
            logging.info("           checkpoint in %s", self.checkpoints.folder / str(self.step))
            logging.info("           train on: --config.steps=N --config.checkpoint.overwrite_config=True")
        return code

    def _loop(self, stop: distributed.StopRequest) -> str:
        """The steps; returns why they were stopped, or "" when all are done."""
        c = self.config
        train = self.dataset.splits["train"]
        batches = loader.batches(
            train,
            loader.Shuffled(train.sequences(c.model.context_length), c.seed),
            self.batch_shape,
            sharding.batch_sharding(self.mesh),
            first_row=self.rows,
            count=c.steps - self.step,
            workers=c.dataset.workers,
            prefetch=c.dataset.prefetch,
        )
        while True:
            reason, last = stop(self.step), self.step == c.steps
            self._milestone(last, bool(reason))
            if reason or last:
                return "" if last else reason
            waiting = time.perf_counter()
            batch = next(batches)
            self.meter.waited_for_data(time.perf_counter() - waiting)
            self.state, on_device = self.steps.train(self.state, batch)
            self.step, self.rows = self.step + 1, self.rows + c.batch_size
            before, self.pending = self.pending, (self.step, on_device)
            self._log(self._read(before))  # while this step runs
            self.checkpoints.check()

    def _milestone(self, last: bool, stopping: bool):
        """Validates and saves where this step asks for it."""
        c = self.config
        every, is_new = c.eval.every_steps, self.step != self.saved
        validate = last or (every > 0 and self.step % every == 0)
        validate = validate and (is_new or self.postponed is not None)
        save = is_new and (last or stopping or (self.step > 0 and due(c.checkpoint.save_steps, self.step)))
        if self.postponed is not None and not validate:  # it is no longer asked for
            self._log(self.postponed)
            self.postponed = None
        if not (validate or save):
            return
        record, self.pending = self._read(self.pending), None
        if validate and stopping and not last:
            # Whoever resumes validates, and logs both as one.
            self.postponed = (self.postponed or {}) | record
        else:
            if validate:
                record |= {"step": self.step, "tokens": self._tokens(self.step)} | self._evaluate()
            self._log((self.postponed or {}) | record)
            self.postponed = None
        if save:
            self._save()
        self.meter.pause()

    def _tokens(self, number: int) -> int:
        """Tokens trained on by the end of step `number`: rows consumed times the context length."""
        rows = self.rows - (self.step - number) * self.config.batch_size
        return rows * self.config.model.context_length

    def _read(self, pending: tuple[int, dict] | None) -> dict:
        """A step's metrics as numbers; waits for that step alone."""
        if pending is None:
            return {}
        number, on_device = pending
        values = {name: value.item() for name, value in jax.device_get(on_device).items()}
        in_a_row = values.pop("skipped_in_a_row")
        record = {"step": number, "tokens": self._tokens(number)} | values | self.meter.step()
        if in_a_row == self.config.max_skipped:
            self._give_up(record)
        return record

    def _give_up(self, record: dict):
        """Saves the state and ends the run: too many steps in a row were not finite."""
        self._log(record)
        if self.step > record["step"]:  # the step that is under way belongs to the checkpoint
            self._log(self._read(self.pending))
        self._save()
        self.checkpoints.wait()
        raise NonFiniteError(
            f"loss, gradient or update were not finite in {self.config.max_skipped} steps in a row "
            f"(max_skipped), up to step {record['step']}; none of these updates was applied; the state is in "
            f"checkpoint {self.step}"
        )

    def _log(self, record: dict):
        if record:
            number = record["step"]
            write = number % self.config.log.every_steps == 0 or "valid/loss" in record
            self.tracker.log(number, record, write)

    def _evaluate(self) -> dict:
        _, rows, length = self.batch_shape
        result = evaluate(
            self.steps,
            self.state.params,
            self.dataset.splits["validation"],
            self.token_bytes,
            self.config.eval.sequences,
            (1, rows, length),
            sharding.batch_sharding(self.mesh),
        )
        logging.info(
            "step %d: validation loss %.4f, %.4f bits per byte",
            self.step,
            result["valid/loss"],
            result["valid/bits_per_byte"],
        )
        return result

    def _save(self):
        if self.step == self.saved:
            return
        self.tracker.sync()  # what a resume will not do again must be on disk before the checkpoint is
        meta = {
            "config": self.config.to_dict(),
            "rows": self.rows,
            "dataset": self.dataset.fingerprint,
            "wandb_id": self.wandb_id,
            "postponed": self.postponed,
            "version": __version__,
        }
        self.checkpoints.save(self.step, self.state, meta)
        self.saved = self.step

    def _write_config(self):
        if distributed.is_lead():
            unfinished = self.workdir / "config.json.tmp"
            unfinished.write_text(json.dumps(self.config.to_dict(), indent=1) + "\n")
            unfinished.rename(self.workdir / "config.json")
