"""Where a process stands: in each scheduler's environment, by flags, alone; what it leaves behind."""

from argparse import Namespace

import pytest
from processes import ROOT, run_imported, start

from trainit.cluster.place import Place, SetupError, check_coordinator, find_own_place, find_place

# What srun sets for the last task of two nodes with two tasks and two GPUs each; the values are made up.
SLURM = {
    "SLURM_JOB_ID": "5003",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "CUDA_VISIBLE_DEVICES": "0,1",
}


def test_slurm_one_process_a_gpu():
    address = f"gpu08:{61440 + 5003 % 4096}"
    assert find_place(SLURM) == Place("Slurm job 5003", address, 4, 3, (1,), 2)


def test_slurm_one_process_a_node_has_all_its_gpus():
    changes = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    place = find_place(SLURM | changes | {"SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert (place.num_processes, place.process_id, place.local_device_ids) == (2, 1, None)


def test_slurm_uneven_nodes_and_single_gpus():
    """3 tasks on one node and 1 on the other; each was given its own GPU by --gpus-per-task."""
    environment = SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": "3,1",
        "SLURM_LOCALID": "0",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert find_place(environment).local_device_ids is None
    two_each = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert find_place(two_each).local_device_ids == (2, 3)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-4]", "n1"), ("gpu-a[003,007-9],b1", "gpu-a003"), ("x1,x2", "x1"), ("", "")],
)
def test_slurm_coordinator_is_the_first_host(nodes, host):
    assert find_place(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == host


@pytest.mark.parametrize("name", SLURM)
def test_slurm_with_a_variable_missing(name):
    """As a container or `sudo` leaves it: the same place, or one line that names the variable."""
    environment = {key: value for key, value in SLURM.items() if key != name}
    if name == "SLURM_STEP_NUM_TASKS":
        assert find_place(environment) == find_place(SLURM)
    elif name in ("SLURM_STEP_NODELIST", "SLURM_PROCID"):  # not started by srun
        assert find_place(environment).num_processes == 1
    elif name != "CUDA_VISIBLE_DEVICES":
        with pytest.raises(SetupError, match=f"'{name}' is missing; use launch/slurm.sh.*--coordinator"):
            find_place(environment)


@pytest.mark.parametrize(
    "wrong",
    [
        {"SLURM_NODEID": "5"},
        {"SLURM_PROCID": ""},
        {"TRAINIT_NUM_PROCESSES": "2"},
        {"OMPI_COMM_WORLD_SIZE": "many"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"SGE_TASK_ID": "1"},
    ],
)
def test_variables_that_cannot_be_read(wrong, monkeypatch):
    environment = (SLURM if "SLURM" in next(iter(wrong)) else {}) | wrong
    named = f"{next(iter(wrong))[:7]}|JOB_ID"
    with pytest.raises(SetupError, match=rf"cannot be read: .*({named}).*; use launch/"):
        find_place(environment)
    # Flags say everything, so that nothing of it is needed.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = Namespace(coordinator="n1:99", num_processes=2, process_id=1)
    assert find_own_place(given) == Place("flags", "n1:99", 2, 1)


def test_alone():
    assert find_place({}) == Place("alone")
    assert find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}).num_processes == 1  # salloc's shell
    assert find_place(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}).num_processes == 1  # srun --pty


def test_a_batch_script_without_srun_is_refused():
    with pytest.raises(SetupError, match=r"job 9 has SLURM_NTASKS=4.*without srun.*train alone"):
        find_place({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})


def test_grid_engine():
    """With and without the launch script; a batch job of several hosts must not train alone on the first."""
    sge = {"JOB_ID": "12", "SGE_TASK_ID": "undefined", "NHOSTS": "2", "NSLOTS": "4", "ENVIRONMENT": "BATCH"}
    script = {
        "TRAINIT_JOB": "Grid Engine job 12",
        "TRAINIT_NUM_PROCESSES": "4",
        "TRAINIT_LOCAL_PROCESSES": "2",
        "TRAINIT_PROCESS_ID": "3",
        "TRAINIT_LOCAL_ID": "1",
        "TRAINIT_COORDINATOR": "n1:61452",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    assert find_place(sge | script) == Place("Grid Engine job 12", "n1:61452", 4, 3, (1,), 2)
    with pytest.raises(SetupError, match=r"job 12 has NHOSTS=2.*without launch/sge.sh.*train alone"):
        find_place(sge)
    assert find_place(sge | {"NHOSTS": "1"}) == Place("Grid Engine job 12")
    shell = sge | {"ENVIRONMENT": "INTERACTIVE"}
    assert find_place(shell) == Place("alone, in a shell of Grid Engine job 12")


def test_gpus_that_cannot_be_shared_evenly():
    with pytest.raises(SetupError, match=r"CUDA_VISIBLE_DEVICES=0,1,2 cannot be shared evenly by 2"):
        find_place(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_open_mpi():
    environment = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    }
    place = find_place(environment)
    assert (place.num_processes, place.process_id, place.hosts) == (4, 2, 2)
    assert place.coordinator.startswith("10.96.0.1:")
    del environment["OMPI_MCA_orte_hnp_uri"]
    with pytest.raises(SetupError, match=r"add --coordinator=HOST:PORT"):
        check_coordinator(find_place(environment))


def test_a_loopback_coordinator_of_several_hosts():
    with pytest.raises(SetupError, match=r"localhost:1 has the loopback address 127.*2 hosts cannot share"):
        check_coordinator(Place("test", "localhost:1", 2, 0, hosts=2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2", "--process_id=2"], "--process_id=2 must be below --num_processes=2"),
        (["--num_processes=2", "--process_id=1"], "add --coordinator=HOST:PORT"),
        (["--process_id=1"], "--process_id=1 must be below --num_processes=0"),
        *(
            (
                ["--num_processes=2", f"--coordinator={at}"],
                f"coordinator '{at}'; add --coordinator=HOST:PORT",
            )
            for at in ("localhost", "localhost:x", "localhost:99999", "localhost:")
        ),
    ],
)
def test_wrong_flags(flags, message, random_dataset, tmp_path):
    data = f"--config.dataset.path={random_dataset}"
    output = run_imported(f"--config={ROOT}/tests/tiny.py", data, f"--workdir={tmp_path}", *flags, expect=2)
    assert message in output.splitlines()[-1]


def test_marker_for_launch_scripts(random_dataset, tmp_path):
    """Left by the lead when stopped and saved; another when a process fails; none when all is done."""
    args = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}"
    marker = tmp_path / "marker"
    for extra, code, left in (
        (["--config.max_minutes=0.0001"], 75, {"marker"}),
        (["--config.batch_size=5"], 2, {"marker.failed"}),
        (["--config.steps=2"], 0, set()),
    ):
        process = start(*args, *extra, f"--workdir={tmp_path}/run{code}", TRAINIT_MARKER=str(marker))
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        found = {path.name for path in tmp_path.glob("marker*")}
        assert found == left
        for path in tmp_path.glob("marker*"):
            path.unlink()
