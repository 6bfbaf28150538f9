"""How long a run takes on a number of GPUs, and what it costs in GPU-hours, by its plans."""

import math
from collections.abc import Sequence

from tabulate import tabulate

from trainit.cluster.logs import quantity
from trainit.experiments.plan.plan import Plan
from trainit.experiments.plan.targets import TARGETS

COUNTS = tuple(2**power for power in range(13))  # that are tried where none are given


def fits(plan: Plan) -> bool | None:
    """Whether the step fits into the memory of its GPUs; None: it has not been compiled.

    If it was compiled for CPUs, it is their program that has to fit, which needs more.
    """
    if math.isnan(plan.temporaries):
        return None
    return plan.state + plan.temporaries <= TARGETS[plan.gpu].room(math.prod(plan.shape.sizes.values()))


def describe(plans: Sequence[Plan], tokens: float, hours: float) -> str:
    """Returns the time and the cost of a run of this many tokens (0: those of the config) by each plan.

    With a number of GPU-hours, also how many tokens they are enough for.
    """
    rows, smallest = [], "no number of GPUs that was tried fits"
    for p in plans:
        micro_steps, rows_of_step, length = p.shape.batch_at(0)
        batch, devices = micro_steps * rows_of_step * length, math.prod(p.shape.sizes.values())
        sizes = p.shape.batch_sizes
        wanted = tokens or sizes.rows(sizes.run_steps) * length
        seconds = wanted / batch * p.seconds[0]
        enough = hours * 3600 / devices / p.seconds[0] * batch
        answer = {True: "yes", False: "no", None: "not compiled"}[fits(p)]
        times = seconds / 3600, devices * seconds / 3600
        row = [str(devices), answer, quantity(wanted), *(f"{time:.1f}" for time in times)]
        rows.append([*row, quantity(enough), "yes" if enough >= wanted else "no"] if hours else row)
        if fits(p) and smallest.startswith("no "):
            smallest = f"the smallest number of {p.gpu}s that fits is {devices}"
    headers = ["GPUs", "fits", "tokens", "hours", "GPU-hours"]
    headers += [f"tokens for {hours:g} GPU-hours", "enough"] if hours else []
    text = tabulate(rows, headers, tablefmt="github", disable_numparse=True, stralign="right")
    return f"{text}\nOf these, {smallest}. Hours are those of steps, by the time that was predicted for one."
