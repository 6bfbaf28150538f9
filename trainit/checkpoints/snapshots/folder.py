"""The folder of a host for parts of snapshots: process_N/STEP.PART, where process N of that host writes."""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from trainit.checkpoints.snapshots import parts
from trainit.cluster import sync
from trainit.cluster.files import write_json
from trainit.config import ConfigError

ID_FILE = "snapshots.json"  # in the run's folder, as long as the run may have snapshots


def run_id(workdir: Path) -> str:
    """The name under which hosts keep a run's snapshots. All processes call it together.

    A run that begins again in an emptied folder has another one.
    """
    path, name = workdir / ID_FILE, ""
    if sync.is_lead():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            name = str(json.loads(path.read_text())["id"])
        if not re.fullmatch("[0-9a-f]{16}", name):
            name = secrets.token_hex(8)
            write_json(path, {"id": name})
    return sync.gather_text(name)[0]


def whole_steps(known: Sequence[Collection[Sequence[int]]], after: int) -> list[int]:
    """The steps after `after` with the parts of all processes, newest first.

    `known` has the pairs of step and part that each of the processes finds on its host.
    """
    pairs = {(step, part) for own in known for step, part in own}
    steps = sorted({step for step, _ in pairs if step > after}, reverse=True)
    return [step for step in steps if all((step, part) in pairs for part in range(len(known)))]


class PartFolder:
    """What this process sees of its host's folder, and writes there."""

    def __init__(self, folder: str, run: str, process: int, about: Mapping[str, Any]):
        """Makes the folder; ConfigError if it cannot. `about` describes the run: other parts do not count."""
        self.root = Path(folder or tempfile.gettempdir()).absolute() / f"trainit-{run}"
        self._own, self.about = self.root / f"process_{process}", dict(about)
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.root.lstat()  # no link: it could lead into a folder of this user's
            is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
            if is_own:
                self._own.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"checkpoint.local_folder={folder!r}: {self.root} cannot be written: {error.strerror}"
            ) from None
        if not is_own:
            wrong = f"{self.root} is no folder of this user's alone (of mode 700)"
            raise ConfigError(f"{wrong}: remove it, or set checkpoint.local_folder to one of your own")

    def path(self, step: int, part: int) -> Path:
        """Where this process keeps this part."""
        return self._own / f"{step}.{part}"

    def find(self) -> dict[tuple[int, int], list[Path]]:
        """The files of this run's parts on this host, by step and part; they may be damaged."""
        found: dict[tuple[int, int], list[Path]] = {}
        other: dict[str, Path] = {}
        for path, (step, part) in self._files():
            if path.suffix == ".tmp":  # it was being written
                continue
            try:
                about = parts.read_header(path)["about"]
                differing = [name for name in self.about if about.get(name) != self.about[name]]
            except (OSError, ValueError, KeyError, AttributeError):
                differing = []
                logging.warning("snapshots  %s is damaged: not used", path)
            else:
                if not differing:
                    found.setdefault((step, part), []).append(path)
            other |= dict.fromkeys(differing[:1], path)
        for name, path in other.items():
            logging.warning("snapshots  %s is of a run with another %s: not used", path, name)
        return found

    def keep(self, steps: Collection[int]):
        """Removes what is on this host of other steps than these."""
        for path, (step, _) in self._files():
            if step not in steps:
                path.unlink(missing_ok=True)

    def remove(self):
        """Removes all of it. No process may use it any more."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _files(self) -> list[tuple[Path, tuple[int, int]]]:
        """All parts on this host with step and part, also those that are being written."""
        matches = [(path, re.fullmatch(r"(\d+)\.(\d+)(\.tmp)?", path.name)) for path in self.root.glob("*/*")]
        return [(path, (int(match[1]), int(match[2]))) for path, match in matches if match]
