"""One run over all that has to be known of a GPU, in a few minutes, which ends with a table.

    trainit benchmark --suite=gpu --minutes=8

Everything runs in processes of their own, one at a time, since a process with JAX takes the GPU's memory. A
part that fails, or takes longer than its share of the minutes, is a row of the table that says so. Without
an NVIDIA GPU, all parts run on the CPU in a tiny size, which shows that they work, and nothing else.
"""

import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

from tabulate import tabulate

import trainit
from trainit.cluster import hardware
from trainit.cluster.files import describe_os_error, write_atomically
from trainit.config import ConfigError, require
from trainit.config.exit_codes import DONE, FAILED
from trainit.experiments.compare.runs import read
from trainit.tools.benchmark import card_parts, children, contender, suite
from trainit.tools.benchmark.card_parts import judged

# The parts in their order, what matters most first, and the seconds of eight minutes that each may take.
PARTS = {
    **{"product": 20, "124M": 95, "1.3B": 125, "attention": 45, "run": 45},
    **{"plan": 30, "float8": 30, "350M": 90},
}
TOO_MANY = ("1.3B", "350M")  # without a GPU, since one size stands for all
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
GOALS = {"124M": (0.5, 1.15), "1.3B": (0.6, None)}  # MFU; times the speed of torch.compile
STEPS = 20  # after the first
HEADER = ["part", "what", "measured", "compared", "goal"]
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "torch")
RIVALS = "torch", "transformers"
CONFIG = Path(trainit.__file__).parents[1] / "configs" / "debug.py"
TINY_RUN = ["--debug", "--config.cpu_devices=1", "--config.batch_size=4", "--config.device_batch_size=0"]
TINY_RUN += ["--config.model.num_blocks=1", "--config.eval.every_steps=0"]


def share(seconds: float, weights: Sequence[float]) -> float:
    """Returns how many of the seconds left the first of these parts may take."""
    return max(seconds, 0.0) * weights[0] / sum(weights)


