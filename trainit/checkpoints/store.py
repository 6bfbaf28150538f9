"""Saving and restoring the train state, the position in the data and the config, with Orbax.

Each process writes its own shards in the background; a checkpoint's folder has its name once it is complete.
"""

import contextlib
import functools
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from trainit.checkpoints import digests, watched
from trainit.checkpoints.compared import Compared
from trainit.cluster import sync
from trainit.cluster.run_lock import try_to_write
from trainit.config import ConfigError, of_this_version, require
from trainit.parallel.trees import path_name

# Fields of a state that are saved as items of their own: a resume may have others of them, or none.
SEPARATE = ("diagnostics", "loss_scale", "spikes")
TIMEOUT_SECONDS = 600  # for the other processes to finish their parts of a save


def due(every: int | tuple[int, ...], step: int) -> bool:
    """Whether what is due every N steps (0: never), or after certain steps, is due after `step` steps."""
    if isinstance(every, int):
        return every > 0 and step % every == 0
    return step in every


class CheckpointStore:
    """The checkpoints of one run, in WORKDIR/checkpoints/STEP/.

    The newest `keep` of them stay (0: all). Another run's are only loaded from: `read_only`. A save copies at
    most `copied_gb` of the state at a time, in memory, which a device's part of the largest array must fit.
    """

    def __init__(self, workdir: Path, keep: int = 0, read_only: bool = False, copied_gb: float = 1000):
        self.folder = (workdir / "checkpoints").absolute()
        self._keep, self._read_only, self._copied_gb = keep, read_only, copied_gb
        self._error: BaseException | None = None
        self._times_opened, self._newest_save = 0, -1
        self.compared = Compared(self.folder)
        self._manager = self._open() if self.folder.is_dir() else None

    def _open(self) -> ocp.CheckpointManager:
        # Orbax would share the writing among replicas, and cut arrays on the device, which takes memory and
        # blocks the loop. Its handler of arrays is global to the process; nothing else here uses Orbax.
        handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        # After a save has failed, threads of it may still wait for other processes at a barrier, until that
        # fails, too. With its own prefix, a new manager's barriers cannot be mistaken for these.
        self._times_opened += 1
        fail = functools.partial(self._fail, self._times_opened)
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"{self._times_opened}_")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep or None,
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            cleanup_tmp_directories=not self._read_only,
            async_options=ocp.AsyncOptions(
                timeout_secs=TIMEOUT_SECONDS,
                barrier_sync_fn=watched.barrier(fail),
                post_finalization_callback=lambda: digests.collect(self._unfinished),
            ),
            multiprocessing_options=barriers,
        )
        handlers = {"meta": ocp.JsonCheckpointHandler()}
        for name in ("state", *SEPARATE):
            handler = ocp.StandardCheckpointHandler(save_concurrent_gb=self._copied_gb)
            handlers[name] = watched.watch(handler, fail, self._written)
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def opened(self) -> ocp.CheckpointManager:
        """The manager of a folder that is known to exist."""
        assert self._manager is not None
        return self._manager

    def _fail(self, times_opened: int, error: BaseException):
        self._error = self._error or (error if times_opened == self._times_opened else None)

    def _written(self, item: Path):
        """Called when this process has written its part of an item of a checkpoint."""
        self._unfinished = item.parent
        digests.digest_own_part(item, jax.process_index())

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, step: int, state, meta: Mapping):
        """Starts to save a dataclass of arrays, and what goes with it as JSON.

        The caller may reuse the state's memory as soon as this returns. If something goes wrong, `error`
        reports it. All processes of a job call this together; if one cannot write to the folder, none begins.
        """
        self._newest_save = step
        self.compared.forget(step)
        if jax.process_count() > 1:
            try:
                try_to_write(self.folder, jax.process_index())
            except OSError as error:
                self._fail(self._times_opened, error)
            if any(sync.gather(self._error is not None)):
                return
        fields, separate = _split(state)
        items = {"state": ocp.args.StandardSave(fields), "meta": ocp.args.JsonSave(dict(meta))}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in separate.items() if tree}
        try:
            self._manager = self._manager or self._open()
            args, about = ocp.args.Composite(**items), {"digests": digests.ALGORITHM}
            self._manager.save(step, args=args, force=True, custom_metadata=about)
        except Exception as error:
            if jax.process_count() > 1:  # the others are in the middle of it and cannot be called back
                raise
            self._fail(self._times_opened, error)

    def meta(self, step: int) -> dict:
        """What was saved with the state of `step`. Raises ConfigError if it is damaged or not Trainit's."""
        with self.reading(step):
            meta = self.opened.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            return meta | {"config": of_this_version(meta["config"])} if "config" in meta else meta

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Raises ConfigError if the checkpoint is damaged, or the block fails to read it."""
        require(not (damage := self.compared.damage(step)), damage)
        try:
            yield
        except Exception as error:  # Orbax has no type for damage; JAX has none for a process lost by Gloo
            if isinstance(error, ConfigError | RuntimeError) or "Gloo" in str(error):
                raise
            raise ConfigError(
                f"checkpoint {self.folder / str(step)} is damaged or not Trainit's (remove it, and the one "
                f"before counts): {textwrap.shorten(str(error.__cause__ or error), 300)}"
            ) from None

    def restore(self, step: int, abstract_state):
        """The state of `step`, laid out as `abstract_state`, on whatever mesh it was saved.

        The fields in `SEPARATE` are empty if the checkpoint was saved without them, or with other arrays.
        Raises ConfigError if the rest has other parameters, shapes or types, or is damaged.
        """
        fields, separate = _split(abstract_state)
        self._check(step, fields)
        items = {"state": ocp.args.StandardRestore(fields)}
        saved_items = self.opened.item_metadata(step)
        for name, tree in separate.items():
            saved = saved_items.get(name)
            if tree and saved is not None and _shapes(saved.tree) == _shapes(tree):
                items[name] = ocp.args.StandardRestore(tree)
        with self.reading(step):
            restored = self.opened.restore(step, args=ocp.args.Composite(**items))
        kept = {name: restored[name] if name in items else {} for name in separate}
        return type(abstract_state)(**restored["state"], **kept)

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone of the state of `step`, whatever its optimizer was; errors as `restore`."""
        item = {"params": abstract_params}
        self._check(step, item)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        with self.reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.folder / str(step) / "state", args=args)["params"]

    def _check(self, step: int, expected: dict):
        """Raises ConfigError unless the checkpoint has every array of `expected` in its shape and type."""
        with self.reading(step):
            saved = _shapes(self.opened.item_metadata(step)["state"].tree)
        if set(expected) == {"params"}:
            saved = {path: shape for path, shape in saved.items() if path.startswith("params/")}
        other = f"checkpoint {self.folder / str(step)} is of another model or optimizer: "
        require(not (differing := _differing(saved, _shapes(expected))), other + differing)

    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def error(self) -> BaseException | None:
        """What went wrong in this process's part of a save, as soon as it is known; cheap."""
        if not self._error and not self.busy():
            self._finish()  # does not wait here, but learns of errors in the last part
        return self._error

    def wait(self):
        """Returns when this process's part of the newest save is durable; raises its error if it failed."""
        self._finish()
        if self._error:
            raise self._error

    def _finish(self):
        try:
            if self._manager:
                self._manager.wait_until_finished()
        except Exception as error:
            self._fail(self._times_opened, error)

    def reopen(self) -> bool:
        """Discards a save that failed, here or on another process. All processes call it together.

        Returns whether process 0 sees the checkpoint complete after all: then the failure came later.
        """
        self._manager, self._error = self._open(), None
        return bool(sync.agree(self._newest_save in self.steps()))

    def close(self):
        if self._manager:
            self._manager.close()


def _split(state) -> tuple[dict, dict]:
    """A state's fields without those in `SEPARATE`, and these."""
    fields = dict(vars(state))
    return fields, {name: fields.pop(name, {}) for name in SEPARATE}


def _shapes(tree) -> dict[str, str]:
    """{"params/head/kernel": "float32[64,384]", ...}; empty parts of the tree do not count."""
    return {
        path_name(path): f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}".replace(" ", "")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _differing(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first array in which two trees differ, and what to do; empty if they are the same."""
    differing = [path for path in wanted.keys() | saved.keys() if wanted.get(path) != saved.get(path)]
    if not differing:
        return ""
    # Parameters first: if they differ, so does the optimizer's state, which would only distract.
    path = min(differing, key=lambda path: (not path.startswith("params/"), path))
    remedy = "set the model fields that it was made with"
    if path.startswith("opt_state/"):
        remedy = (
            "take its parameters alone into a new --workdir with --config.checkpoint.load_path= and "
            "--config.checkpoint.overwrite_optimizer=True"
        )
    return f"{path} is {saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} here; {remedy}"
