"""Runs under random faults: each is struck again and again until it is done, and compared with a calm one.

test_faults.py says how to run them. The seed and the number of a run decide what is drawn. How fast the
machine is decides when exactly a fault strikes, and so, where a job ends earlier or later, what comes next.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path

from processes import ROOT, exact, last_step, saving
from struck_job import CONNECTED, LIMIT_SECONDS, LISTENS, Job, check, tcp_sockets

from trainit.checkpoints import digests
from trainit.prepare.verify import verify

STEPS = 48
LAST_STEPS = 8  # a run may complete although it was asked to stop: a process hears it while others continue
SILENCE_SECONDS = 7
REST_SECONDS = 300  # for all steps that are left, which no fault disturbs
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # number of processes: data and fsdp
MOMENTS = ("start", "step", "validation", "save", "exit")
STOPS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2")
DAMAGES = ("flipped byte", "truncated file", "deleted file")
OF_SEVERAL = ("lost connection", "stranger at the port")  # one process has no connection, and no port
PASSING = ("SIGSTOP short", "slow disk", "clock set back", "stranger at the port")  # the job continues
KINDS = ("SIGKILL", "SIGSTOP long", "lost connection", "full disk", *STOPS, *DAMAGES, *PASSING)
STRANGERS = 20


class DoneError(Exception):
    """The run was done before the fault could strike."""


class LateError(Exception):
    """The job had ended, with these exit codes, before the fault could strike: the run has to continue."""


class Run:
    """A run of `count` processes in a folder, which is struck by faults, and the draw that they come from."""

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        count: int,
        server: tuple,
        seed: object,
        impossible: Collection[str] = (),
    ):
        """`impossible` are kinds that this machine does not allow."""
        self.folder, self.count, self.server, self.draw = folder / "run", count, server, random.Random(seed)
        self.dataset, self.pages, self.ballast = folder / "data", folder / "pages", folder / "ballast"
        shutil.copytree(dataset, self.dataset)
        self.pages.mkdir()
        data, fsdp = MESHES[count]
        self.arguments = [
            *(f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={self.dataset}"),
            *(f"--workdir={self.folder}", f"--config.steps={STEPS}", "--config.cpu_devices=1"),
            *(f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", "--config.mesh.tensor=1"),
            *("--config.device_batch_size=0", "--config.eval.every_steps=4", "--config.eval.sequences=32"),
            *(f"--silence_seconds={SILENCE_SECONDS}", "--wait_seconds=12"),
        ]
        self.kinds = [kind for kind in KINDS if kind not in impossible]
        if count == 1:
            self.kinds = [kind for kind in self.kinds if kind not in OF_SEVERAL]
        self.job: Job | None = None
        self.is_whole = True  # whether metrics.jsonl has whole lines only, and of the right data
        self.starts: list[float] = []  # seconds of each, from its launch to the end of its first step

    def launch(self, *more: str) -> Job:
        # The line of a checkpoint's own step may wait for its validation: it is no step of this start.
        begun_at = max(last_step(self.folder), self.newest())
        self.job = Job([*self.arguments, *more], self.count, self.server, self.pages, begun_at)
        return self.job

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl, without what a killed process has not written to the end."""
        lines = (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]
        return exact([json.loads(line) for line in lines])

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        names = [path.name for path in (self.folder / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def go(self, faults: int, calm: list[dict], report: Callable[[dict], None]):
        """Strikes the run this many times, lets it end, and compares all that it has written."""
        deck: list[str] = []
        made, result, before = 0, {}, {}
        try:
            while made < faults:
                deck = deck or self.draw.sample(self.kinds, len(self.kinds))
                # Starts come after faults that end the job alone: they are drawn more often there.
                moment = self.draw.choice(("start", *MOMENTS) if self.job is None else MOMENTS[1:])
                result = before | {"kind": deck.pop(), "moment": moment, "processes": self.count}
                try:
                    self.strike(result["kind"], result["moment"], result)
                except DoneError:
                    break
                except LateError as late:
                    before |= {"before": late.args[0]}
                    deck.append(result["kind"])
                    self.job = None
                    continue
                self.is_whole &= result["kind"] not in ("full disk", *DAMAGES)
                if self.job is None and self.is_whole:
                    self.compare(calm)
                made, before = made + 1, {}
                report(result)
            result = {"kind": "the end", "moment": "", "processes": self.count}
            self.finish(calm)
        except Exception as error:
            if self.job:
                self.job.kill()
            report(result | {"failed": f"{error!r}\n{self.job.output() if self.job else ''}"})
        finally:
            if self.job:
                self.job.kill()

    def finish(self, calm: list[dict]):
        """Lets the run complete, and checks that all of it is there."""
        while True:
            try:
                job = self.job if self.job and not self.job.poll() else self.launch()
                self._ended(job, REST_SECONDS)
            except LateError:
                self.job = None
            except DoneError:
                break
        self.compare(calm)
        steps = [record["step"] for record in self.records()]
        check(steps == list(range(STEPS + 1)), f"the steps are {steps}")
        check(
            digests.problems(self.folder / f"checkpoints/{STEPS}") == [], "the last checkpoint is not whole"
        )
        check(not (self.folder / "lock.json").exists(), "the folder is still locked")

    def compare(self, calm: list[dict]):
        """Checks that no step is lost, doubled or other than in the calm run."""
        if (self.folder / "metrics.jsonl").exists():
            for number, (record, expected) in enumerate(zip(self.records(), calm, strict=False)):
                check(record == expected, f"line {number} is {record}, and in the calm run {expected}")

    # What a job does.

    def _steps_are_done(self, job: Job, count: int = 1):
        """Waits until a job has done this many steps from now on; raises as `_ended` if it ends before."""
        before = last_step(self.folder) if job.has_stepped else job.begun_at

        def do(steps: int):
            if not job.wait_until(lambda: last_step(self.folder) >= before + steps, "no step is done"):
                self._ended(job)

        do(1)
        if not job.has_stepped:
            job.has_stepped = self.is_whole = True
            self.starts.append(round(time.monotonic() - job.launched, 1))
        do(count)

    def _ended(self, job: Job, seconds: float = LIMIT_SECONDS):
        """Waits for the end of a job. Raises DoneError if the run is done, else LateError."""
        codes = job.wait(seconds)
        self._check_end(job, codes)
        raise DoneError if set(codes) == {0} else LateError(codes)

    def _check_end(self, job: Job, codes: list[int], more: Collection[int] = ()):
        """Checks that all exit codes are honest, and such as what has been done to the job can cause."""
        what, output = f"exit codes {codes}", job.output()
        check(not job.was_ended, f"{what}: some had to be killed long after another one had failed")
        may_fail = time.monotonic() < job.may_fail_until
        wanted = {1, *more} if may_fail else set(more)
        # Asked to stop, a run completes only where its last steps were done while the request was on its way.
        if job.asked_at is not None:
            wanted |= {75}
        if job.asked_at is None or job.asked_at >= STEPS - LAST_STEPS:
            wanted |= {0}
        # JAX aborts a process whose connection to its coordination service is cut.
        if may_fail and "the JAX distributed service detected fatal errors" in output:
            wanted |= {-signal.SIGABRT} if job.is_cut else set()
        for rank, code in enumerate(codes):
            was_killed = code == -signal.SIGKILL and rank == job.killed
            check(code in wanted or was_killed, f"{what}; asked to stop at step {job.asked_at}")
        check(may_fail or len(set(codes)) == 1, what)
        last, newest = last_step(self.folder), self.newest()
        if 0 in codes:
            check(last == newest == STEPS, f"{what}, but metrics to step {last}, a checkpoint of {newest}")
        if 75 in codes:
            is_saved = newest >= last or last <= job.begun_at
            check(is_saved, f"{what}, but metrics to step {last}, a checkpoint of {newest}")
        if 2 in codes:
            check("No space left on device" in output, what)

    # Faults.

    def strike(self, kind: str, moment: str, result: dict):
        """One fault, and what has to become of it: AssertionError if it does not. DoneError, LateError."""
        result |= {"rank": (rank := self.draw.randrange(self.count))}
        job = self.job or (None if kind in DAMAGES and moment == "start" else self.launch())
        if job:
            self._reach(job, moment, kind)
            if job.processes[rank].poll() is not None:
                self._ended(job)
        result |= {"step": max(last_step(self.folder), 0)}
        struck, more = time.monotonic(), ()
        try:
            if kind in DAMAGES:
                self._damage(job, kind, result)
            elif kind in STOPS:
                job.ask_to_stop(rank, signal.Signals[kind], result["step"])
                job.wait()
                result |= {"stopped": self.newest()}
            elif kind == "SIGKILL":
                self._sigkill(job, rank, result)
            else:
                more = (2,) if kind == "full disk" else ()
                if (kind not in PASSING and self.count > 1) or kind == "full disk":
                    job.may_fail()
                getattr(self, "_" + re.sub(r"\W", "_", kind.lower()))(job, rank)
                self._goes_on(job)
            if kind not in DAMAGES and (codes := job.poll()):
                self._check_end(job, codes, more)
                if kind == "SIGKILL" and codes[rank] != -signal.SIGKILL:
                    raise LateError(codes)
        finally:
            result |= {"seconds": round(time.monotonic() - struck, 1), "start": (self.starts or [0])[-1]}
        if self.job and (codes := self.job.poll()):
            result |= {"codes": codes}
            self.job = None

    def _reach(self, job: Job, moment: str, kind: str):
        """Waits until the job has come to a moment of this kind."""
        if moment == "start":
            # Strangers come while the processes meet, which they do at the beginning.
            longest = 0.5 if kind == "stranger at the port" else 1.1 * (self.starts or [4.0])[-1]
            until = time.monotonic() + self.draw.uniform(0, longest)
            while time.monotonic() < until and last_step(self.folder) <= job.begun_at:
                time.sleep(0.01)
            return
        self._steps_are_done(job, self.draw.randrange(1, 4))
        if moment == "exit":
            rank = self.draw.randrange(self.count)
            job.ask_to_stop(rank, signal.SIGTERM, last_step(self.folder))
        conditions: dict[str, Callable[[], bool]] = {
            "step": lambda: True,
            "validation": lambda: any(page.get("validating") for page in job.pages),
            "save": lambda: saving(self.folder),
            "exit": lambda: any(page.get("leaving") for page in job.pages),
        }
        longest = {"step": 0.1, "validation": 0.03, "save": 0.03, "exit": 0.1}[moment]
        if not job.wait_until(conditions[moment], f"no {moment}"):
            self._ended(job)
        time.sleep(self.draw.uniform(0, longest))

    def _goes_on(self, job: Job):
        """Waits until a fault has ended the job, or the job has done two more steps."""
        begun = max(last_step(self.folder), 0)
        job.wait_until(
            lambda: last_step(self.folder) >= min(begun + 2, STEPS),
            f"neither an end nor a step after {begun}",
        )
        for page in job.pages:
            page.set("write_milliseconds", 0)

    def _sigkill(self, job: Job, rank: int, result: dict):
        """The others have to end, too, and to report which one was killed."""
        job.may_fail()
        job.killed = rank
        job.processes[rank].kill()
        codes = job.wait()
        is_midway = result["moment"] not in ("start", "exit") and result["step"] < STEPS - LAST_STEPS
        if is_midway and self.count > 1:
            named = rf"process {rank} \([^)]*pid {job.processes[rank].pid}\) is gone"
            check(re.search(named, job.output()), f"exit codes {codes}; process {rank} was killed, not named")

    def _sigstop_short(self, job: Job, rank: int):
        job.suspend(rank, self.draw.uniform(0.1, 2))

    def _sigstop_long(self, job: Job, rank: int):
        """Long enough for the others to take it for lost; when it comes back, it has to end, too."""
        job.suspend(rank, self.draw.uniform(SILENCE_SECONDS + 1, SILENCE_SECONDS + 3))

    def _lost_connection(self, job: Job, rank: int):
        """Shuts one of a process's TCP connections down."""

        def shut_one() -> bool:
            found = tcp_sockets(job.processes[rank].pid, CONNECTED)
            return bool(found) and self.draw.choice(found).shut_down()

        job.is_cut = job.wait_until(shut_one, "no connection")

    def _full_disk(self, job: Job, rank: int):
        with self.ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        try:
            until = time.monotonic() + self.draw.uniform(0.3, 5)
            while time.monotonic() < until and not job.poll():
                time.sleep(0.02)
        finally:
            self.ballast.unlink()

    def _slow_disk(self, job: Job, rank: int):
        job.pages[rank].set("write_milliseconds", self.draw.randrange(10, 100))

    def _clock_set_back(self, job: Job, rank: int):
        job.pages[rank].set("clock_back_seconds", self.draw.choice((1, 60, 3600, 86_400)))

    def _stranger_at_the_port(self, job: Job, rank: int):
        """Connections, silent or with nonsense, to all ports at which any process of the job listens."""
        held: list[socket.socket] = []

        def come() -> bool:
            for process in job.processes:
                for door in tcp_sockets(process.pid, LISTENS):
                    with contextlib.suppress(OSError):
                        held.append(socket.create_connection(door.address, timeout=1))
                        if len(held) % 2:
                            text = self.draw.choice((b"GET / HTTP/1.0\r\n\r\n", self.draw.randbytes(100)))
                            held[-1].sendall(text)
            return len(held) >= STRANGERS

        job.wait_until(come, "nobody listens")
        time.sleep(0.5)
        for connection in held:
            connection.close()

    def _damage(self, job: Job | None, kind: str, result: dict):
        """Damages a file, as when a host goes down: the next start has to notice, and to get over it."""
        saved = self.newest()
        checkpoint, metrics = self.folder / "checkpoints" / str(saved), self.folder / "metrics.jsonl"
        files = {
            "shard": sorted(self.dataset.glob("train-*.tokens")),
            "checkpoint": [path for path in sorted(checkpoint.rglob("*")) if has_digest(path)],
            "metrics": [metrics],
        }
        target = self.draw.choice(list(files) if saved else ["shard"])
        path = self.draw.choice(files[target])
        result |= {"file": path.name if target != "checkpoint" else str(path.relative_to(checkpoint.parent))}
        good = path.read_bytes()
        spoil(path, kind, self.draw)
        output = ""
        if job:
            time.sleep(self.draw.uniform(0, 0.2))
            job.kill()
            job.wait()
            output = job.output()
        if target == "metrics":
            return self._damaged_metrics(good, saved, output)
        if target == "checkpoint" and self.newest() != saved:  # the job has just completed another one
            result["file"] += ", of the newest but one"
            check(not checkpoint.exists() or digests.problems(checkpoint), f"nobody notices {kind} in {path}")
            if path.parent.exists():
                path.write_bytes(good)
            return None

        codes = (job := self.launch()).wait()
        if target == "shard" and 0 in codes:  # it was done before it had compared all shards
            result["file"] += ", seen by trainit verify"
            check(any(verify(self.dataset)), f"nobody notices {kind} in {path}")
        else:
            check(set(codes) == {2}, f"exit codes {codes} after {kind} in {path}")
            check(path.name in output + job.output(), f"nobody has named {path}")
        older = [int(p.name) for p in checkpoint.parent.glob("*") if p.name.isdecimal()]
        if target == "checkpoint" and min(older) < saved and self.draw.random() < 0.5:
            job = self.launch("--config.checkpoint.fallback=True")
            with contextlib.suppress(DoneError):
                self._steps_are_done(job)
            return None
        path.write_bytes(good)
        for step in older if target == "shard" else ():  # what was trained on it since
            if step > saved:
                shutil.rmtree(checkpoint.parent / str(step))
        return None

    def _damaged_metrics(self, good: bytes, saved: int, output: str):
        """Lines that the checkpoint has must be found missing. Those after it are written again, anyway."""
        path, log = self.folder / "metrics.jsonl", self.folder / "logs/process_0.log"
        left = path.read_bytes().splitlines() if path.exists() else []
        whole = good[: good.rindex(b"\n")].splitlines()
        lines = [line for line in whole if json.loads(line)["step"] < saved]
        before, damaged = log.read_text().count(" lacked "), inode(path)
        job = self.launch()
        job.begun_at = max(saved, json.loads(whole[-1])["step"])
        with contextlib.suppress(DoneError):
            # Until the job has written the file again, its last line may have any number.
            if not job.wait_until(lambda: inode(path) not in (damaged, None), "no other metrics.jsonl"):
                self._ended(job)
            self._steps_are_done(job)
        noticed = " lacked " in output or log.read_text().count(" lacked ") > before
        check(noticed or set(lines) <= set(left), f"nobody notices damaged lines up to step {saved}")


def inode(path: Path) -> int | None:
    """The number of a file, which changes when it is replaced; None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def spoil(path: Path, kind: str, draw: random.Random):
    """Flips a bit of a file, cuts it off, or deletes it."""
    content = bytearray(path.read_bytes())
    if kind == "deleted file":
        path.unlink()
    elif kind == "truncated file":
        os.truncate(path, draw.randrange(len(content)))
    else:
        # Orbax adds the time of the end when the digests are made; nothing reads it.
        time_of_end = re.search(rb'"commit_timestamp_nsecs":\s*\d+', content)
        without = range(*time_of_end.span()) if path.name == digests.ORBAX_METADATA and time_of_end else ()
        at = draw.choice([at for at in range(len(content)) if at not in without])
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << draw.randrange(8)]))


def has_digest(path: Path) -> bool:
    """Whether a file of a checkpoint is one that is compared: all are that anything reads."""
    return path.is_file() and path.name != digests.LATE and path.stat().st_size > 0
