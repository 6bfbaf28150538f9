"""Compares all files of a run's checkpoints, or of a prepared dataset, with the digests that it has of them.

    trainit verify runs/pile_gpt
    trainit verify data/pile

Exit codes: 0 all files are as they were written, 1 some are not, or have no digests, 2 wrong usage.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from trainit.config import require
from trainit.config.exit_codes import DONE, FAILED

DESCRIPTION = "Compares the files of a run's checkpoints, or of a prepared dataset, with their digests."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, or of a prepared dataset")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line on each checkpoint, or on the dataset, and one on each wrong file; the exit code."""
    folder = Path(arguments.folder)
    require(folder.is_dir(), f"{folder} is no folder")
    is_dataset, checkpoints = (folder / "dataset.json").exists(), _checkpoints(folder)
    neither = f"{folder} has neither dataset.json nor checkpoints: name the folder of a dataset or a run"
    require(is_dataset or bool(checkpoints), neither)
    damaged = (
        list(_dataset(folder)) if is_dataset else [text for one in checkpoints for text in _checkpoint(one)]
    )
    return FAILED if damaged else DONE


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, in their order."""
    return sorted(
        (p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()), key=lambda p: int(p.name)
    )


def _checkpoint(folder: Path) -> Iterator[str]:
    """Prints how a checkpoint is; yields what is wrong with it."""
    from trainit.checkpoints import digests

    found = digests.problems(folder)
    if found is None:
        found = ["it was saved without digests: it cannot be checked"]
    for text in found:
        print(f"{folder}: {text}", flush=True)
        yield text
    if not found:
        sizes = [about["bytes"] for about in (digests.read(folder) or {}).values()]
        print(f"{folder}: {len(sizes)} files of {sum(sizes) / 1e9:.3g} GB are as they were saved", flush=True)


def _dataset(folder: Path) -> Iterator[str]:
    """Prints how a dataset is; yields what is wrong with it."""
    from trainit.data.dataset import DatasetError
    from trainit.prepare.verify import verify

    checked = 0
    try:
        for text in verify(folder):
            checked += 1
            if text:
                print(text, flush=True)
                yield text
    except DatasetError as error:
        print(error)
        yield str(error)
    print(f"{folder}: {checked} files were compared with dataset.json", flush=True)
