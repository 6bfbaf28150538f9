"""Settings of XLA, CUDA and JAX: which hold where, what the user's do to them, how devices are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, end, start

from trainit.cluster.hardware import JobDevices, detect, visible_gpus
from trainit.cluster.place import Place, SetupError
from trainit.cluster.tuning import TUNABLES
from trainit.cluster.xla_flags import SETTINGS, apply

H100, B200, A100, T4 = "NVIDIA H100 80GB HBM3", "NVIDIA B200", "NVIDIA A100-SXM4-80GB", "Tesla T4"
CPU_FLAGS = {
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
    "xla_cpu_copy_insertion_use_region_analysis": "true",
    "xla_backend_optimization_level": "2",
}
OVERLAP = dict.fromkeys(
    (
        "xla_gpu_enable_latency_hiding_scheduler",
        "xla_gpu_enable_pipelined_all_gather",
        "xla_gpu_enable_pipelined_reduce_scatter",
        "xla_gpu_enable_pipelined_all_reduce",
        "xla_gpu_enable_while_loop_double_buffering",
    ),
    "true",
)
TWO = {"xla_gpu_experimental_parallel_collective_overlap_limit": "2"}
GRAPHS = {"xla_gpu_enable_command_buffer": "-collectives"}
BLACKWELL = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL"}
QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def joined(gather: int, scatter: int, reduce: int) -> dict[str, str]:
    """Thresholds of joined exchanges, given in MiB."""
    sizes = {"all_gather": gather, "reduce_scatter": scatter, "all_reduce": reduce}
    return {f"xla_gpu_{name}_combine_threshold_bytes": str(size * 2**20) for name, size in sizes.items()}


def memory(fraction: str) -> dict[str, str]:
    return {"XLA_CLIENT_MEM_FRACTION": fraction}


def flags(environment: dict[str, str]) -> dict[str, str]:
    words = [word.removeprefix("--").partition("=") for word in environment.get("XLA_FLAGS", "").split()]
    return {name: value for name, _, value in words}


def applied(here: JobDevices, **environment: str) -> dict[str, str]:
    """Flags and variables that are there afterwards."""
    apply(here, environment)
    found = flags(environment)
    environment.pop("XLA_FLAGS", None)
    return found | environment


IN_ONE = joined(128, 64, 128)
IN_MANY = joined(128, 128, 1024)


@pytest.mark.evidence("XLA flags by kind and number of GPUs and hosts")
@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (JobDevices(), CPU_FLAGS),
        (JobDevices("", 0, hosts=4), CPU_FLAGS),
        (JobDevices(H100, 1), memory("0.9")),
        (JobDevices(H100, 8), OVERLAP | IN_ONE | GRAPHS | QUEUE | memory("0.9")),
        (JobDevices("NVIDIA GH200 480GB", 32, 32), OVERLAP | TWO | IN_MANY | GRAPHS | QUEUE | memory("0.85")),
        (JobDevices(A100, 1), memory("0.9")),
        (JobDevices(A100, 4), OVERLAP | IN_ONE | GRAPHS | memory("0.9")),
        (JobDevices(A100, 16, 2), OVERLAP | IN_MANY | GRAPHS | memory("0.85")),
        (JobDevices(B200, 1), BLACKWELL | memory("0.9")),
        (JobDevices("NVIDIA GB200", 4), OVERLAP | IN_ONE | BLACKWELL | memory("0.9")),
        (JobDevices(B200, 64, 8), OVERLAP | IN_MANY | BLACKWELL | memory("0.85")),
        (JobDevices(T4, 1), {}),
        (JobDevices(T4, 4, 2), OVERLAP | GRAPHS),
        (JobDevices("several kinds", 2), OVERLAP | GRAPHS),
    ],
    ids=lambda value: str(value) if isinstance(value, JobDevices) else "",
)
def test_what_holds_where(here, expected):
    assert applied(here) == expected


def test_a_setting_has_one_value_anywhere_and_a_source():
    for kind in (H100, B200, A100, T4, ""):
        for gpus, hosts in ((1, 1), (8, 1), (16, 2)):
            names = [row.name for row in SETTINGS if row.holds(JobDevices(kind, gpus, hosts))]
            assert len(set(names)) == len(names)
    assert all(row.source for row in SETTINGS)
    used = [
        any(row.holds(JobDevices(k, g, h)) for k in (H100, B200, A100, "") for g, h in ((8, 1), (8, 2)))
        for row in SETTINGS
    ]
    assert all(used)


@pytest.mark.evidence("XLA flags that the user has set win")
def test_what_the_user_has_set_wins(tmp_path):
    """Flags, variables, older names of variables, and a file of flags; and all of ours can be left out."""
    here = JobDevices(H100, 16, 2)
    everything = applied(here)
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    environment = {"XLA_FLAGS": mine, "CUDA_DEVICE_MAX_CONNECTIONS": "8", "HOME": "/h"}
    settings = apply(here, environment)
    changed = {"xla_gpu_enable_latency_hiding_scheduler": "false", "xla_dump_to": "/tmp/x"}
    assert flags(environment) == {k: v for k, v in (everything | changed).items() if k.islower()}
    assert environment["XLA_FLAGS"].endswith(mine)  # behind ours: also over flags by other names
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert environment["XLA_CLIENT_MEM_FRACTION"] == "0.85"
    left = "--xla_gpu_enable_latency_hiding_scheduler, CUDA_DEVICE_MAX_CONNECTIONS"
    assert settings.endswith(f"; left as they were set: {left}")
    assert "latency_hiding_scheduler=" not in settings
    # jaxlib takes no two names for one thing.
    for name in (
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_PREALLOCATE",
    ):
        found = applied(here, **{name: "0.5"})
        assert {key: found[key] for key in found if "CLIENT" in key} == {name: "0.5"}
    file = tmp_path / "flags"
    file.write_text(f"{mine}\n")
    assert applied(here, XLA_FLAGS=str(file)) == everything | changed
    assert applied(here, XLA_FLAGS=mine, TRAINIT_SETTINGS="off") == changed | {"TRAINIT_SETTINGS": "off"}
    assert applied(JobDevices(), TRAINIT_SETTINGS="off") == {"TRAINIT_SETTINGS": "off"}
    with pytest.raises(SetupError, match=r"TRAINIT_SETTINGS='no' must be 'off', or not set"):
        apply(here, {"TRAINIT_SETTINGS": "no"})


def test_texts_leave_out_what_is_for_training_alone():
    """A step then takes less memory, but XLA:CPU computes less at once: a third of a decoder's time."""
    trains, writes = {}, {}
    apply(JobDevices(), trains)
    apply(JobDevices(), writes, trains=False)
    left_out = {"xla_cpu_enable_concurrency_optimized_scheduler": "false"}
    assert flags(trains) == flags(writes) | left_out
    assert not left_out.keys() & flags(writes).keys()


