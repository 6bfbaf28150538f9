"""Which checkpoint is taken where the newest one is damaged, or was trained on what is to be left out."""

import shutil
from collections.abc import Callable

from absl import logging

from trainit.checkpoints.store import CheckpointStore
from trainit.cluster import sync
from trainit.config import Config, ConfigError, batch_sizes


def whole(store: CheckpointStore, step: int, option: str, fallback: bool = False) -> int:
    """Returns `step` if its checkpoint is whole; else, with `fallback`, the newest step before whose one is.

    Without it, raises ConfigError, which names that step, and the option that takes it ("{step}" stands for
    it). All processes of a job call it together, and compare what process 0 sees.
    """
    older = _newest(store, step, lambda known: not store.compared.damage(known))
    return _taken(step, older, store.compared.damage(step) or "", "whole", option, fallback)


def before_skipped(store: CheckpointStore, step: int, config: Config) -> int:
    """Returns the newest step up to `step` whose checkpoint has left out the data that the config leaves out.

    Errors without `checkpoint.rewind`, and who calls it, as for `whole`.
    """

    def fits(known: int) -> bool:
        configs = config, store.meta(known)["config"]
        new, old = ([one for one in batch_sizes(c).skipped if one[0] < known] for c in configs)
        return new == old

    why = f"spikes.skip_data={config.spikes.skip_data!r} is not what {store.folder / str(step)} has left out"
    option = "--config.checkpoint.rewind=True"
    return _taken(step, _newest(store, step, fits), why, "fitting", option, config.checkpoint.rewind)


def _newest(store: CheckpointStore, step: int, is_good: Callable[[int], bool]) -> int:
    """The newest step, at most `step`, with a good checkpoint; -1: there is none."""
    while step >= 0 and not is_good(step):
        step = sync.agree(max((known for known in store.steps() if known < step), default=-1))
    return step


def _taken(step: int, older: int, why: str, good: str, option: str, allowed: bool) -> int:
    if older == step:
        return step
    if older < 0:
        raise ConfigError(f"{why}; no checkpoint before it is {good}: begin again in a new --workdir")
    if not allowed:
        remedy = f"{option.format(step=older)} takes that"
        raise ConfigError(f"{why}; the newest {good} one before it is of step {older}: {remedy}")
    logging.warning("fallback   %s; the run continues from step %d", why, older)
    return older


def set_aside(store: CheckpointStore, after: int, suffix: str = "damaged") -> None:
    """Renames the checkpoints after a step to STEP.SUFFIX. All processes of a job call it together."""
    for step in store.steps() if sync.is_lead() else ():
        if step > after:
            aside = store.folder / f"{step}.{suffix}"
            shutil.rmtree(aside, ignore_errors=True)
            (store.folder / str(step)).rename(aside)
    sync.agree(after)  # nobody looks at the folder before
    store.reopen()
