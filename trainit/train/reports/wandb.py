"""A run's metrics and texts in Weights & Biases."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainit.train.diagnostics import histogram_edges

OFFLINE = ("offline", "dryrun", "disabled")  # modes in which nothing leaves this machine


def lacks() -> str:
    """What keeps this process from writing to W&B, and what to do; "" if nothing is known that does.

    A variable with a mode or a key is enough. Otherwise W&B looks for a login, and never asks for one.
    """
    if os.environ.get("WANDB_MODE") in OFFLINE or os.environ.get("WANDB_API_KEY"):
        return ""
    import wandb  # here, because it takes a second to import

    if wandb.login(prompt=False, verify=False) or wandb.setup().settings.mode in OFFLINE:
        return ""
    return "there is no login: run `wandb login`, or set WANDB_MODE=offline and run `wandb sync` later"


class WandB:
    """A run of W&B, new or continued."""

    def __init__(self, workdir: Path, config: Mapping, run_id: str, newest: int):
        """`newest` is the step of the newest line that metrics.jsonl had before this start; -1: none."""
        import wandb

        project, name = config["wandb"]["project"], config["wandb"]["name"] or workdir.name
        about = {"project": project, "name": name, "id": run_id, "config": config}
        self._run = wandb.init(**about, resume="allow", dir=workdir)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # Steps that this job does again are there already. Offline, W&B does not know what it was given.
        self._known = newest if self._run.offline else self._run.starting_step - 1

    def log(self, step: int, metrics: Mapping):
        import wandb

        def shown(value):
            if not isinstance(value, list):
                return value
            return wandb.Histogram(np_histogram=(np.array(value), histogram_edges()))

        values = {name: shown(value) for name, value in metrics.items()}
        self._log(step, {"step": step, **values})

    def log_texts(self, step: int, texts: Sequence[Mapping]):
        import wandb

        table = wandb.Table(["prompt", "text"], data=[[each["prompt"], each["text"]] for each in texts])
        self._log(step, {"samples": table})

    def _log(self, step: int, values: dict):
        if step > self._known:
            self._run.log(values, step=step)

    def flush(self):
        pass  # its own process sends what it has

    def close(self, code: int):
        self._run.finish(exit_code=code)
