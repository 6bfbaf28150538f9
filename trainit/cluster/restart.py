"""Decides what becomes of a job in which a process failed or was lost. The launch scripts ask, and do it.

`python -m trainit.cluster.restart RESULT [HOSTS ANSWERING]` prints hosts, and its exit code says what to do
with them: 0 start there, 1 end, 3 go back into the queue, and exclude them.

    RESULT     the exit code that the launch script has seen, or "start" before a job's first start
    HOSTS      all hosts of the job, in one word, with spaces between
    ANSWERING  those that answer now

The processes report in files: process 0 writes TRAINIT_RUN_FILE (`report_run`), and the first that knows of
a fault TRAINIT_RUN_FILE.fault (`report_fault`). What was before is in TRAINIT_RUN_FILE.history. Nothing that
takes seconds is imported.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainit.cluster.place import Place
from trainit.config.exit_codes import DONE, STOPPED, USAGE

AGAIN, END, QUEUE = 0, 1, 3
SILENT = (DONE, USAGE, STOPPED, 130)  # 130: a second Ctrl-C. After these, no start helps
# Whose fault it was, as the messages of the monitor, the watchdog and the rendezvous say. The first counts.
BLAMED = (r"behind: process (\d+) ", r"are missing: (\d+)", r"process (\d+) ")


@dataclass
class History:
    """What has happened in a job until now."""

    starts: int = 1
    step: str = ""  # the last one that was done when the last start ended; "": there was no start
    used: list[str] = field(default_factory=list)  # the hosts of the last start
    failures: dict[str, int] = field(default_factory=dict)  # of each host that has had one

    def bad(self) -> list[str]:
        """The hosts that are not used again."""
        return [host for host, count in self.failures.items() if count >= 2]


@dataclass(frozen=True)
class Decision:
    """What the launch script does, with which hosts, and the lines that say so."""

    code: int
    hosts: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def decide(
    result: int,
    hosts: Sequence[str],
    answering: Sequence[str],
    wanted: int,
    run: Mapping[str, Any],
    fault: Mapping[str, Any],
    step: str,
    history: History,
) -> Decision:
    """What to do after a start has ended with `result`, after `step`; changes `history`.

    `wanted` hosts have the processes of the job; `run` and `fault` are what the processes have reported.
    """
    limit = run.get("limit", 0)
    if not limit or {result, fault.get("code", result)} & set(SILENT):
        return Decision(END)
    used = history.used or list(hosts[:wanted])
    lost = [host for host in used if host not in answering]
    before, history.step = history.step, step
    what = f"a process ended with {result}, after step {step}"

    # A fault comes again if the data or the code are its reason; not if a host was lost.
    if step == before and not lost:
        again = "as at the start before; what is wrong there has to be found first"
        return Decision(END, lines=[f"not done: {what}, {again}"])
    if history.starts > limit:
        often = f"the run was started {history.starts} times; restart.limit is {limit}"
        return Decision(END, lines=[f"not done: {what}, and {often}"])
    history.starts += 1

    # Which hosts are to blame?
    lines, known_bad = [], history.bad()
    for host in lost or _blamed(fault.get("text", ""), used, run.get("processes", 0)):
        history.failures[host] = history.failures.get(host, 0) + 1
    for host in history.bad():
        if host not in known_bad:
            why = f"report it to its administrators: {fault.get('text') or 'it does not answer'}"
            lines.append(f"{host} failed twice and is not used again in this job; {why}")

    # On which hosts does the run continue?
    whole = f"{what}: start {history.starts} of at most {limit + 1}, from the newest checkpoint"
    history.used = used
    chosen = choose(hosts, answering, wanted, run, history)
    if hosts and not chosen:
        left = sum(host in answering and host not in history.bad() for host in hosts)
        avoid = sorted({*lost, *history.bad()})
        rest = f"{left} of {wanted} hosts are left, without {', '.join(avoid)}"
        return Decision(QUEUE, avoid, [*lines, f"{whole}, back in the queue: {rest}"])
    moved = f", on {', '.join(chosen)} instead of {', '.join(used)}" if chosen != used else ""
    history.used = chosen
    return Decision(AGAIN, chosen, [*lines, whole + moved])


def choose(
    hosts: Sequence[str], answering: Sequence[str], wanted: int, run: Mapping[str, Any], history: History
) -> list[str]:
    """The next start's hosts: those of the last, where they are well, and spares; or fewer; [] if none."""
    well = [host for host in hosts if host in answering and host not in history.bad()]
    well.sort(key=lambda host: host not in history.used)
    count = wanted
    if len(well) < wanted:
        processes = run.get("processes", 0)
        fits = [n * len(history.used) / processes for n in run.get("fits", ())]  # how many hosts
        count = max((int(n) for n in fits if n == int(n) and n <= len(well)), default=0)
    return sorted(well[:count], key=hosts.index)


