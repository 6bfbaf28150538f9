"""What the tests on real schedulers share."""

import pytest
from processes import ROOT, metrics, run


@pytest.fixture(scope="session")
def calm(random_dataset, tmp_path_factory):
    """Metrics of a run of so many steps in one process on this machine, to compare a cluster's with."""

    def train(steps) -> list[dict]:
        workdir = tmp_path_factory.mktemp("calm")
        run(
            f"--config={ROOT}/tests/tiny.py",
            *(f"--config.dataset.path={random_dataset}", f"--workdir={workdir}", f"--config.steps={steps}"),
            *("--config.cpu_devices=4", "--config.mesh.data=1"),
        )
        return metrics(workdir)

    return train
