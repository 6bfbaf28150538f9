"""Starts Trainit as users do: as processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(*args: str, module: str = "trainit.main", **environment: str) -> subprocess.Popen:
    """A process `python -m MODULE ARGS` in the repository's root; its output is text, both streams in one."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "COLUMNS": "100", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*args: str, expect: int = 0, timeout: float = 180, **environment: str) -> str:
    """Runs trainit.main to its end, checks its exit code, and returns its output."""
    process = start(*args, **environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == expect, f"exit code {process.returncode} instead of {expect}:\n{output}"
    return output


def run_many(count: int, *args: str, expect: int = 0, timeout: float = 180) -> list[str]:
    """Runs `count` processes of one job; each one's output."""
    where = f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"
    processes = [start(*args, *where, f"--process_id={i}") for i in range(count)]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [expect] * count, f"exit codes {codes} instead of {expect}:\n" + "\n---\n".join(outputs)
    return outputs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def exact(records: list[dict]) -> list[dict]:
    """What must be the same, bit for bit, on the same devices: everything but times and memory."""
    changing = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(changing)} for record in records]