class Card:
    """The parts, on one GPU or, for tests, on a CPU."""

    def __init__(self, kind: str, minutes: float, rounds: int, output: Path, folder: Path):
        self.kind, self.minutes, self.rounds, self.output, self.folder = kind, minutes, rounds, output, folder
        own = [f"Trainit {trainit.__version__}", f"Python {platform.python_version()}"]
        others = [f"{one.name} {one.version}" for one in metadata.distributions() if one.name in PACKAGES]
        self.versions = ", ".join([*own, *sorted(others)])
        self.rows: list[list[str]] = []
        self.failed = False
        self.found: dict[str, dict] = {}  # Trainit's steps by size: `joined`
        self.part, self.deadline = "", 0.0  # of what runs
        # Of several GPUs, the first. Programs that were compiled for one part serve the next.
        first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        self.settings = {
            **({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": first} if kind else ON_CPU),
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch",
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
            "JAX_TRACEBACK_FILTERING": "off",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.parts: dict[str, Callable] = {size: partial(self._size, size) for size in contender.SHAPES}
        self.parts |= {name: partial(self._rows, name, "124M") for name in ("product", "attention")}
        self.parts |= {"run": self._run, "plan": self._plan, "float8": self._float8}

    def measure(self) -> int:
        """Runs all parts; returns the exit code. The file has what is known after each of them."""
        end = time.monotonic() + 60 * self.minutes
        names = [name for name in PARTS if self.kind or name not in TOO_MANY]
        for index, self.part in enumerate(names):
            self._write()
            now = time.monotonic()
            self.deadline = now + share(end - now, [PARTS[name] for name in names[index:]])
            self._attempt("", self.parts[self.part])
        self._write()
        print(f"\n{self.text()}\nwritten to {self.output}{', errors to .log' * self.failed}", flush=True)
        return FAILED if self.failed else DONE

    def text(self) -> str:
        """Returns the table with card, versions and command, in Markdown."""
        about = self.kind or "No GPU: a CPU, in a tiny size. These figures say nothing about a GPU"
        return (
            f"{about}, {time.strftime('%Y-%m-%d')}; {self.versions}\n\n"
            f"`trainit benchmark --suite=gpu --minutes={self.minutes:g}`\n\n"
            f"{tabulate(self.rows, HEADER, 'github', disable_numparse=True)}\n"
        )

    def _write(self):
        try:
            write_atomically(self.output, self.text())
        except OSError as error:
            raise ConfigError(f"--output={self.output}: {describe_os_error(error)}") from None

    def _add(self, what: str, measured: str, compared: str = "", goal: str = ""):
        self.rows.append([cell.replace("|", "\\|") for cell in (self.part, what, measured, compared, goal)])
        print("  ".join(filter(None, self.rows[-1])), flush=True)

    def _attempt(self, what: str, measure: Callable[[], None]) -> bool:
        """Runs a part, or some of it; a failure, of whatever kind, is a row. Returns whether it went well."""
        try:
            measure()
        except Exception as error:
            self.failed = True
            with self.output.with_suffix(".log").open("a") as log:  # all that a program has said
                log.writelines([f"{self.part} {what}\n", *getattr(error, "__notes__", ())])
            self._add(what, f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}")
            return False
        return True

    def _child(self, module: str, *arguments: str, **settings: str) -> str:
        limit = self.deadline - time.monotonic()
        require(limit > 0, "no time was left for it")
        return children.run(module, *arguments, settings=self.settings | settings, limit=limit)

    def _rows(self, part: str, size: str, *arguments: str, **settings: str):
        """Adds the rows that a part of card_parts prints."""
        given = part, self._shape(size), self.kind, *arguments
        for row in json.loads(self._child(card_parts.__name__, *given, **settings)):
            self._add(*row)

    def _shape(self, size: str) -> str:
        return size if self.kind else "tiny"

    def _train(self, program: str, size: str, precision: str, runs: list[dict]):
        """Adds what a program prints: `contender`."""
        arguments = program, self._shape(size), precision, str(STEPS), str(time.time())
        runs.append(json.loads(self._child(contender.__name__, *arguments)))

    def _size(self, size: str):
        """Trainit by default and torch.compile in turn, another time if that ends in time."""
        runs: dict[str, list[dict]] = {"trainit": [], "torch_compile": []}
        absent = [name for name in RIVALS if importlib.util.find_spec(name) is None]
        programs, began = list(runs)[: 1 if absent else 2], time.monotonic()
        for turn in range(self.rounds):
            now = time.monotonic()
            if turn and self.deadline - now < (now - began) / turn:
                break
            one = {name: partial(self._train, name, size, "bfloat16", runs[name]) for name in programs}
            programs = [name for name in programs if self._attempt(name, one[name])]

        # A row for each; torch's also says how much longer its step takes.
        mfu_goal, speed_goal = GOALS.get(size, (None, None))
        step = math.nan
        if runs["trainit"]:
            run = self.found[size] = joined(runs["trainit"])
            step, (measured, compared, mfu) = run["step"], self._speed(size, run)
            goal = judged(f"{mfu_goal:.0%} MFU", mfu >= mfu_goal) if mfu_goal and mfu else ""
            self._add("Trainit's defaults", measured, compared, goal)
        if runs["torch_compile"]:
            run = joined(runs["torch_compile"])
            (measured, compared, _), ratio = self._speed(size, run), run["step"] / step
            goal = judged(f"{speed_goal:g} times", ratio >= speed_goal) if speed_goal and self.kind else ""
            self._add("torch.compile", measured, f"Trainit is {ratio:.2f} times as fast; {compared}", goal)
        if absent:
            lacking = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
            self._add("torch.compile", f"{lacking}: pip install 'trainit[rivals]'")

    def _speed(self, size: str, run: dict) -> tuple[str, str, float | None]:
        """Returns two cells of a program's row, and its MFU, if the card's peak is known."""
        name, peak = self._shape(size), hardware.peak_flops(self.kind)
        shape = contender.SHAPES[name]
        tokens = shape["batch"] * shape["context_length"] / run["step"]
        mfu = suite.flops(name) / run["step"] / peak if peak else None
        measured = f"{mfu:.1%} MFU, " if mfu else ""
        measured += f"{1e3 * run['step']:.1f} ms, {tokens:,.0f} tokens/s"
        return measured, f"{run['peak'] / 1e9:.2f} GB, step 1 after {run['first']:.1f} s", mfu

    def _run(self):
        """A run of configs/debug.py, and what follows its last checkpoint but one once more."""
        require(CONFIG.is_file(), f"{CONFIG}: there is no such file; run this from a clone")
        flags = ["train", f"--config={CONFIG}", "--config.platform=", "--config.precision=bfloat16"]
        flags += [f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "tensor")]
        flags += ["--config.log.every_steps=1", *TINY_RUN * (not self.kind)]
        first, again = (self.folder / name for name in ("first", "again"))
        self._child("trainit", *flags, f"--workdir={first}")
        step = sorted(int(path.name) for path in (first / "checkpoints").iterdir() if path.name.isdigit())[-2]
        resume = f"--config.checkpoint.load_path={first}", f"--config.checkpoint.load_step={step}"
        self._child("trainit", *flags, f"--workdir={again}", *resume)
        whole, rest = (read(folder).curve("train/loss")[-1] for folder in (first, again))
        seconds = median(read(first).curve("time/step_seconds")[0])
        losses = f"loss {whole[0]:.3f} to {whole[-1]:.3f}"
        self._add(f"{len(whole)} steps of the debug run", losses, f"{1e3 * seconds:.1f} ms a step")
        apart = max(abs(a - b) for a, b in zip(whole[step:], rest, strict=True))
        same = judged("the same, bit for bit", apart == 0)
        self._add(f"again from step {step}", f"{len(rest)} losses, {apart:g} apart at most", "", same)

    def _plan(self):
        require(bool(self.found), "no step was measured with which a plan could be compared")
        for size, run in self.found.items():
            measured = json.dumps({key: run[key] for key in ("step", "peak")})
            self._attempt(size, partial(self._rows, "plan", size, measured, JAX_PLATFORMS="cpu"))

    def _float8(self):
        """Attention and MLP in float8, against bfloat16."""
        runs: list[dict] = []
        self._train("trainit", "124M", "float8", runs)
        run, base, compared = joined(runs), self.found.get("124M"), "bfloat16 was not measured"
        if base:
            compared = f"{base['step'] / run['step']:.2f} times as fast as bfloat16; "
            compared += f"loss {run['loss']:.4f}, there {base['loss']:.4f}"
        self._add("124M", self._speed("124M", run)[0], compared)


def joined(runs: list[dict]) -> dict:
    """Returns a program's runs as one: "step" is the median of all their steps, in seconds."""
    step = median(second for run in runs for second in run["seconds"])
    return {**runs[0], "step": step, "peak": max(run["peak"] for run in runs)}


def measure(minutes: float, rounds: int, output: Path) -> int:
    """Measures the first GPU of this machine, and prints and writes the table; returns the exit code."""
    kind = hardware.detect(os.environ.get("JAX_PLATFORMS", ""), os.environ, 1, 1).kind
    with tempfile.TemporaryDirectory() as folder:
        return Card(kind, minutes, rounds, output, Path(folder)).measure()
