"""A run's metrics, config and texts in TensorBoard's event files.

The package tensorboard frames their records, as it does for PyTorch, and has the types of what is in them. A
file written by tensorboardX is the same, but to import that package imports PyTorch where it is installed.
"""

import importlib.util
import itertools
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainit.train.diagnostics import histogram_edges


def lacks() -> str:
    """What keeps this process from writing them, and what to do; "" if nothing does."""
    if importlib.util.find_spec("tensorboard"):
        return ""
    return "the package tensorboard is not installed: pip install 'trainit[tensorboard]'"


def as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


class TensorBoard:
    """Event files in a folder: one for each start of the run, by which readers continue its curves."""

    def __init__(self, folder: Path, config: Mapping, first: int):
        """Begins a file for steps from `first` on, which replace those of files before."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(exist_ok=True)
        # Readers take files by their names, which have the second; the number orders two of one second.
        second, number = f"{int(time.time()):010}", f"{len(list(folder.iterdir())):06}"
        path = folder / f"events.out.tfevents.{second}.{socket.gethostname()}.{number}"
        self._file = RecordWriter(path.open("xb"))
        self._write(0, file_version="brain.Event:2")
        # Readers drop these steps of files before, also those that this job does not come to.
        self._write(first, session_log={"status": "START"})
        self._write(first, summary={"value": [_text("config", as_code(json.dumps(config, indent=1)))]})
        self.flush()

    def _write(self, step: int, **what: Any):
        self._file.write(self._event(step=step, wall_time=time.time(), **what).SerializeToString())

    def log(self, step: int, metrics: Mapping):
        values = [
            _histogram(name, value) if isinstance(value, list) else {"tag": name, "simple_value": value}
            for name, value in metrics.items()
        ]
        self._write(step, summary={"value": values})

    def log_texts(self, step: int, texts: Sequence[Mapping]):
        values = [
            _text(f"samples/{number}", f"Prompt:\n\n{as_code(t['prompt'])}\n\nText:\n\n{as_code(t['text'])}")
            for number, t in zip(itertools.count(1), texts)
        ]
        self._write(step, summary={"value": values})

    def flush(self):
        self._file.flush()

    def close(self, code: int):
        self._file.close()


def _text(tag: str, markdown: str) -> dict:
    """A value of a summary."""
    tensor = {"dtype": "DT_STRING", "string_val": [markdown.encode()]}
    return {"tag": tag, "tensor": tensor, "metadata": {"plugin_data": {"plugin_name": "text"}}}


def _histogram(tag: str, counts: list[int]) -> dict:
    """A value of a summary: bins from the first that is not empty to the last such."""
    edges = [float(edge) for edge in histogram_edges()]
    found = [k for k, count in enumerate(counts) if count] or [0]
    first, end = found[0], found[-1] + 1
    about = {"min": edges[first], "max": edges[end], "num": sum(counts)}
    return {
        "tag": tag,
        "histo": about | {"bucket": counts[first:end], "bucket_limit": edges[first + 1 : end + 1]},
    }
