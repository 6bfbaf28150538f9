"""Random faults on jobs of 1, 2 and 4 processes: nothing lost, nothing doubled, every damage noticed.

    pytest -n 0 -s tests/cluster/test_faults.py
    FAULTS=1000 FAULTS_SEED=1 FAULTS_FOLDER=/tmp/faults pytest -n 0 -s tests/cluster/test_faults.py

FAULTS sets how many (60), FAULTS_SEED draws others; both are printed, with what became of each. FAULTS_FOLDER
keeps a file of the results, and the same command continues from there. FAULTS_RUNS is how many runs there are
at a time (2).
"""

import ctypes
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest
from faulty import SLOW_DISK
from struck_job import can_copy
from tabulate import tabulate

FAULTS = int(os.environ.get("FAULTS", "60"))
AT_A_TIME = int(os.environ.get("FAULTS_RUNS", "2"))
OF_A_RUN = 12
PROCESSES = 4, 2, 1  # of runs in turn


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What `processes.imported` takes, for processes with the hooks of faulty.py."""
    library = ""
    if shutil.which("cc"):
        library = str(tmp_path / "slow_disk.so")
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", library, "-ldl"]
        subprocess.run(compiler, input=SLOW_DISK, text=True, check=True)
    monkeypatch.setenv("FAULTS_LIBRARY", library)
    return "faulty", str(Path(faults.__file__).parent), library


@pytest.fixture
def disks(tmp_path):
    """Small file systems, one for each run at a time, or folders, where none may be mounted."""
    folders = [tmp_path / f"disk_{number}" for number in range(AT_A_TIME)]
    for folder in folders:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=False)
    yield folders
    for folder in folders:
        ctypes.CDLL(None).umount2(os.fsencode(folder), 2)


def table(results: list[dict]) -> str:
    """Faults by kind, and how many of them by moment and processes, with failures and what took longest."""
    rows = []
    for kind in sorted({result["kind"] for result in results}):
        own = [result for result in results if result["kind"] == kind]
        moments, processes = (Counter(result[name] for result in own) for name in ("moment", "processes"))
        counts = [moments[moment] for moment in faults.MOMENTS] + [processes[n] for n in faults.MESHES]
        longest = [max(result.get(name, 0) for result in own) for name in ("seconds", "start")]
        rows.append([kind, len(own), *counts, sum("failed" in result for result in own), *longest])
    numbers = [f"of {count}" for count in faults.MESHES]
    header = ["kind", "faults", *faults.MOMENTS, *numbers, "failed", "longest, s", "longest start, s"]
    columns = list(zip(*rows, strict=True))
    total = ["all", *map(sum, columns[1:-2]), *map(max, columns[-2:])]
    return tabulate([*rows, total], header, tablefmt="github")


@pytest.mark.evidence(
    "60 faults on jobs of 1, 2 and 4 processes (SIGKILL, SIGSTOP short and long, SIGTERM, SIGHUP, SIGINT, "
    "SIGUSR1, SIGUSR2, a full and a slow disk, a lost connection, a clock that is set back, strangers at the "
    "port, a flipped bit, a cut off or deleted file in a checkpoint, `metrics.jsonl` or a shard; kind, "
    "process and moment, in a start, step, validation, save or exit, drawn from a printed seed): no step "
    "lost or doubled, all metrics bit-identical to the undisturbed run's, all damage noticed, and each job "
    "ended or continued within a minute"
)
def test_random_faults_change_nothing(server, disks, random_dataset, tmp_path):
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(2**32)))
    print(f"\n{FAULTS} faults drawn from FAULTS_SEED={seed}")
    needs = {
        "full disk": all(disk.is_mount() for disk in disks),
        "slow disk": server[-1],
        "lost connection": can_copy(),
    }
    impossible = [kind for kind, is_there in needs.items() if not is_there]
    if impossible:
        print(f"this machine does not allow: {', '.join(impossible)}")
    calm = {}
    for count in faults.MESHES:
        (folder := tmp_path / f"calm_{count}").mkdir()
        run = faults.Run(folder, random_dataset, count, server, seed)
        run.go(0, [], lambda result: pytest.fail(result["failed"]))
        calm[count] = run.records()

    kept = Path(os.environ.get("FAULTS_FOLDER", tmp_path)) / f"faults_{seed}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    finished, lock = {result["run"] for result in results}, threading.Lock()
    numbers = (number for number in itertools.count() if number not in finished)

    def strike(disk: Path):
        """Runs one after the other on a disk of its own, until there were enough faults."""
        while True:
            with lock:
                if (left := FAULTS - len(results)) <= 0:
                    return
                number = next(numbers)
            count = PROCESSES[number % len(PROCESSES)]
            (folder := disk / str(number)).mkdir()
            own: list[dict] = []
            run = faults.Run(folder, random_dataset, count, server, f"{seed}/{number}", impossible)

            def report(result: dict, number: int = number, own: list = own):
                with lock:
                    own.append(result | {"run": number})
                    results.append(own[-1])
                    print(f"{len(results):4}  run {number:2} {describe(result)}", flush=True)

            run.go(min(OF_A_RUN, left), calm[count], report)
            with lock, kept.open("a") as file:  # only now: the end compares the whole run
                file.writelines(json.dumps(result) + "\n" for result in own)
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        list(threads.map(strike, disks))
    print(table(results))
    failed = [result for result in results if "failed" in result]
    assert not failed, "\n".join(f"{describe(result)}\n{result['failed']}" for result in failed)


def describe(result: dict) -> str:
    """A line on what became of a fault."""
    names = ("before", "file", "codes", "stopped", "seconds", "start")
    more = " ".join(f"{name} {result[name]}" for name in names if name in result)
    failed = f"  FAILED: {result['failed'].splitlines()[0]}" if "failed" in result else ""
    where = f"process {result.get('rank', 0)} of {result['processes']} at step {result.get('step', 0):2}"
    return f"{result['kind']:20} {result['moment']:10} {where}: {more}{failed}"
