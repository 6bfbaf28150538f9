"""Compiles each choice of what layers keep for the backward pass, to compare memory and time."""

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tabulate import tabulate

from trainit.config import Config, ConfigError
from trainit.experiments.plan import gpu
from trainit.experiments.plan.plan import settle
from trainit.experiments.plan.report import GIB, cards
from trainit.experiments.plan.schedule import Schedule
from trainit.experiments.plan.targets import TARGETS
from trainit.parallel.mesh import mesh_sizes

KEPT = ("none", "attention", "dots", "block", "offload")  # the choices of model.remat
UNROLLED = 24  # layers at most that are compiled one after another, which takes long


def table(config: Config, devices: int, name: str, environment: Mapping[str, str]) -> str:
    """Returns a row for each choice of a resolved config; a star marks that of the config, or of "auto".

    Two are compiled at a time. A choice that cannot be compiled has the reason in its row.
    """
    settled, _ = settle(config, devices, name)
    loops = (True, False) if config.model.num_blocks <= UNROLLED else (True,)
    choices = list(itertools.product(KEPT, loops))

    def row(choice: tuple[str, bool]) -> list[str]:
        remat, loop = choice
        layers = {"remat": remat, "scan_layers": loop}
        changed = Config({**config.to_dict(), "model": {**config.model.to_dict(), **layers}})
        chosen = "*" if layers == {field: settled.model[field] for field in layers} else ""
        start = [chosen + remat, "in a loop" if loop else "unrolled"]
        try:
            changed, _ = settle(changed, devices, name)
            program = gpu.compile_for(changed, devices, name, environment)
            schedule = Schedule(program.scheduled, mesh_sizes(config, devices), TARGETS[name])
        except (ConfigError, ChildProcessError) as error:
            return [*start, f"{error}"[:80]]
        times = schedule.seconds, sum(schedule.exposed.values())
        return [
            *start,
            f"{program.assigned / GIB:.2f}",
            *(f"{1e3 * time:.1f}" for time in times),
            str(schedule.total.runs),
            cards(program.assigned, devices),
        ]

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(row, choices))
    headers = ["remat", "layers", "GiB assigned", "ms", "exposed", "kernels", "fits"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
