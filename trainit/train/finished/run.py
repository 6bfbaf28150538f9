"""Opens a run to use its model: one of its checkpoints, the config, the tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from trainit.config import Config, ConfigError, require
from trainit.data.formats import detect
from trainit.prepare.demo import prepare_demo
from trainit.tokenizers import Tokenizer, find
from trainit.train.checkpoint import CheckpointStore


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A checkpoint of a run, and what was saved with it."""

    workdir: Path
    store: CheckpointStore
    step: int
    meta: dict
    config: Config

    def tokenizer(self, choice: str, cache: Path) -> Tokenizer | None:
        """The tokenizer of the run's tokens, or the chosen one (`--tokenizer`); None if that is "none".

        `cache` is the folder of prepared demo data. Raises ConfigError if the tokenizer is nowhere, or has
        more ids than the model.
        """
        tokenizer = None if choice == "none" else self._find(choice, cache)
        ids, rows = tokenizer.vocab_size if tokenizer else 0, self.config.model.vocab_size
        require(
            ids <= rows,
            f"the tokenizer has {ids} ids and the model {rows}: name the one that it was trained with by "
            f"--tokenizer=",
        )
        return tokenizer

    def _find(self, choice: str, cache: Path) -> Tokenizer:
        d = self.config.dataset
        try:
            if choice or "streams" in d:
                return find(choice or d.tokenizer, "--tokenizer", d.end_of_text)
            path = str(prepare_demo(cache)) if d.path == "demo" else d.path
            return detect.open_path(path, d.tokenizer, d.validation_path, d.end_of_text).tokenizer
        except (OSError, ValueError) as error:
            raise ConfigError(f"{error}; --tokenizer= names the run's tokenizer, or none") from None


def open_run(workdir: Path, step: int | None) -> FinishedRun:
    """Opens the checkpoint of a step; None: the newest. Raises ConfigError if there is none."""
    require(workdir.is_dir(), f"{workdir} is no folder of a run")
    store = CheckpointStore(workdir, read_only=True)
    available = store.steps()
    step = max(available, default=-1) if step is None else step
    require(step in available, f"{workdir} has no checkpoint of step {step}; there are {available or 'none'}")
    meta = store.meta(step)
    return FinishedRun(workdir, store, step, meta, Config(meta["config"]))
