"""What is printed of plans."""

import math

from trainit.config import Config
from trainit.logs import quantity
from trainit.tools.plan import hlo
from trainit.tools.plan.plan import Planned

SMALL = 1024  # bytes: what is exchanged in such pieces needs no plan
MIB, GIB = 2**20, 2**30


def tell(p: Planned, config: Config):
    """Prints a plan, a line for each topic."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in p.shape.sizes.items() if size > 1) or "one device"
    micro_steps, rows, length = p.shape.batch_at(0)
    share = rows // p.shape.shares
    print(
        f"mesh       {mesh}; {micro_steps} × {share} sequences of {length} on a part of data × fsdp, "
        f"{quantity(p.parameters)} parameters, remat {config.model.remat}"
    )
    text = f"memory     {p.state / GIB:.2f} GiB of parameters and optimizer state on a device"
    if p.compiled is not None:
        text += f", {p.temporaries / GIB:.2f} of temporaries on a CPU, where bfloat16 is computed in float32"
    print(text)
    planned = hlo.total(p.planned)
    there = hlo.total(p.compiled or ())
    for kind, axes in sorted(planned.keys() | there.keys()):
        small = (kind, axes) not in planned and all(
            one.size <= SMALL for one in p.compiled or () if (one.kind, one.axes) == (kind, axes)
        )
        if not small:
            compiled = f"{there.get((kind, axes), 0.0) / MIB:.5g}" if p.compiled is not None else "not"
            print(
                f"exchanged  {kind} over {' × '.join(axes)}: {planned.get((kind, axes), 0.0) / MIB:.5g} MiB "
                f"a device and step by formula, {compiled} compiled"
            )
    t = p.times
    print(
        f"time       {t.step:.4g} s on {p.gpu}: computation {t.compute:.4g} at {p.efficiency:g} of "
        f"the peak, exchanges {t.exposed:.4g} that it waits for and {t.hidden:.4g} beside it "
        f"({t.unhidden:.4g} s with these behind it); MFU {t.mfu:.1%} ({t.mfu * t.step / t.unhidden:.1%})",
        flush=True,
    )


def table(plans: list[Planned]) -> str:
    """All of them, in Markdown."""
    lines = [
        "| parameters | GPUs | mesh | state + rest, GiB a device | exchanged, GiB a device and "
        "step | off by | step, s: exchanges beside computation, behind it | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in plans:
        mesh = " × ".join(f"{axis} {size}" for axis, size in p.shape.sizes.items() if size > 1)
        error = "not compiled" if math.isnan(p.error) else f"{abs(p.error):.2%}"
        memory = " + ".join(f"{n / GIB:.1f}" for n in (p.state, p.temporaries) if not math.isnan(n))
        exchanged, t = sum(one.bytes for one in p.planned) / GIB, p.times
        lines.append(
            f"| {quantity(p.parameters)} | {math.prod(p.shape.sizes.values())} | {mesh} | {memory} | "
            f"{exchanged:.2f} | {error} | {t.step:.3g}, {t.unhidden:.3g} | {t.mfu:.0%}, "
            f"{t.mfu * t.step / t.unhidden:.0%} |"
        )
    return "\n".join(lines)
