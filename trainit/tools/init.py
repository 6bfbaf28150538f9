"""Writes a folder to start from: configs, launch scripts, and an optimizer to change.

    trainit init my-lab

With it, an installed package does without a clone of its repository.
"""

import argparse
import shutil
import sysconfig
from pathlib import Path

import trainit
from trainit.cluster.files import new_folder
from trainit.config import require
from trainit.config.exit_codes import DONE

DESCRIPTION = "Writes a folder to start from: configs/, launch/ and my_optimizer.py."
NEXT = """wrote {folder}: configs/, launch/ and my_optimizer.py, which is AdamW as it is here. For example:

    cd {folder}
    trainit train --config=configs/debug.py
    trainit train --config=configs/debug.py:optimizer=my_optimizer.py --workdir=runs/mine
    sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=configs/pile_gpt.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("folder", metavar="FOLDER", help="the new folder")


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder as a whole or not at all; the exit code."""
    source = _source()
    with new_folder(arguments.folder, "FOLDER") as new:
        for name, pattern in (("configs", "*.py"), ("launch", "*.sh")):
            (new / name).mkdir()
            for file in (source / name).glob(pattern):
                (new / name / file.name).write_bytes(file.read_bytes())
                (new / name / file.name).chmod(0o755 if file.suffix == ".sh" else 0o644)
        shutil.copy(Path(trainit.__file__).parent / "optimizers/adamw.py", new / "my_optimizer.py")
    print(NEXT.format(folder=arguments.folder), end="")
    return DONE


def _source() -> Path:
    """The folder that has configs/ and launch/: the repository, or where the wheel has put them."""
    repository = Path(trainit.__file__).parent.parent
    installed = Path(sysconfig.get_path("data")) / "share/trainit"
    found = [folder for folder in (repository, installed) if (folder / "launch/slurm.sh").is_file()]
    missing = f"neither {repository} nor {installed} has configs/ and launch/; install Trainit again"
    require(bool(found), missing)
    return found[0]
