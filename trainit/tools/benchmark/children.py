"""Runs parts of a measurement in processes of their own, so that none finds what another has left."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress


def run(module: str, *arguments: str, settings: Mapping[str, str], limit: float | None = None) -> str:
    """Returns the last line that `python -m MODULE ARGUMENTS` prints, with these variables set as well.

    Raises ChildProcessError, with its last error and all of its errors as a note, if it fails, or if it takes
    longer than `limit` seconds. Whatever it has started ends with it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise ChildProcessError(f"it was not done after {limit:.0f} s, and was ended") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception): |trainit: error: ", line)]
        error = ChildProcessError((named or lines)[-1])
        error.add_note(errors)
        raise error
    return (output.strip().splitlines() or [""])[-1]
