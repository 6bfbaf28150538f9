"""Writes a run's model and tokenizer as a folder that `transformers` loads.

trainit export runs/pile_gpt --output=my-model [--step=2000] [--dtype=bfloat16]
"""

import argparse
from pathlib import Path

from trainit import cli
from trainit.cluster import logs
from trainit.cluster.files import new_folder, write_atomically, write_json
from trainit.cluster.process import DONE
from trainit.config import ConfigError, require

DESCRIPTION = "Writes a run's model and tokenizer as a folder that transformers loads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    add = parser.add_argument_group("export").add_argument
    add("--output", default="", help="folder that is made; there must be none")
    add("--step", type=cli.number(int, 0), default=None, help="checkpoint to take; by default the newest")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="float32", help="of the numbers in it; checkpoints have float32")
    known = "the tokenizer, if the run's dataset is elsewhere now; none: without one"
    add("--tokenizer", default="", help=known)


def run(arguments: argparse.Namespace) -> int:
    """Exports, and returns the exit code."""
    logs.log_to_terminal(lead=True)
    workdir = Path(arguments.run)
    with new_folder(arguments.output, "--output") as folder:
        require(workdir.is_dir(), f"{workdir} is no folder of a run")
        written = _write(arguments, workdir, folder)
    print(f"{arguments.output}: {written}")
    return DONE


def _write(arguments: argparse.Namespace, workdir: Path, folder: Path) -> str:
    """Writes all files; returns what was written, in a line."""
    import jax

    from trainit.config import Config
    from trainit.convert import card, families, weights
    from trainit.tokenizers import to_json
    from trainit.train.checkpoint import CheckpointStore, parameter_shapes, read_parameters

    jax.config.update("jax_platforms", "cpu")
    store = CheckpointStore(workdir, read_only=True)
    available = store.steps()
    step = max(available, default=-1) if arguments.step is None else arguments.step
    require(step in available, f"{workdir} has no checkpoint of step {step}; there are {available or 'none'}")
    meta = store.meta(step)
    config = Config(meta["config"])
    family, tokenizer = families.find(config.model), _tokenizer(arguments.tokenizer, config)

    # The vocabulary was padded for the devices; ids that no text has are cut off.
    vocab_size = tokenizer.vocab_size if tokenizer else config.model.vocab_size
    end_of_text = tokenizer.end_of_text if tokenizer else config.model.end_of_text
    rows = config.model.vocab_size
    require(
        vocab_size <= rows,
        f"the tokenizer has {vocab_size} ids and the model {rows}: name the one that it was trained with by "
        f"--tokenizer=",
    )
    shapes = parameter_shapes(store, step)
    parts = (
        families.tensors(family, read_parameters(store, step, group), vocab_size)
        for group in families.groups(list(shapes), family)
    )
    size = weights.write(folder, parts, arguments.dtype)
    files = {
        "config.json": families.config_json(family, config.model, vocab_size, end_of_text, arguments.dtype),
        "generation_config.json": {"eos_token_id": end_of_text},
    }
    if tokenizer:
        files["tokenizer_config.json"] = to_json.config_json(tokenizer, config.model.context_length)
        write_atomically(folder / "tokenizer.json", to_json.tokenizer_json(tokenizer))
    for name, content in files.items():
        write_json(folder / name, content)
    write_atomically(folder / "README.md", card.text(workdir, meta, step, family.architecture))
    store.close()
    return f"{family.architecture} of step {step}, {size / 1e9:.3g} GB in {arguments.dtype}"


def _tokenizer(choice: str, config):
    """The tokenizer that the run's tokens were made with, or the chosen one; None if that is "none"."""
    from trainit import tokenizers
    from trainit.data.formats import detect
    from trainit.prepare.demo import prepare_demo

    dataset = config.dataset
    try:
        if choice == "none":
            return None
        if choice or "streams" in dataset:
            return tokenizers.find(choice or dataset.tokenizer, "--tokenizer", dataset.end_of_text)
        path = str(prepare_demo(cli.cache())) if dataset.path == "demo" else dataset.path
        return detect.open_path(
            path, dataset.tokenizer, dataset.validation_path, dataset.end_of_text
        ).tokenizer
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{error}; --tokenizer= names the run's tokenizer, or none") from None
