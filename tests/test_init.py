"""`trainit init`: a folder from which an installed package is used. What the wheel brings is .ci/run's."""

import os

from processes import ROOT

from trainit import optimizers
from trainit.__main__ import main


def test_a_folder_to_start_from(tmp_path, capsys):
    folder = tmp_path / "lab"
    assert main(["init", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"cd {folder}" in said
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    configs = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    launch = {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.sh")}
    assert written == configs | launch | {"my_optimizer.py"}
    assert all(os.access(folder / script, os.X_OK) for script in launch)
    for name in configs | launch:
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    # The optimizer is a file of one's own, with AdamW's fields.
    own, adamw = (optimizers.choices()[name]() for name in (str(folder / "my_optimizer.py"), "adamw"))
    assert set(own) == set(adamw) and own.beta1 == adamw.beta1

    (folder / "my_optimizer.py").write_text("changed")
    assert main(["init", str(folder)]) == 2
    assert f"{folder} exists already; name another folder" in capsys.readouterr().err
    assert (folder / "my_optimizer.py").read_text() == "changed"


def test_both_images_have_the_same_packages():
    """Extras that there are, in the versions of constraints.txt."""
    lines = [
        line.strip().removeprefix("RUN ")
        for name in ("Dockerfile", "apptainer.def")
        for line in (ROOT / "launch" / name).read_text().splitlines()
        if "pip install" in line
    ]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert "-c /opt/trainit/constraints.txt '/opt/trainit[cuda12,demo,hf,tensorboard]'" in lines[0]
