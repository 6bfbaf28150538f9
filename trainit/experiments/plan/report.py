"""Prints plans."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from tabulate import tabulate

from trainit.cluster.logs import quantity
from trainit.experiments.plan import hlo
from trainit.experiments.plan.gpu import Program
from trainit.experiments.plan.plan import Plan
from trainit.experiments.plan.schedule import ASSUMED, OTHER, Schedule
from trainit.experiments.plan.targets import TARGETS, WORKSPACES, outside

INDENT = " " * 11
LISTED = 24  # products at most
SMALL = 1024  # bytes: exchanges of such pieces (norms, losses) are left out if the formula has none
MIB, GIB = 2**20, 2**30


def describe(plan: Plan, missing: str) -> str:
    """Returns what is known of a plan: mesh, memory, exchanges and time. `missing`: see `gpu.missing`."""
    p, t = plan, plan.times
    micro_steps, rows, length = p.shape.batch_at(0)
    state = f"{p.state / GIB:.2f} GiB of parameters and optimizer state"
    mesh = f"mesh       {_mesh(p.shape.sizes) or 'one device'}; {micro_steps} micro-steps of "
    lines = [
        f"{mesh}{rows // p.shape.shares} sequences of {length} tokens on each part of data × fsdp",
        f"model      {quantity(p.parameters)} parameters",
        f"computing  {p.computing}",
    ]
    if p.program is not None and p.schedule is not None:
        lines += [_compiled(p, p.program), *_memory(p, p.program, state), *_time(p, p.schedule)]
    else:
        memory = f"memory     {state} on a device"
        if p.compiled is not None:
            lines += [f"compiled   for CPUs; {missing}"]
            memory += f"; {p.temporaries / GIB:.2f} GiB of temporaries on a CPU, where bfloat16 is float32"
        lines += [
            memory,
            f"time       {1e3 * t.step:.2f} ms on {p.gpu}, MFU {t.mfu:.1%}, if exchanges overlap with "
            f"computation; {1e3 * t.unhidden:.2f} ms, MFU {t.mfu_unhidden:.1%}, if none does",
            f"           computation {1e3 * t.compute:.2f} ms at {p.efficiency:g} of the peak; exchanges "
            f"{1e3 * t.exposed:.2f} ms that cannot overlap and {1e3 * t.hidden:.2f} ms that can",
        ]
    headers = ["exchange", "over", "MiB by formula", "compiled"]
    lines += ["exchanged  by each device in a step:", *_indented(_exchanges(p), headers, 2)]
    return "\n".join(lines)


def cards(assigned: float, devices: int) -> str:
    """Returns the cards into which a program with this memory fits."""
    names = [name for name, target in TARGETS.items() if assigned <= target.room(devices)]
    return "all" if len(names) == len(TARGETS) else ", ".join(names) or "none"


def _indented(rows: list[list[str]], headers: Sequence[str], left: int) -> list[str]:
    """Returns the lines of a table, of which the first columns are aligned to the left."""
    alignment = ["left"] * left + ["right"] * (len(headers) - left)
    text = tabulate(rows, headers, colalign=alignment if rows else None, disable_numparse=True)
    return [INDENT + line for line in text.splitlines()]


def _compiled(plan: Plan, program: Program) -> str:
    """Returns the line that says for what the step is compiled, by what, with which flags."""
    unknown = ", ".join(program.unknown)
    flags = f"it does not know {unknown}, which are left out" if unknown else "all flags are known"
    return (
        f"compiled   for {plan.gpu} ({TARGETS[plan.gpu].kind}) by jaxlib {version('jaxlib')}, with attention "
        f"by {program.attention}; {flags}"
    )


def _memory(plan: Plan, program: Program, state: str) -> list[str]:
    """Returns the lines about memory, with a table of the cards into which the program fits."""
    devices = math.prod(plan.shape.sizes.values())
    rows = []
    for name, target in TARGETS.items():
        left = target.room(devices) - program.assigned
        sizes = target.memory, target.room(devices), left
        rows.append([name, *(f"{size / GIB:.1f}" for size in sizes), "yes" if left >= 0 else "no"])
    return [
        f"memory     {program.assigned / GIB:.2f} GiB assigned by XLA on a device: {state}, "
        f"{plan.temporaries / GIB:.2f} GiB of everything else",
        f"{INDENT}assumed for what XLA does not see: {WORKSPACES / GIB:g} GiB in JAX's part of the memory "
        "(workspaces of cuBLAS and cuDNN, gaps),",
        f"{INDENT}{outside(devices) / GIB:g} GiB outside of it (CUDA's context{', NCCL' * (devices > 1)})",
        *_indented(rows, ["card", "GiB", "XLA may assign", "left", "fits"], 1),
    ]


def _time(plan: Plan, schedule: Schedule) -> list[str]:
    """Returns the lines about the time of the step, exposed exchanges, kernels and products."""
    s, config = schedule, plan.config
    exposed, busy = sum(s.exposed.values()), sum(s.busy.values())
    lines = [
        f"time       {1e3 * s.seconds:.2f} ms on {plan.gpu} by its schedule, MFU {plan.mfu[0]:.1%}: kernels "
        f"{1e3 * s.total.seconds:.2f} ms; exchanges {1e3 * busy:.2f} ms, of which {1e3 * exposed:.2f} ms "
        "are exposed",
        f"{INDENT}assumed: {ASSUMED}",
        f"{INDENT}error against a card: not measured yet",
    ]
    exchanges = sorted(s.busy, key=lambda what: -s.exposed[what])
    rows = [[what, f"{1e3 * s.busy[what]:.2f}", f"{1e3 * s.exposed[what]:.2f}"] for what in exchanges]
    lines += _indented(rows, ["next to kernels", "ms", "exposed"], 1) if rows else []
    if s.conditionals:
        lines += [f"{INDENT}the host waits at {s.conditionals} conditional branch(es) in each step"]

    # Kernels by part; those of layers also for each of them.
    layers = config.model.num_blocks * plan.shape.batch_at(0).micro_steps
    lines += [f"kernels    {s.total.runs} in a step, as compiled without trying them out on a card:"]
    rows = []
    for name, totals in sorted(s.kernels.items(), key=lambda item: -item[1].seconds):
        of_layer = f"{totals.runs / layers:.1f}" if name in ("attention", "mlp", OTHER[True]) else ""
        sizes = totals.flops / 1e12, totals.moved / GIB, 1e3 * totals.seconds
        rows.append([name, str(totals.runs), of_layer, *(f"{size:.2f}" for size in sizes)])
    lines += _indented(rows, ["part", "kernels", "of a layer", "TFLOP", "GiB", "ms"], 1)
    rows = [[text, by, str(count)] for (text, by), count in s.products.most_common(LISTED)]
    others = len(s.products) - len(rows)
    more = f", and {others} others that run less often" if others else ""
    lines += [f"products   left rows × contracted × right columns{more}:"]
    return lines + _indented(rows, ["product", "lowered to", "times"], 2)


def _exchanges(plan: Plan) -> list[list[str]]:
    """Returns the rows of the table of exchanges: kind, mesh axes, MiB by formula, MiB compiled."""
    predicted, compiled = hlo.total(plan.predicted), hlo.total(plan.compiled or ())
    # What the formula leaves out on purpose is not listed.
    large = {(one.kind, one.axes) for one in plan.compiled or () if one.size > SMALL}
    rows = []
    for key in sorted(predicted.keys() | large):
        program = "not compiled" if plan.compiled is None else _mib(compiled.get(key, 0.0))
        rows.append([key[0], " × ".join(key[1]), _mib(predicted.get(key, 0.0)), program])
    return rows


def table(plans: Sequence[Plan]) -> str:
    """Returns a row for each plan, in Markdown. Columns with two values: with overlap, without."""
    headers = ["parameters", "GPUs", "mesh", "state + rest, GiB", "exchanged, GiB", "formula off by"]
    headers += ["step in s: with overlap, without", "MFU"]
    rows = []
    for p in plans:
        predicted, compiled = (sum(one.bytes for one in some or ()) for some in (p.predicted, p.compiled))
        error = f"{abs(predicted / compiled - 1):.2%}" if compiled else "0.00%"
        model = quantity(p.parameters), str(math.prod(p.shape.sizes.values())), _mesh(p.shape.sizes)
        memory = " + ".join(f"{size / GIB:.1f}" for size in (p.state, p.temporaries) if not math.isnan(size))
        exchanged = f"{predicted / GIB:.2f}", "not compiled" if p.compiled is None else error
        seconds = ", ".join(f"{time:.3g}" for time in p.seconds)
        mfu = ", ".join(f"{mfu:.0%}" for mfu in p.mfu)
        rows.append((*model, memory, *exchanged, seconds, mfu))
    alignment = ["right", "right", "left", *["right"] * 5]
    return tabulate(rows, headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def _mesh(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)


def _mib(size: float) -> str:
    return f"{size / MIB:.5g}" if size < 1e5 * MIB else f"{size / MIB:.0f}"
