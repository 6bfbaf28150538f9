"""Files that are there in full or not at all, whoever else writes them and whenever a process is killed."""

import json
import os
import socket
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes):
    """Writes a file to disk under another name, and renames it. What was there stays until then.

    Several processes on several hosts may write the same file: one of them wins, with its whole content.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full; nothing is left behind then.
    """
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any):
    """Writes a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