def _blamed(text: str, used: Sequence[str], processes: int) -> list[str]:
    """The host of the process that a fault's text blames, or the only one that was used."""
    number = next((int(match[1]) for pattern in BLAMED if (match := re.search(pattern, text))), None)
    if number is None or number >= processes or not used:
        return list(used) if len(used) == 1 else []
    return [used[number * len(used) // processes]]


def report_run(place: Place, folder: Path, limit: int, fits: Sequence[int] = ()):
    """Process 0 reports to the launch script that a fault may start the run again, `limit` times; 0: nothing.

    `folder` is the run's, `fits` are smaller numbers of processes with which it may continue.
    """
    if (file := os.environ.get("TRAINIT_RUN_FILE")) and limit and place.process_id == 0:
        report = {"limit": limit, "folder": str(folder.absolute()), "processes": place.num_processes}
        report["fits"] = list(fits)
        _write(Path(file), report)


def report_fault(code: int, text: str, stop: str):
    """Reports to the launch script why a job ends, unless another process has done so already.

    `code` is the exit code of all. `stop` is why somebody wants it to stop, or "".
    """
    if file := os.environ.get("TRAINIT_RUN_FILE"):
        with contextlib.suppress(OSError), Path(f"{file}.fault").open("x") as stream:
            stream.write(json.dumps({"code": STOPPED if stop else code, "text": text}))


def _read(path: Path) -> dict:
    """What is in a file, as far as it can be read."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _write(path: Path, content: dict):
    path.with_name(f"{path.name}.tmp").write_text(json.dumps(content))
    path.with_name(f"{path.name}.tmp").replace(path)


def _last_step(folder: str) -> str:
    """The step of the last line of a run's metrics, "none" without one."""
    with contextlib.suppress(OSError):
        lines = Path(folder, "metrics.jsonl").read_text(errors="replace").splitlines()
        if lines and (match := re.search(r'"step": (\d+)', lines[-1])):
            return match[1]
    return "none"


def main(result: str, all_hosts: str = "", now: str = "") -> int:
    """Answers a launch script."""
    file, hosts, answering = Path(os.environ["TRAINIT_RUN_FILE"]), all_hosts.split(), now.split()
    path = file.with_name(f"{file.name}.history")
    wanted = int(os.environ.get("TRAINIT_NODES") or len(hosts))
    history, run, fault = History(**_read(path)), _read(file), _read(Path(f"{file}.fault"))
    if result == "start":
        history.used = choose(hosts, answering, wanted, run, history)
        decision = Decision(AGAIN, history.used)
        if not history.used:
            few = (
                f"{wanted} hosts are needed, and {', '.join(history.bad())} of this job's have failed before"
            )
            decision = Decision(QUEUE, history.bad(), [few])
    else:
        step = _last_step(run.get("folder", ""))
        decision = decide(int(result), hosts, answering, wanted, run, fault, step, history)
    _write(path, asdict(history))
    for line in decision.lines:
        sys.stderr.write(f"restart    {line}\n")
    sys.stdout.write(f"{' '.join(decision.hosts)}\n")
    return decision.code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
