"""Opens a run, or a model of `transformers`, to use it: its parameters, its config, its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainit import optimizers
from trainit.checkpoints.convert.pretrained import Pretrained, is_pretrained
from trainit.checkpoints.fallback import whole
from trainit.checkpoints.store import CheckpointStore
from trainit.config import Config, ConfigError, defaults, jsonl, require, resolve
from trainit.data.formats import detect
from trainit.prepare.demo import prepare_demo
from trainit.tokenizers import Tokenizer, find


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A checkpoint of a run, and what was saved with it."""

    workdir: Path
    store: CheckpointStore
    step: int
    meta: dict
    config: Config

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.workdir} step {self.step}"

    def parameters(self, abstract: dict) -> dict:
        """The parameters, laid out as `abstract`; errors as of `CheckpointStore.restore`."""
        return self.store.restore_params(self.step, abstract)

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
    meta = store.meta(whole(store, step, "--step={step}"))
    return FinishedRun(workdir, store, step, meta, Config(meta["config"]))


@dataclass(frozen=True, eq=False)
class PretrainedModel:
    """A model in a folder of `transformers`, used as a run is."""

    name: str
    config: Config
    step: None
    own_tokenizer: Tokenizer
    parameters: Callable[[dict], dict]  # as of `FinishedRun`

    def tokenizer(self, choice: str, cache: Path) -> Tokenizer | None:
        """As of `FinishedRun`."""
        try:
            return None if choice == "none" else find(choice, "--tokenizer") if choice else self.own_tokenizer
        except ValueError as error:
            raise ConfigError(str(error)) from None


def open_model(source: str, step: int | None) -> FinishedRun | PretrainedModel:
    """Opens a run's folder as `open_run` does, or the folder of hf:FOLDER."""
    if not is_pretrained(source):
        return open_run(Path(source), step)
    require(step is None, f"--step={step}: {source} has no steps")
    pretrained = Pretrained(source)
    config, tokenizer = config_of(pretrained)
    return PretrainedModel(source, config, None, tokenizer, pretrained.parameters)


def config_of(pretrained: Pretrained, end_of_text: str = "") -> tuple[Config, Tokenizer]:
    """A resolved config of a model at its full context, and its tokenizer.

    `end_of_text` names the token that ends a text; empty: the one that its files name. Raises ConfigError if
    there is no tokenizer, or no such token.
    """
    config = defaults()
    config.optimizer = optimizers.choices()["adamw"]()  # which nobody uses
    config.model.context_length = pretrained.fields["context_length"]
    config.dataset = jsonl()
    pretrained.fill(config)
    choice = pretrained.tokenizer_choice()
    require(bool(choice), f"{pretrained.folder} has neither tokenizer.json nor tokenizer.model")
    try:
        tokenizer = find(choice, "--tokenizer", end_of_text)
    except ValueError as error:
        raise ConfigError(str(error).replace("with end_of_text", "with --end_of_text")) from None
    config.dataset.end_of_text = tokenizer.end_name
    return resolve(config, tokenizer.vocab_size, tokenizer.end_of_text), tokenizer