def test_what_was_set_is_told():
    environment = {}
    settings = apply(JobDevices(H100, 16, 2), environment)
    variables = " ".join(f"{name}={value}" for name, value in environment.items() if name != "XLA_FLAGS")
    assert settings == f"16 × {H100} (Hopper), 2 hosts: {environment['XLA_FLAGS'].strip()} {variables}"
    assert apply(JobDevices(T4, 1), {}) == "1 × Tesla T4 (other): none"


def driver(folder: Path, *names: str) -> Path:
    """The information of NVIDIA's driver on GPUs of these names, as its files have it."""
    for number, name in enumerate(names):
        (folder / f"0000:{number:02x}:00.0").mkdir(parents=True)
        text = f"Model: \t\t {name}\nIRQ:   \t\t 18\nGPU UUID: \t GPU-{number}\nDMA Mask: \t 47bits\n"
        (folder / f"0000:{number:02x}:00.0" / "information").write_text(text)
    return folder


def nvidia_smi(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which nvidia-smi lists GPUs of these names, if it is asked for what Trainit needs."""
    folder.mkdir()
    lines = "".join(f"GPU-{number}, {name}\n" for number, name in enumerate(names))
    script = f'#!/bin/sh\n[ "$1" = --query-gpu=uuid,name ] || exit 3\nprintf "{lines}"\n'
    (folder / "nvidia-smi").write_text(script or "exit 9")
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_devices_are_found_without_jax(tmp_path):
    """By the driver's files where they name one kind, else by nvidia-smi; and what the job has of them."""
    eight, none = driver(tmp_path / "eight", *[H100] * 8), tmp_path / "none"
    mixed = driver(tmp_path / "mixed", T4, A100)
    smi, both = nvidia_smi(tmp_path / "smi", A100, A100), nvidia_smi(tmp_path / "both", T4, A100)
    silent = nvidia_smi(tmp_path / "silent") | {"CUDA_VISIBLE_DEVICES": "0"}
    empty = {"PATH": str(none)}
    for platform, environment, processes, hosts, folder, expected in (
        ("", empty, 1, 1, eight, JobDevices(H100, 8)),
        ("cuda", smi, 1, 1, eight, JobDevices(H100, 8)),
        ("", empty, 16, 2, eight, JobDevices(H100, 16, 2)),
        ("", empty | {"CUDA_VISIBLE_DEVICES": "3"}, 1, 1, eight, JobDevices(H100, 1)),
        ("", empty | {"CUDA_VISIBLE_DEVICES": "3"}, 8, 1, eight, JobDevices(H100, 8)),
        ("", empty | {"CUDA_VISIBLE_DEVICES": "3,4"}, 1, 1, eight, JobDevices(H100, 2)),
        ("", smi, 1, 1, none, JobDevices(A100, 2)),
        ("", smi, 1, 1, mixed, JobDevices(A100, 2)),  # the others are not let through
        ("", both, 2, 1, mixed, JobDevices("several kinds", 2)),
        ("", silent, 1, 1, none, JobDevices()),
        ("", empty, 4, 2, none, JobDevices()),
        ("cpu", smi, 1, 1, eight, JobDevices()),
        ("", smi | {"CUDA_VISIBLE_DEVICES": ""}, 1, 1, eight, JobDevices()),
        ("", smi | {"CUDA_VISIBLE_DEVICES": "-1"}, 1, 1, eight, JobDevices()),
    ):
        assert detect(platform, environment, processes, hosts, folder) == expected


def test_names_of_visible_gpus(tmp_path):
    """As processes compare them: numbers are indices into the list of nvidia-smi."""
    environment = nvidia_smi(tmp_path / "smi", A100, A100, A100)
    assert visible_gpus(environment, Place("test")) == ["GPU-0", "GPU-1", "GPU-2"]
    chosen = environment | {"CUDA_VISIBLE_DEVICES": "2,GPU-0"}
    assert visible_gpus(chosen, Place("test")) == ["GPU-2", "GPU-0"]
    assert visible_gpus(chosen, Place("test", local_device_ids=(1,))) == ["GPU-0"]


@pytest.mark.evidence("the installed jaxlib knows all XLA flags that are set")
def test_the_installed_jaxlib_knows_all_flags():
    """A flag that it does not know ends a process at once."""
    rows = " ".join(f"{row.name}={row.value}" for row in SETTINGS if row.name.startswith("--"))
    code = "from jaxlib import xla_client; print(xla_client.make_cpu_client().device_count())"

    def devices(text: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "XLA_FLAGS": text}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    answer = devices(rows)
    assert answer.returncode == 0 and int(answer.stdout) > 0, answer.stderr
    unknown = devices(f"{rows} --xla_gpu_no_such_flag=1")
    assert unknown.returncode != 0
    assert "xla_gpu_no_such_flag" in unknown.stderr


def test_commands_tell_the_settings_of_gpus(random_dataset, tmp_path):
    """One line of the run and one row of the doctor, before JAX looks for the GPUs, which are not there."""
    environment = nvidia_smi(tmp_path / "smi", A100, A100) | {"XLA_FLAGS": ""}
    fields = (f"--config.dataset.path={random_dataset}", "--config.platform=cuda")
    arguments = (f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}/run", *fields)
    commands = [
        (code, start(*arguments, command=command, **environment))
        for command, code in (("train", 2), ("doctor", 1))
    ]
    for code, process in commands:
        output = end(process, code)
        lines = re.findall(r"settings +(?:ok +)?(\S.*)", output)
        assert len(lines) == 1, output
        assert lines[0].startswith(f"2 × {A100} (Ampere): --xla_gpu_enable")
        assert "platform='cuda' cannot be used here" in " ".join(output.split())


def test_readme_has_the_table():
    text = (ROOT / "docs/reference/xla-flags.md").read_text()
    for row in SETTINGS:
        lines = [line for line in text.splitlines() if f"`{row.name.removeprefix('--')}`" in line]
        assert any(f"`{row.value}`" in line and row.source in line for line in lines), row


def test_the_command_begins_anew_with_glibc_s_settings_and_stays_the_same_process():
    """The program sees its own arguments, the setting and the process's number from before."""
    program = (
        "import os, sys; from trainit.cluster import tuning; print(os.getpid()); sys.stdout.flush();"
        "tuning.tune_process(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def run(**more: str) -> list[str]:
        command = [sys.executable, "-c", program, "--a=b", "c d"]
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment | more, cwd=ROOT, check=True
        )
        return process.stdout.splitlines()

    first, second, last = run()
    assert first == second
    assert last == f"{TUNABLES} ['--a=b', 'c d']"
    assert run(GLIBC_TUNABLES="glibc.malloc.check=0")[1:] == ["glibc.malloc.check=0 ['--a=b', 'c d']"]
    assert run(TRAINIT_SETTINGS="off")[1:] == ["None ['--a=b', 'c d']"]
