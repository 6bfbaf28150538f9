"""What each kernel of a GPU's compiled program computes and moves, and how long that takes by a roofline."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from trainit.experiments.plan import hlo
from trainit.experiments.plan.hlo import Instruction
from trainit.experiments.plan.targets import Target
from trainit.train.profiling.parts import part_of

PRODUCTS, MEMORY = 0.7, 0.85  # of the peak of products, and of the memory's bandwidth, that kernels reach
LAUNCH = 2e-6  # seconds between kernels
SLICES = {"slice", "dynamic-slice", "gather"}  # read only what they return
LIBRARIES = {"__triton": "Triton", "__cublas": "cuBLAS", "__cudnn": "cuDNN"}
_KIND = re.compile(r'(?:"kind":|custom_call_target=)"([^"]+)"')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:] ?[{\[]([\d," ]*)')


class Kernel(NamedTuple):
    """What one run of a kernel does."""

    part: str  # of model and step, or ""
    products: tuple[tuple[str, str], ...]  # matrix products, and what each is lowered to
    flops: float
    moved: float  # bytes
    seconds: float


class Kernels:
    """The kernels of a program."""

    def __init__(self, program: Mapping[str, list[Instruction]], target: Target):
        self.types = {name: {one.name: one.result for one in body} for name, body in program.items()}
        self._program, self._target, self._peak = program, target, target.accelerator.flops

    def kernel(self, computation: str, one: Instruction) -> Kernel:
        """What one run of it does."""
        types = self.types[computation]
        called = one.calls("calls") if one.operation == "fusion" else ""
        products = self._products(called) if called else self._product(one, types)
        name = (_KIND.findall(one.rest) or [""])[-1 if called else 0]
        lowered = next((LIBRARIES[start] for start in LIBRARIES if name.startswith(start)), "XLA's own loops")
        flops, seconds = 0.0, 0.0
        for text, operations in products:
            # TensorFloat-32, as which JAX computes float32, has half of bfloat16's rate, and float8 twice.
            rate = 0.5 if text.startswith("f32") else 2.0 if text.startswith("f8") else 1.0
            flops, seconds = flops + operations, seconds + operations / (rate * PRODUCTS * self._peak)
        moved = self._fusion_moves(called) if called else self._moved(one, types)
        seconds = max(seconds, moved / (MEMORY * self._target.bandwidth)) + LAUNCH
        texts = tuple((text, lowered) for text, _ in products)
        if one.operation == "custom-call" and not products:
            texts = ((name, "a library: only its bytes count"),)
        return Kernel(part_of(one.scope), texts, flops, moved, seconds)

    def _products(self, computation: str) -> list[tuple[str, float]]:
        """The matrix products in a fusion: text, operations."""
        found = []
        for one in self._program[computation]:
            if one.operation == "fusion":
                found += self._products(one.calls("calls"))
            else:
                found += self._product(one, self.types[computation])
        return found

    def _product(self, one: Instruction, types: Mapping[str, str]) -> list[tuple[str, float]]:
        """The product that an instruction itself is, or none. cuDNN's attention counts as two, or five."""
        if "fmha" in one.rest[:2000] and one.operation == "custom-call":
            shape = hlo.match_or_raise(r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', one.rest)[1]
            rows, heads, length, keys = hlo.numbers(shape)
            [(dtype, query)] = hlo.arrays(types[one.operands[0]])
            size = math.prod(query) // (rows * heads * length)
            back, half = "Backward" in one.rest, 0.5 if "CAUSAL" in one.rest else 1.0
            text = (
                f"{dtype} attention{' gradient' * back} {rows} × {length} × {keys}, {heads} heads of {size}"
            )
            return [(text, half * (10 if back else 4) * rows * heads * length * keys * size)]
        if one.operation != "dot" and "cublas" not in one.rest[:2000]:
            return []
        [(dtype, left)] = hlo.arrays(types[one.operands[0]])
        contracted = hlo.numbers(hlo.match_or_raise(_CONTRACTED, one.rest)[1])
        inner = math.prod(left[dim] for dim in contracted)
        outer = math.prod(left) // inner
        numbers = math.prod(hlo.arrays(one.result)[0][1])
        return [(f"{dtype} {outer} × {inner} × {numbers // outer}", 2.0 * inner * numbers)]

    def _moved(self, one: Instruction, types: Mapping[str, str]) -> int:
        """Bytes that an instruction other than a fusion reads and writes."""
        return hlo.size_of(one.result) + sum(hlo.size_of(types[name]) for name in one.operands)

    def _fusion_moves(self, computation: str) -> int:
        """Bytes that a fusion reads and writes; only a part of arrays that it slices or updates."""
        body, types = self._program[computation], self.types[computation]
        users: defaultdict[str, list[Instruction]] = defaultdict(list)
        source: dict[str, str] = {}  # of a bitcast: what it is made of
        for one in body:
            for operand in one.operands if one.operation != "parameter" else ():
                users[source.get(operand, operand)].append(one)
                if one.operation == "bitcast":
                    source[one.name] = source.get(operand, operand)
        total = 0
        for one in body:
            if one.operation == "parameter":
                uses = [user for user in users[one.name] if user.operation != "bitcast"]
                firsts = [source.get(user.operands[0], user.operands[0]) == one.name for user in uses]
                if uses and all(firsts) and all(user.operation in SLICES for user in uses):
                    total += sum(hlo.size_of(user.result) for user in uses)
                elif not (uses and all(firsts) and all(u.operation == "dynamic-update-slice" for u in uses)):
                    total += hlo.size_of(one.result)
        named = {one.name: one for one in body}

        def written(one: Instruction) -> int:
            if one.operation == "tuple":
                return sum(written(named[name]) for name in one.operands)
            if one.operation == "bitcast":
                return written(named[one.operands[0]])
            if one.operation == "dynamic-update-slice":
                return hlo.size_of(types[one.operands[1]])
            if one.operation == "scatter":  # it reads what it adds to
                return 2 * hlo.size_of(types[one.operands[-1]])
            return hlo.size_of(one.result)

        return total + written(body[-1])
