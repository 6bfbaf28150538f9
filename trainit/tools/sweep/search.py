"""Runs a sweep until no more runs are wanted, and compares what its runs reached."""

import math
from collections.abc import Callable, Sequence

from absl import logging

from trainit.tools.compare.comparison import compare
from trainit.tools.compare.runs import find, group
from trainit.tools.sweep import launch
from trainit.tools.sweep.spec import Job, Sweep


def search(sweep: Sweep, run: Callable[[Sequence[Job]], None]) -> list[Job]:
    """Runs a sweep; returns all of its runs, also those that failed.

    `run` starts runs and returns when they have ended.
    """
    tried: set[Job] = set()

    def loss(job: Job) -> float | None:
        known = launch.loss(job)
        return math.inf if known is None and job in tried else known

    # Results may show that more runs are wanted: at other learning rates, or with more seeds.
    while True:
        jobs = sweep.wanted(loss)
        todo = [job for job in jobs if loss(job) is None]
        if not todo:
            return jobs
        logging.info("%d runs, %d of them still to do, in %s", len(jobs), len(todo), sweep.output)
        run(todo)
        tried |= set(todo)


def report(sweep: Sweep, jobs: Sequence[Job], command: str):
    """Prints the comparison and writes its picture and page, if any run has left metrics."""
    runs = find(job.folder for job in jobs if (job.folder / "metrics.jsonl").exists())
    if runs:
        methods, folder = group(runs, sweep.tuning_seeds), sweep.output / sweep.baseline
        of_baseline = (m for m in methods for s in m.settings for r in s.runs if folder in r.path.parents)
        baseline = next(of_baseline, methods[0]).name
        picture, page = sweep.output / "sweep.png", sweep.output / "sweep.html"
        print(compare(runs, baseline, sweep.target, sweep.tuning_seeds, picture, page, command))
