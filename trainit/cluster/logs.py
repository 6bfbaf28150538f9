"""Messages in the terminal and in log files."""

import logging as std_logging
import sys
from pathlib import Path

from absl import logging
from tqdm import tqdm

PACKAGE = str(Path(__file__).parents[1])


class _Terminal(std_logging.Handler):
    """Prints Trainit's messages, and others' errors as one line each, above tqdm's progress bar."""

    def emit(self, record: std_logging.LogRecord):
        if record.pathname.startswith(PACKAGE):
            tqdm.write(self.format(record), file=sys.stderr)
        elif record.levelno >= std_logging.ERROR:  # the log file has the traceback
            first, *_ = record.getMessage().splitlines() or [""]
            tqdm.write(f"{record.name}: {first}", file=sys.stderr)


def log_to_terminal(lead: bool):
    """Prints the messages of the lead process, and of other processes only the warnings."""
    std_logging.getLogger().handlers = [_Terminal(std_logging.INFO if lead else std_logging.WARNING)]
    logging.set_verbosity(logging.INFO)


def log_to_file(path: Path):
    """Appends messages of all kinds and libraries to a file too, each with its time."""
    file = std_logging.FileHandler(path)
    file.setFormatter(std_logging.Formatter("%(asctime)s %(levelname)s %(filename)s:%(lineno)d %(message)s"))
    std_logging.getLogger().addHandler(file)
    std_logging.raiseExceptions = False  # else each line that a full disk has no room for is a traceback


def quantity(number: float) -> str:
    """1234567 -> "1.23 M"."""
    for factor, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"
