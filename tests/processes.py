"""Starts Trainit as users do: as processes."""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jaxlib

ROOT = Path(__file__).parent.parent
# XLA_FLAGS of the tests' own process and of those that it starts: compiles in a third of the time, to slower
# programs. Where a run must be what a user's is, a test gives XLA_FLAGS="".
FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.__version__.startswith("0.10."):  # later ones do not know the flag, and end at once
    FAST += " --xla_cpu_use_fusion_emitters=false"
# For runs in which the mesh is not looked at: two devices, for which programs take two thirds of the time.
TWO = "--config.cpu_devices=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"
# With the tests' usual rate of 1e-2, rounding grows to percents in some 150 steps; with this one it does not.
SMOOTH = "--config.optimizer.learning_rate=1e-3"


def start(*args: str, command: str = "", module: str = "", **environment: str) -> subprocess.Popen:
    """Starts a process in the repository's root; its output is text, both streams in one.

    Args:
        args: its arguments.
        command: of `trainit`; empty: train, by python -m trainit.main.
        module: what to start instead.
        environment: variables to add.
    """
    words = [module] if module else ["trainit", command] if command else ["trainit.main"]
    return subprocess.Popen(
        [sys.executable, "-m", *words, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
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


IMPORTED = """
import importlib, json, os, runpy, signal, sys
from trainit import __main__, main
from trainit.cluster.process import block_stop_signals
from trainit.config import command_line
begin = importlib.import_module(sys.argv[1]).begin if sys.argv[1:] else lambda: None
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    arguments, command, module, environment, output, end = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (command or module):
        block_stop_signals()  # before the fork, whose own hooks would swallow a KeyboardInterrupt
    if child := os.fork():
        print(child, flush=True)
        os.write(os.open(end, os.O_WRONLY), b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    begin()
    sys.argv = [module or command or "trainit.main", *arguments]
    if module:
        runpy.run_module(module, run_name="__main__")
        sys.exit()
    if command:
        sys.argv.insert(0, "trainit")
        sys.exit(__main__.main())
    main.run(command_line.parse_or_exit(command_line.train_parser("python -m trainit.main")))
"""


@functools.cache
def imported(hooks: str = "", path: str = "", preload: str = "") -> tuple[subprocess.Popen, threading.Lock]:
    """A process that has imported Trainit and forks for each `Fork`, and what one of these at a time holds.

    `hooks` is a module of the folder `path`, whose `begin` each fork calls first; `preload` is a library.
    """
    more = {"PYTHONPATH": f"{path}:{ROOT}", "LD_PRELOAD": preload} if hooks else {}
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTED, *[hooks] * bool(hooks)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.kill)
    return process, threading.Lock()


class Fork:
    """What `start` begins, in a fork of a process that has imported Trainit: two seconds less.

    It has what tests want of a subprocess.Popen. server: what `imported` takes. environment: what is read as
    Python starts, such as PYTHONPATH, comes too late.
    """

    def __init__(
        self, *args: str, command: str = "", module: str = "", server: tuple = (), **environment: str
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._output, self._end = (Path(self._folder.name) / name for name in ("output", "end"))
        self._output.touch()
        self._end.touch()
        process, lock = imported(*server)
        request = [[*map(str, args)], command, module, environment, str(self._output), str(self._end)]
        with lock:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            self.pid, self.returncode = int(process.stdout.readline()), None

    def poll(self) -> int | None:
        if self.returncode is None and (code := self._end.read_text()):
            self.returncode = int(code)
        return self.returncode

    def send_signal(self, number: int):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    kill = functools.partialmethod(send_signal, signal.SIGKILL)

    def communicate(self, timeout: float = 180) -> tuple[str, None]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("trainit.main", timeout, self._output.read_bytes())
            time.sleep(0.005)
        return self._output.read_text(), None


def run_imported(*args: str, expect: int = 0, **environment: str) -> str:
    """As `run`, in a `Fork`."""
    return end(Fork(*args, **environment), expect)


def launch(count: int, *args: str, terminal: int = -1, **environment: str) -> subprocess.Popen:
    """launch/local.sh with `count` processes; its output is text, all streams of all processes in one.

    Given a terminal's file descriptor, all of that is there instead, and its end hangs them up.
    """
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    command: list = [ROOT / "launch/local.sh", "-n", str(count), *map(str, args)]
    if terminal >= 0:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        command = ["setsid", "--ctty", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        },
        **streams,
        text=True,
    )


def end(process: subprocess.Popen, expect: int | None, timeout: float = 180) -> str:
    """Waits for the end of a process, checks its exit code (None: a failure), and returns its output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        (os.killpg if os.getpgid(process.pid) == process.pid else os.kill)(process.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end in {timeout} s:\n{(error.output or b'').decode()}") from None
    right = process.returncode not in (0, 75) if expect is None else process.returncode == expect
    assert right, f"exit code {process.returncode}:\n{output}"
    return output


def pid_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process with this number among the children of launch/local.sh."""
    for child in with_variable(f"TRAINIT_PROCESS_ID={rank}", "-P", str(launcher.pid)):
        return child
    raise AssertionError(f"no process {rank}")


def started_again(launcher: subprocess.Popen, rank: int, before: int) -> bool:
    """Whether the process with this number is another one than before."""
    with contextlib.suppress(AssertionError):  # there is none
        return pid_of(launcher, rank) != before
    return False


def environments(*of_pgrep: str) -> dict[int, bytes]:
    """Those of the processes that pgrep finds, with which they were started."""
    found = {}
    # With exit code 1 it says that there are none.
    for pid in subprocess.run(
        ["pgrep", *of_pgrep], capture_output=True, text=True, check=False
    ).stdout.split():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            found[int(pid)] = Path(f"/proc/{pid}/environ").read_bytes()
    return found


def with_variable(variable: str, *of_pgrep: str) -> list[int]:
    """The processes that pgrep finds and whose environment has NAME=VALUE."""
    found = environments(*of_pgrep).items()
    return [pid for pid, environment in found if variable.encode() in environment.split(b"\0")]


def last_step(workdir: Path) -> int:
    """The step of the last line of metrics.jsonl; -1 if there is none, or it is damaged."""
    path = workdir / "metrics.jsonl"
    # Without the line that is just being written.
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
    found = re.search(r'"step": (\d+)', lines[-1]) if lines else None
    return int(found[1]) if found else -1


def last_saved_is_last_logged(workdir: Path) -> bool:
    """Whether the newest checkpoint is of the last step in metrics.jsonl.

    It is of one step more if it has that step's record, whose validation is left to the job that continues.
    """
    from trainit.checkpoints.store import CheckpointStore

    checkpoints = CheckpointStore(workdir, read_only=True)
    newest = checkpoints.steps()[-1]
    return newest == last_step(workdir) + bool(checkpoints.meta(newest)["postponed"])


def saving(workdir: Path) -> bool:
    """Whether a save is under way: until it is complete, Orbax gives its folder another name."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Waits for the condition while the process lives; whether it came true."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives to connections meanwhile."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("localhost", random.randrange(20_000, 32_000)))
            return s.getsockname()[1]


def on_a_terminal(code: str, columns: int, close_at: bytes = b"") -> tuple[int, str]:
    """Exit code and screen of Python code on a terminal, which is closed when it has shown `close_at`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=slave, env=environment)
    os.close(slave)
    screen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        screen += part
        if not part or (close_at and close_at in screen):
            break
    os.close(master)
    return process.wait(60), screen.decode()


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def exact(records: list[dict]) -> list[dict]:
    """What must be the same, bit for bit, on the same devices: everything but times and memory."""
    changing = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in record.items() if not k.startswith(changing)} for record in records]


def assert_same_but_for_rounding(records: list[dict], expected: list[dict], rel: float = 2e-4):
    """The same steps and tokens, and losses and gradients that differ by the order of sums alone."""
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    for a, b in zip(records, expected, strict=True):
        assert a["tokens"] == b["tokens"]
        for name in ("train/loss", "valid/loss", "train/grad_norm"):
            if name in b:
                assert abs(a[name] / b[name] - 1) < rel, (a["step"], name, a[name], b[name])
