"""What the tests on real schedulers share."""

import sys
from pathlib import Path

import pytest
from processes import FAST, ROOT, SMOOTH, metrics, run


@pytest.fixture(scope="module")
def submitted_from(tmp_path_factory):
    """A folder with launch/, in which the jobs of one cluster keep their files: two may be up at a time."""
    folder = tmp_path_factory.mktemp("submitted_from")
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


@pytest.fixture(scope="session")
def calm(random_dataset, tmp_path_factory):
    """Metrics of a run of this many steps in one process on this machine, to compare a cluster's with."""

    def train(steps) -> list[dict]:
        workdir = tmp_path_factory.mktemp("calm")
        run(
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={workdir}", f"--config.steps={steps}"),
            *("--config.cpu_devices=4", "--config.mesh.data=1", SMOOTH),
        )
        return metrics(workdir)

    return train


@pytest.fixture(scope="session")
def activate(tmp_path_factory) -> str:
    """TRAINIT_ACTIVATE of jobs: Python as here, and steps of 2 s, so that any machine is quick enough."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(
        "import time\n"
        "from trainit.data.dataset import Split\n"
        "read = Split.read\n"
        "def slowly(split, *args):\n"
        "    time.sleep(2 * (split.name == 'train'))\n"
        "    return read(split, *args)\n"
        "Split.read = slowly\n"
    )
    # In the place of Apptainer, which Debian does not have: it notes what it is asked for, and does it.
    (folder / "apptainer").write_text(
        f'#!/bin/sh\n[ "$1 $2" = "exec --nv" ] || exit 1\necho "$@" >> {folder}/asked\nshift 3\nexec "$@"\n'
    )
    (folder / "apptainer").chmod(0o755)
    # In a file, since not all that is in quotes gets through `qsub -v`.
    (folder / "activate").write_text(
        f"export XLA_FLAGS='{FAST}' PYTHONPATH={folder}:{ROOT}\n"
        f"export PATH={folder}:{Path(sys.executable).parent}:$PATH\n"
    )
    return f"source {folder}/activate"


@pytest.fixture
def container(activate, monkeypatch):
    """TRAINIT_CONTAINER of jobs, and a function that counts what has been trained in it, by processes."""
    monkeypatch.setenv("TRAINIT_CONTAINER", "trainit.sif")
    asked = Path(activate.removeprefix("source ")).with_name("asked")
    asked.unlink(missing_ok=True)
    return lambda: asked.read_text().count("exec --nv trainit.sif python3 -m trainit train ")


@pytest.fixture
def sweep(random_dataset, submitted_from, tmp_path):
    """What goes after `trainit sweep` for two seeds of three steps; and what has become of them."""
    fields = {"dataset.path": str(random_dataset), "steps": 3, "cpu_devices": 1}
    fields |= {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1}
    asked = {"config": f"{ROOT}/tests/tiny.py", "fields": fields, "seeds": [1, 2]}
    (tmp_path / "pair.py").write_text(f"def get_sweep(arg):\n    return {asked!r}\n")

    def check(output: str, devices: int):
        """Both runs are done, each by a job of this many devices, and compared."""
        for seed in (1, 2):
            assert [r["step"] for r in metrics(tmp_path / f"out/seed_{seed}")] == [0, 1, 2, 3]
            assert (
                f"devices    {devices} × cpu"
                in (tmp_path / f"out/seed_{seed}/logs/process_0.log").read_text()
            )
        assert "not finished" not in output
        assert "page in" in output
        assert not list(submitted_from.glob(".trainit-*"))

    return [f"{tmp_path}/pair.py", f"--output={tmp_path}/out"], check
