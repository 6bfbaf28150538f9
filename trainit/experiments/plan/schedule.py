"""When the kernels and exchanges of a GPU's compiled program run, by its schedule and a roofline.

Kernels run one after another; each takes as long as its operations or its memory traffic need. NVLink, the
network and copies each do one thing at a time meanwhile; what is waited for at its end is exposed.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from trainit.experiments.plan import hlo, roofline
from trainit.experiments.plan.hlo import Collective, Instruction
from trainit.experiments.plan.kernels import LAUNCH, MEMORY, PRODUCTS, Kernel, Kernels
from trainit.experiments.plan.targets import Target

LATENCY = {"NVLink": 10e-6, "network": 30e-6, "copies": LAUNCH}  # seconds until an exchange begins
ASSUMED = (
    f"kernels at {PRODUCTS:g} of the peak or {MEMORY:g} of the memory's bandwidth, + {1e6 * LAUNCH:g} µs; "
    f"exchanges at full bandwidth, + {1e6 * LATENCY['NVLink']:g} µs within a machine and "
    f"{1e6 * LATENCY['network']:g} µs between machines"
)
OTHER = ("other", "other, in a loop")  # what kernels of no part are called
NO_KERNEL = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"}
NO_KERNEL |= {"partition-id", "replica-id"}


class Totals(NamedTuple):
    """Sums over kernels."""

    runs: int = 0
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def plus(self, one: Kernel) -> "Totals":
        """The sums with one more."""
        sums = self.flops + one.flops, self.moved + one.moved, self.seconds + one.seconds
        return Totals(self.runs + 1, *sums)


class Schedule:
    """A program's run in time. Raises ValueError if it has a form that is not known."""

    def __init__(self, text: str, sizes: Mapping[str, int], target: Target):
        self._program, entry = hlo.computations(text)
        kernels = Kernels(self._program, target)
        self._types, self._kernel = kernels.types, functools.cache(kernels.kernel)
        self._sizes, self._target, self._gpu = sizes, target, target.accelerator
        self._exchange = functools.cache(self._exchange_of)
        self._free: defaultdict[str, float] = defaultdict(float)  # when each link is
        self.seconds = 0.0
        self.kernels: defaultdict[str, Totals] = defaultdict(Totals)  # by part, or as OTHER
        self.products: Counter[tuple[str, str]] = Counter()
        self.busy: defaultdict[str, float] = defaultdict(float)  # seconds of each kind of exchange
        self.exposed: defaultdict[str, float] = defaultdict(float)  # of them, those that kernels wait for
        self.conditionals = 0
        self._run(entry, False)

    @property
    def total(self) -> Totals:
        """All kernels."""
        return Totals(*(sum(column) for column in zip(*self.kernels.values(), strict=True)))

    def _run(self, computation: str, in_loop: bool):
        """Runs a computation from now on."""
        open_: dict[str, tuple[float, str]] = {}  # exchanges: when they end, what they are
        for one in self._program[computation]:
            if one.operation in NO_KERNEL:
                continue
            if one.operation == "while":
                trips = self._trips(one)
                for _ in range(trips):
                    self._run(one.calls("body"), in_loop or trips > 1)
            elif one.operation == "conditional":
                self.conditionals += 1
                branches = [name for name in re.findall(r"%[\w.-]+", one.rest) if name in self._program]
                self._run(max(branches, key=self._work), in_loop)
            elif one.operation == "call":
                self._run(one.calls("to_apply"), in_loop)
            elif one.operation.endswith("-start"):
                open_[one.name] = self._begin(computation, one)
            elif one.operation.endswith("-done"):
                if one.operands[0] in open_:
                    self._wait(*open_.pop(one.operands[0]))
            elif one.operation in hlo.KINDS:
                self._wait(*self._begin(computation, one))
            else:
                kernel = self._kernel(computation, one)
                self.seconds += kernel.seconds
                key = kernel.part or OTHER[in_loop]
                self.kernels[key] = self.kernels[key].plus(kernel)
                self.products.update(kernel.products)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs, which XLA has found out, or its condition says, perhaps in a fusion."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self._program[loop.calls("condition")]
        root = condition[-1]
        return hlo.iterations(self._program[root.calls("calls")] if root.operation == "fusion" else condition)

    def _work(self, computation: str) -> float:
        """Seconds of the kernels of a branch, to find the longer one; its loops do not count."""
        skipped = NO_KERNEL | {"while", "conditional", "call"}
        body = self._program[computation]
        return sum(self._kernel(computation, one).seconds for one in body if one.operation not in skipped)

    def _begin(self, computation: str, one: Instruction) -> tuple[float, str]:
        """Starts an exchange or a copy as soon as its link is free: when it ends, and what it is."""
        link, what, seconds = self._exchange(computation, one)
        end = self._free[link] = max(self.seconds, self._free[link]) + seconds
        self.busy[what] += seconds
        return end, what

    def _wait(self, end: float, what: str):
        self.exposed[what] += max(0.0, end - self.seconds)
        self.seconds = max(self.seconds, end)

    def _exchange_of(self, computation: str, one: Instruction) -> tuple[str, str, float]:
        """The link that it takes, what it is, and its seconds."""
        types, kind = self._types[computation], one.operation.removesuffix("-start")
        size = sum(hlo.size_of(types[name]) for name in one.operands)
        if kind not in hlo.KINDS:  # S(5) is the host's memory
            to_host = kind == "copy" and "S(5)" in one.result
            rate = self._target.host if to_host else self._target.bandwidth
            what = "copies to and from the host" if to_host else "copies on the device"
            return "copies", what, size / (rate * MEMORY) + LATENCY["copies"]
        groups = hlo.device_groups(one.rest, math.prod(self._sizes.values()))
        if kind == "collective-permute":  # pairs, of which some may leave the machine
            between = bool(np.ptp(groups // self._gpu.node, axis=1).any())
        else:
            between = len(set((groups[0] // self._gpu.node).tolist())) > 1
        axes, count = hlo.axes_of(groups, self._sizes), groups.shape[1]
        whole = size * count if kind == "all-gather" else size
        rate = roofline.ring_bandwidth(groups[0], self._gpu)
        rate = min(rate, self._gpu.across) if between and kind == "collective-permute" else rate
        link = "network" if between else "NVLink"
        what = f"{kind} over {' × '.join(axes)}" + (" of scalars" if whole < 1 << 16 else "")
        sent = Collective(kind, "", axes, count, whole, 1).bytes
        return link, what, sent / rate + LATENCY[link]
