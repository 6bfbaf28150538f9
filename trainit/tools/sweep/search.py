"""Runs a sweep until nothing more is wanted, and compares what its runs reached."""

import math
from collections.abc import Sequence

from absl import logging

from trainit.tools.compare.comparison import compare
from trainit.tools.compare.runs import find, group
from trainit.tools.sweep import launch
from trainit.tools.sweep.spec import Job, Sweep


def search(sweep: Sweep, runner) -> list[Job]:
    """Runs what is wanted until nothing more is; returns all of it."""
    tried: set[Job] = set()

    def loss(job: Job) -> float | None:
        known = launch.loss(job)
        return math.inf if known is None and job in tried else known

    while True:
        jobs = sweep.wanted(loss)
        todo = [job for job in jobs if job not in tried and not launch.finished(job)]
        if not todo:
            return jobs
        logging.info("%d runs, of which %d are to be done, in %s", len(jobs), len(todo), sweep.output)
        runner.run(todo)
        tried |= set(todo)


def tell(sweep: Sweep, jobs: Sequence[Job], command: str):
    """The table, the picture and the page, if there is anything in them."""
    runs = find(job.folder for job in jobs if (job.folder / "metrics.jsonl").exists())
    if not runs:
        return
    methods = group(runs, sweep.tuning_seeds)
    at = sweep.output / sweep.baseline
    base = next((m for m in methods for s in m.settings for r in s.runs if at in r.path.parents), methods[0])
    output, page = sweep.output / "sweep.png", sweep.output / "sweep.html"
    print(compare(runs, base.name, sweep.target, sweep.tuning_seeds, output, page, command))
