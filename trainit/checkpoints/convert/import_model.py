"""Makes a run of a model in a folder of `transformers`: its checkpoint of step 0 holds the parameters.

trainit import my-model --output=runs/my-model
"""

import argparse
import shutil
from pathlib import Path
from types import SimpleNamespace

from trainit import __version__
from trainit.cluster import files, logs
from trainit.config.exit_codes import DONE

PARTS = 8  # of each array, one of which is copied at a time
DESCRIPTION = "Makes a run of a model in a folder of transformers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("folder", metavar="FOLDER", help="config.json, safetensors and a tokenizer's file")
    add = parser.add_argument_group("import").add_argument
    add("--output", default="", help="folder of the run that is made; there must be none")
    ends = "token that ends a text; by default the one that the tokenizer's files name"
    add("--end_of_text", default="", help=ends)


def run(arguments: argparse.Namespace) -> int:
    """Imports, and returns the exit code."""
    logs.log_to_terminal(lead=True)
    with files.new_folder(arguments.output, "--output") as folder:
        count = _write(arguments.folder, arguments.end_of_text, folder)
    print(f"{arguments.output}: step 0 has {count:,} parameters of {arguments.folder}")
    return DONE


def _write(source: str, end_of_text: str, folder: Path) -> int:
    """Writes the run; returns how many parameters it has."""
    import jax

    from trainit.checkpoints.convert.pretrained import PREFIX, Pretrained
    from trainit.checkpoints.finished_run import config_of
    from trainit.checkpoints.store import CheckpointStore
    from trainit.data.loader import START
    from trainit.model.gpt import GPT
    from trainit.parallel.trees import device_bytes

    # A save copies arrays by their parts on devices. So there are several, which share this machine's memory.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", PARTS)
    pretrained = Pretrained(PREFIX + source.removeprefix(PREFIX))
    config, _ = config_of(pretrained, end_of_text)
    # The run keeps the tokenizer's file, so that it needs the folder no more.
    kind, _, file = config.dataset.tokenizer.partition(":")
    shutil.copyfile(file, folder / Path(file).name)
    own = f"{kind}:{folder.with_suffix('').absolute() / Path(file).name}"
    content = config.to_dict()
    content["dataset"]["tokenizer"] = own

    shapes = GPT(config.model).shapes
    mesh = jax.make_mesh((PARTS,), ("part",))

    def in_parts(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = next((axis for axis, size in enumerate(leaf.shape) if size % PARTS == 0), None)
        spec = [None] * (axis or 0) + ["part"] * (axis is not None)
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    layout = jax.tree.map(in_parts, shapes)
    state = SimpleNamespace(params=pretrained.parameters(layout))
    largest = max(device_bytes(leaf) for leaf in jax.tree.leaves(layout))
    # What is written is in memory twice: as it is copied, and as it is compressed.
    store = CheckpointStore(folder, copied_gb=max(0.05, 1.01 * largest / 1e9))
    store.save(0, state, {"config": content, **START.to_meta(), "version": __version__})
    store.wait()
    store.close()
    files.write_json(folder / "config.json", content)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
