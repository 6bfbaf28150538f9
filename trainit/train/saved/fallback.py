"""Which checkpoint is taken where the newest one is damaged."""

import shutil

from absl import logging

from trainit.cluster import sync
from trainit.config import ConfigError
from trainit.train.checkpoint import CheckpointStore


def whole(store: CheckpointStore, step: int, option: str, fallback: bool = False) -> int:
    """Returns `step` if its checkpoint is whole; else, with `fallback`, the newest step before whose one is.

    Without it, raises ConfigError, which names that step, and the option that takes it ("{step}" stands for
    it). All processes of a job call it together, and compare what process 0 sees.
    """
    damage, older = store.compared.damage(step), step
    if not damage:
        return step
    while older >= 0 and store.compared.damage(older):
        older = sync.agree(max((known for known in store.steps() if known < older), default=-1))
    if older < 0:
        raise ConfigError(f"{damage}; no checkpoint before it is whole: begin again in a new --workdir")
    if not fallback:
        remedy = option.format(step=older)
        raise ConfigError(f"{damage}; the newest whole one before it is of step {older}: {remedy} takes that")
    logging.warning("fallback   %s; the run continues from step %d", damage, older)
    return older


def set_aside(store: CheckpointStore, after: int) -> None:
    """Renames the checkpoints after a step to STEP.damaged. All processes of a job call it together."""
    for step in store.steps() if sync.is_lead() else ():
        if step > after:
            aside = store.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (store.folder / str(step)).rename(aside)
    sync.agree(after)  # nobody looks at the folder before
    store.reopen()
