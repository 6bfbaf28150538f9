"""Prints plans."""

import math
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from trainit.cluster.logs import quantity
from trainit.tools.plan import hlo
from trainit.tools.plan.plan import Plan

SMALL = 1024  # bytes: exchanges of such pieces (norms, losses) are left out if the formula has none
MIB, GIB = 2**20, 2**30


def describe(plan: Plan) -> str:
    """Returns what is known of a plan: mesh, memory, exchanges and time."""
    p, t = plan, plan.times
    micro_steps, rows, length = p.shape.batch_at(0)
    memory = f"{p.state / GIB:.2f} GiB of parameters and optimizer state on a device"
    if p.compiled is not None:
        memory += f"; {p.temporaries / GIB:.2f} GiB of temporaries on a CPU, where bfloat16 is float32"
    lines = [
        f"mesh       {_mesh(p.shape.sizes) or 'one device'}; {micro_steps} micro-steps of "
        f"{rows // p.shape.shares} sequences of {length} tokens on each part of data × fsdp",
        f"model      {quantity(p.parameters)} parameters",
        f"computing  {p.computing}",
        f"memory     {memory}",
        f"time       {1e3 * t.step:.2f} ms on {p.gpu.name}, MFU {t.mfu:.1%}, if exchanges overlap with "
        f"computation; {1e3 * t.unhidden:.2f} ms, MFU {t.mfu_unhidden:.1%}, if none does",
        f"           computation {1e3 * t.compute:.2f} ms at {p.efficiency:g} of the peak; exchanges "
        f"{1e3 * t.exposed:.2f} ms that cannot overlap and {1e3 * t.hidden:.2f} ms that can",
        "exchanged  by each device in a step:",
    ]
    headers = ["exchange", "over", "MiB by formula", "compiled"]
    alignment = ("left", "left", "right", "right")
    exchanges = tabulate(_exchanges(p), headers, colalign=alignment, disable_numparse=True)
    return "\n           ".join(["\n".join(lines), *exchanges.splitlines()])


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
        seconds = f"{p.times.step:.3g}, {p.times.unhidden:.3g}"
        mfu = f"{p.times.mfu:.0%}, {p.times.mfu_unhidden:.0%}"
        rows.append((*model, memory, *exchanged, seconds, mfu))
    alignment = ["right", "right", "left", *["right"] * 5]
    return tabulate(rows, headers, tablefmt="github", colalign=alignment, disable_numparse=True)


def _mesh(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)


def _mib(size: float) -> str:
    return f"{size / MIB:.5g}" if size < 1e5 * MIB else f"{size / MIB:.0f}"
