"""The checkpoints of a folder, compared with their digests."""

import textwrap
from pathlib import Path

import jax
from absl import logging

from trainit.checkpoints import digests
from trainit.cluster import sync


class Compared:
    """Compares each checkpoint of a folder once, when it is first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._damage: dict[int, str] = {}  # by step

    def damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint, as an error of one line; empty if nothing is.

        All processes of a job call it together. They share the work, and get the same answer.
        """
        if step not in self._damage:
            checkpoint = self._folder / str(step)
            found = digests.problems(checkpoint, jax.process_index(), jax.process_count())
            if found is None:
                text = "checkpoint %s was saved without digests: its files are not checked"
                logging.warning(text, checkpoint)
            text = "; ".join(found or [])
            if any(sync.gather(bool(text))):
                text = "; ".join(filter(None, sync.gather_text(text)))
            damage = f"checkpoint {checkpoint} is damaged: {textwrap.shorten(text, 300)}"
            self._damage[step] = damage if text else ""
        return self._damage[step]

    def forget(self, step: int) -> None:
        """Compares the checkpoint again when it is asked for: it is being written."""
        self._damage.pop(step, None)
