"""Saving and restoring the train state, the position in the data and the config.

Checkpoints are Orbax's: each process writes its own shards in the background, and a checkpoint's
folder appears under its name only when it is complete.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from trainit.config import ConfigError, flatten

# A resume may change these without saying so: they are where and how a run runs, not what it computes.
FREE = re.compile(
    r"(max_minutes|max_skipped|device_batch_size|platform|cpu_devices|dataset\.path)$"
    r"|model\.(attention|remat|scan_layers)$|dataset\.(workers|prefetch)$"
    r"|(mesh|eval|log|checkpoint|wandb)\."
)
TIMEOUT_SECONDS = 600  # for the other processes to finish their parts of a save


def due(save_steps: int | tuple[int, ...], step: int) -> bool:
    """Whether `checkpoint.save_steps` asks for a checkpoint after `step` steps."""
    if isinstance(save_steps, int):
        return save_steps > 0 and step % save_steps == 0
    return step in save_steps


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/STEP/."""

    def __init__(self, workdir: Path, keep: int = 0, read_only: bool = False):
        """
        Args:
            workdir: the run's folder.
            keep: newest checkpoints that stay; 0: all.
            read_only: another run's, which is only loaded from.
        """
        self.folder = (workdir / "checkpoints").absolute()
        self._keep, self._read_only = keep, read_only
        self._manager = self._open() if self.folder.is_dir() else None

    def _open(self) -> ocp.CheckpointManager:
        # Replicas would share the writing, but cutting their parts blocks the loop and takes device memory.
        handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep or None,
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            cleanup_tmp_directories=not self._read_only,
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_SECONDS),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state, meta: Mapping):
        """Starts a save; the state's memory may be given away as soon as this returns.

        Args:
            step: number of the checkpoint.
            state: a dataclass of arrays.
            meta: what goes with it, as JSON.

        Raises:
            Exception: an earlier save failed.
        """
        self._manager = self._manager or self._open()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(vars(state)), meta=ocp.args.JsonSave(dict(meta))
        )
        self._manager.save(step, args=items, force=True)

    def meta(self, step: int) -> dict:
        """What was saved with the state of `step`."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except (KeyError, ValueError, OSError) as error:
            raise ConfigError(f"{self.folder / str(step)} is no checkpoint of Trainit: {error}") from None

    def restore(self, step: int, abstract_state):
        """The state of `step`, laid out as `abstract_state`, on whatever mesh it was saved.

        Raises:
            ConfigError: the checkpoint has other parameters, shapes or types.
        """
        self._check(step, vars(abstract_state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(vars(abstract_state)))
        return type(abstract_state)(**self._manager.restore(step, args=args)["state"])

    def restore_params(self, step: int, abstract_params: dict) -> dict:
        """The parameters alone of the state of `step`, whatever its optimizer."""
        item = {"params": abstract_params}
        self._check(step, item)
        args = ocp.args.PyTreeRestore(
            item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(read_only=True), item_names=("state",)
        ) as manager:
            return manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def _check(self, step: int, expected: dict):
        """Raises ConfigError unless the checkpoint has every array of `expected` in its shape and type."""
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(expected)
        if set(expected) == {"params"}:
            saved = {path: shape for path, shape in saved.items() if path.startswith("params/")}
        for path in sorted(wanted.keys() | saved.keys(), key=lambda p: (not p.startswith("params/"), p)):
            if wanted.get(path) != saved.get(path):
                remedy = (
                    "take its parameters alone into a new --workdir with --config.checkpoint.load_path= and "
                    "--config.checkpoint.overwrite_optimizer=True"
                    if path.startswith("opt_state/")
                    else "set the model fields that it was made with"
                )
                raise ConfigError(
                    f"checkpoint {self.folder / str(step)} is of another model or optimizer: {path} is "
                    f"{saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} here; {remedy}"
                )

    def check(self):
        """Raises what went wrong in a save, as soon as it is known; cheap."""
        if self._manager:
            self._manager.check_for_errors()

    def wait(self):
        """Waits until the newest save is durable. Raises what went wrong in it."""
        if self._manager:
            self._manager.wait_until_finished()
        self.check()

    def close(self):
        if self._manager:
            self._manager.close()


def _shapes(tree) -> dict[str, str]:
    """{"params/head/kernel": "float32[64,384]", ...}; empty parts of the tree do not count."""

    def name(key) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return {
        "/".join(map(name, path)): f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}".replace(" ", "")
        for path, leaf in jax.tree.leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def differences(old: Mapping, new: Mapping) -> dict[str, tuple]:
    """The fields in which two resolved configs differ: {"steps": (old value, new value)}.

    A field that only one of them has stands against None.
    """
    old, new = flatten(old), flatten(new)
    return {
        field: (old.get(field), new.get(field))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    }


def check_same_run(old: Mapping, new: Mapping, overwrite: bool, origin: str) -> list[str]:
    """Compares a checkpoint's config with the one it is to be continued with.

    Args:
        old: the checkpoint's, as nested dicts.
        new: the current one.
        overwrite: `checkpoint.overwrite_config`.
        origin: where `old` comes from, for messages.

    Returns:
        "steps: 100 -> 200", for each field that differs.

    Raises:
        ConfigError: a field differs that changes what the state means, and `overwrite` is off.
    """
    changed = differences(old, new)
    lines = {field: f"{field}: {before!r} -> {after!r}" for field, (before, after) in changed.items()}
    fatal = [line for field, line in lines.items() if not FREE.match(field)]
    if fatal and not overwrite:
        raise ConfigError(
            f"{origin} was made with another config ({'; '.join(fatal)}); "
            f"set --config.checkpoint.overwrite_config=True to go on with the new one, or another --workdir"
        )
    return list(lines.values())
