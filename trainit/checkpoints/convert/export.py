"""Writes a run's model and tokenizer as a folder that `transformers` loads.

trainit export runs/pile_gpt --output=my-model [--step=2000] [--dtype=bfloat16]
"""

import argparse
from pathlib import Path

from trainit.cluster import logs
from trainit.cluster.files import new_folder, write_atomically, write_json
from trainit.config import command_line
from trainit.config.exit_codes import DONE

DESCRIPTION = "Writes a run's model and tokenizer as a folder that transformers loads."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    command_line.add_finished_run_arguments(parser, foreign=False)
    add = parser.add_argument_group("export").add_argument
    add("--output", default="", help="folder that is made; there must be none")
    types = ("float32", "bfloat16", "float16")
    add("--dtype", choices=types, default="float32", help="of the numbers in it; checkpoints have float32")


def run(arguments: argparse.Namespace) -> int:
    """Exports, and returns the exit code."""
    logs.log_to_terminal(lead=True)
    workdir = Path(arguments.run)
    with new_folder(arguments.output, "--output") as folder:
        written = _write(arguments, workdir, folder)
    print(f"{arguments.output}: {written}")
    return DONE


def _write(arguments: argparse.Namespace, workdir: Path, folder: Path) -> str:
    """Writes all files; returns what was written, in a line."""
    import jax

    from trainit.checkpoints.convert import card, families, weights
    from trainit.checkpoints.finished_run import open_run
    from trainit.checkpoints.parameters import parameter_shapes, read_parameters
    from trainit.tokenizers import to_json

    jax.config.update("jax_platforms", "cpu")
    run = open_run(workdir, arguments.step)
    config, store, step = run.config, run.store, run.step
    family, tokenizer = families.find(config.model), run.tokenizer(arguments.tokenizer, command_line.cache())

    # The vocabulary was padded for the devices; ids that no text has are cut off.
    vocab_size = tokenizer.vocab_size if tokenizer else config.model.vocab_size
    end_of_text = tokenizer.end_of_text if tokenizer else config.model.end_of_text
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
    write_atomically(folder / "README.md", card.text(workdir, run.meta, step, family.architecture))
    store.close()
    return f"{family.architecture} of step {step}, {size / 1e9:.3g} GB in {arguments.dtype}"
