"""What this process does to itself: its streams, memory, signals, its end. All tricks are here and in tuning.

Each says what breaks without it and when it may go. JAX, which takes seconds, is imported in functions only.
"""

import ctypes
import errno
import io
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from absl import logging
from tqdm import tqdm

from trainit.config.exit_codes import DONE, STOPPED, USAGE

# These ask the run to stop: it saves, and exits with a code that means "start me again". SIGHUP comes when
# the terminal is closed; under nohup it is ignored.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class _Output:
    """A stream of this process that its reader may leave: from then on what is written is dropped."""

    def __init__(self, stream: TextIO, lasting: bool) -> None:
        """Unless the process is `lasting`, what else goes wrong with the stream is an error."""
        self._stream, self._lasting = stream, lasting
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks letters ends nothing either
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes text, if somebody can read it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hands on what was written, if somebody can read it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable) -> None:
        try:
            action()
        except OSError as error:  # also of a full disk: no message is worth the run
            is_closed = error.errno in (errno.EPIPE, errno.EIO)  # a pipe or terminal
            if is_closed or not self._lasting:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not is_closed and not self._lasting:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers(lasting: bool = True):
    """Lets this process write on when nobody reads its output any more, as behind `| head` or a closed ssh.

    Without it, the next message would end a run. Log files have everything. A process that is `lasting`, as a
    run is, also survives a full disk under its output; other commands' output is what they are for.
    """
    # Numbers of streams that were closed before the start would be those of the next files.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    streams = [stream or os.fdopen(n, "w") for n, stream in ((1, sys.stdout), (2, sys.stderr))]
    sys.stdout, sys.stderr = (_Output(stream, lasting) for stream in streams)  # type: ignore[assignment]


def release_free_memory():
    """Gives free memory back to the system, if the C library can: a compiler leaves some hundred MB."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def block_stop_signals():
    """Makes stop signals wait, for this thread and all that it starts, until a JobMonitor handles them.

    Without it, a signal that arrives during the imports, which take seconds, would end the process unsaved.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def start_of(pid: int) -> str:
    """When a process of this host was started, in the kernel's ticks; "" if it is not alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else ""
    except OSError:
        return ""


def age() -> float:
    """Seconds since the kernel started this process; on systems without /proc, its processor time."""
    if not (ticks := start_of(os.getpid())):
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


class Launcher:
    """The process that has started this one and waits for its end: launch/local.sh or a sweep.

    It gives its number in TRAINIT_LAUNCHER. If it is killed by a signal that no process can handle, nobody
    passes signals on or sees the exit code any more, and who starts the same again finds the folder held.
    """

    def __init__(self):
        """Takes the variable out of the environment: what this process starts has another launcher."""
        self._pid = int(os.environ.pop("TRAINIT_LAUNCHER", "0"))

    def is_gone(self) -> bool:
        """Whether there was one, and it has ended. The parent may also be a script between the two."""
        return bool(self._pid) and os.getppid() != self._pid and not start_of(self._pid)


class SignalInbox:
    """Stop signals as something that a thread can wait for and read, even while the main thread compiles.

    Python runs signal handlers in the main thread alone, between two of its instructions, and one of them
    may compile for minutes, until the scheduler's patience ends. But it writes each signal's number to a
    socket at once.
    """

    def __init__(self):
        """Takes the signals from here on. To be made by the main thread, which `unblock` does not concern."""
        self.socket, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._interrupted: float | None = None  # when SIGINT last came
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        # Data workers, and whatever else the main thread starts, inherit these signals blocked.
        block_stop_signals()

    def unblock(self):
        """Lets signals come to the thread that calls this: the one that reads."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def wake(self):
        """Makes the socket readable without a signal. Any thread may call it."""
        self._wakeup.send(b"\0")

    def read(self) -> tuple[bool, list[str]]:
        """Whether `wake` was called, and the signals' names. A second SIGINT ends the process."""
        numbers = self.socket.recv(64)
        if signal.SIGINT in numbers:
            # A launcher may pass on, at once, what the terminal has sent as well: that is no second one.
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > 1:
                os._exit(130)
            self._interrupted = now
        return 0 in numbers, [signal.Signals(number).name for number in numbers if number in STOP_SIGNALS]


def delay_abort():
    """Delays JAX's abort() by six seconds, in which the monitor can report which process was lost.

    JAX calls abort() when it loses process 0. SIGABRT is number 6, so C's sleep as its handler takes six
    seconds. A handler in Python would run in the main thread, which waits inside of a collective. May go when
    JAX has a setting for this; its guide to fault tolerance says that none changes it for process 0.
    """
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), libc.sleep)


def coordination_client() -> Any:
    """The client of JAX's coordination service, whose barrier has no public name as of JAX 0.12."""
    # The public barriers are collectives, which give up after a time of their own, while another compiles.
    from jax._src import distributed

    return distributed.global_state.client


def end_with_parent(*_: Any):
    """Ends this worker process as soon as its parent has ended, even by kill -9. Returns at once.

    Without it, workers of a killed process wait forever and keep their memory. The arguments are ignored;
    Grain calls this with the worker's number.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only worker processes have a parent to end with"

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


class Exit:
    """Ends this process, and reports to the launch script how, by files, since schedulers merge exit codes.

    The file TRAINIT_MARKER: stopped on request, and saved. TRAINIT_MARKER.failed: a process failed.
    """

    def __init__(self, lead: bool) -> None:
        self._lead, self._marker = lead, os.environ.get("TRAINIT_MARKER", "")
        self.release_lock: Callable[[], None] | None = None  # of the run's folder

    def __call__(self, code: int, together: bool = False) -> NoReturn:
        """`exit_process`, with what the script and other jobs look at."""
        if self._marker and code == STOPPED and self._lead:
            Path(self._marker).touch()
        elif self._marker and code not in (DONE, STOPPED):
            Path(f"{self._marker}.failed").touch()
        if self.release_lock and code in (DONE, STOPPED, USAGE):
            self.release_lock()
        exit_process(code, together)


def exit_process(code: int, together: bool = False) -> NoReturn:
    """Ends this process at once, or, if all leave `together` and none is lost, when the others end, too."""
    import jax

    if together and jax.process_count() > 1:
        jax.distributed.shutdown()
    for worker in multiprocessing.active_children():
        worker.kill()
    if any(not bar.disable for bar in getattr(tqdm, "_instances", ())):
        sys.stderr.write("\n")  # the shell's prompt gets a line of its own
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
