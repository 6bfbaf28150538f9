"""Measures what a lost process costs, in seconds: `python tests/cluster/seconds_lost.py --help`.

Starts launch/local.sh, kills one of its processes with SIGKILL each time that a step and a checkpoint more
are done, and measures until the end of the first step after it. For comparison, the same job is started as
often by hand, from its checkpoint. The programs are in the cache before. Prints medians, and those of the
parts.
"""

import argparse
import functools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from processes import last_step, launch, pid_of

from trainit.cluster.process import start_of

LINE = re.compile(r"^(\S+ \S+) \S+ \S+ start      to the end of step \d+: ([\d.]+) s: (.*)$", re.MULTILINE)


def starts(workdir: Path) -> list[tuple[float, float, dict[str, float]]]:
    """Of each start in process 0's log: when it was launched, when its first step was done, its parts."""
    log, found = workdir / "logs/process_0.log", []
    for at, total, parts in LINE.findall(log.read_text() if log.exists() else ""):
        over = datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f").timestamp()
        pairs = (part.rsplit(" ", 1) for part in parts.split(", "))
        found.append((over - float(total), over, {name: float(seconds) for name, seconds in pairs}))
    return found


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the checkpoints that are complete."""
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Waits for the condition, without taking much of the processor; the job must not end before."""
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}:\n{process.stdout.read()}"
        time.sleep(0.05)


def measure_start(begin: Callable[..., subprocess.Popen], workdir: Path) -> dict[str, float]:
    """Starts the job, stops it when a step is done, and returns the seconds by part."""
    before, begun = len(starts(workdir)), time.time()
    process = begin()
    try:
        wait(process, lambda: len(starts(workdir)) > before and checkpoints(workdir))
    finally:
        end(process)
    launched, over, parts = starts(workdir)[-1]
    return {"in all": over - begun, "launch script": launched - begun} | parts


def measure_loss(process: subprocess.Popen, workdir: Path, count: int, rank: int) -> dict[str, float]:
    """Kills the process with this number, of `count`, and returns the seconds by part."""
    before, last, pids = len(starts(workdir)), last_step(workdir), [pid_of(process, i) for i in range(count)]
    wait(process, lambda: last_step(workdir) > last and max(checkpoints(workdir), default=0) > last)
    os.kill(pids[rank], signal.SIGKILL)
    killed = time.time()
    wait(process, lambda: not any(map(start_of, pids)))
    ended = time.time()
    wait(process, lambda: len(starts(workdir)) > before)
    launched, over, parts = starts(workdir)[-1]
    own = {"in all": over - killed, "others end": ended - killed, "launch script": launched - ended}
    return own | parts


def end(process: subprocess.Popen) -> None:
    """Stops a job, and waits for its end."""
    process.send_signal(signal.SIGTERM)
    process.communicate()


def main():
    """Prints a table with a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--losses", type=int, default=10)
    parser.add_argument("flags", nargs="*", help="of trainit train, after --")
    arguments = parser.parse_args()
    count, columns = arguments.processes, {"first start": [], "start": [], "lost process": []}

    def note(kind: str, seconds: dict[str, float]) -> None:
        columns[kind].append(seconds)
        print(kind, *(f"{name} {value:.1f}" for name, value in seconds.items()), sep=", ", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        flags = arguments.flags or ["--config=configs/debug.py", f"--config.cpu_devices={max(1, 8 // count)}"]
        flags += [f"--workdir={folder}", "--config.steps=1000000", "--config.checkpoint.save_steps=5"]
        begin, workdir = functools.partial(launch, count, *flags), Path(folder)
        note("first start", measure_start(begin, workdir))  # which puts programs into the cache
        for _ in range(arguments.starts):
            note("start", measure_start(begin, workdir))
        if arguments.losses:
            known, process = len(starts(workdir)), begin(f"--config.restart.limit={arguments.losses}")
            try:
                wait(process, lambda: len(starts(workdir)) > known)
                for turn in range(arguments.losses):
                    note("lost process", measure_loss(process, workdir, count, (1 + turn) % count))
            finally:
                end(process)
    names = dict.fromkeys(name for of_kind in columns.values() for seconds in of_kind for name in seconds)
    columns = {kind: of_kind for kind, of_kind in columns.items() if of_kind}
    medians = []
    for name in names:
        values = ([seconds.get(name, 0.0) for seconds in of_kind] for of_kind in columns.values())
        medians.append([name, *map(statistics.median, values)])
    print(tabulate(medians, ["median seconds", *columns], floatfmt=".1f"))


if __name__ == "__main__":
    main()
