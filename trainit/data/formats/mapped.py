"""Files of token ids, mapped into memory: they are read where they are used."""

import functools
import os
from pathlib import Path

import numpy as np

from trainit.config import ConfigError
from trainit.tokenizers.chat.marks import DTYPE


class DatasetError(ConfigError):
    """A dataset that cannot be used. The message is one line and says what to do."""


class MappedIds:
    """A file of ids after `offset` bytes, which is read only where it is used."""

    def __init__(self, path: str, dtype: str, offset: int = 0):
        self._file, self._offset = Path(path).open("rb"), offset  # noqa: SIM115, open as long as the ids are
        self._bytes = os.fstat(self._file.fileno()).st_size
        self._ids = np.memmap(self._file, dtype, "r", offset).view(np.ndarray)
        self._view = functools.cache(functools.partial(np.lib.stride_tricks.sliding_window_view, self._ids))

    def _check_size(self) -> None:
        """Raises DatasetError if the file has been cut off: to read beyond its end would kill the process."""
        if (size := os.fstat(self._file.fileno()).st_size) < self._bytes:
            now = f"{self._file.name} has {size} bytes; it had {self._bytes} when it was opened"
            raise DatasetError(f"{now}: it was cut off while it was read; copy or prepare it again")

    def __getitem__(self, part: slice) -> np.ndarray:
        self._check_size()
        return self._ids[part]

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        """Returns (n, size): the ids from each start on.

        The system learns all places first, to read them together. Without that, each read waits for the one
        before, and reads ahead in vain.
        """
        self._check_size()
        width, file = self._ids.itemsize, self._file.fileno()
        for start in starts.tolist() if hasattr(os, "posix_fadvise") else ():  # macOS lacks it
            os.posix_fadvise(file, self._offset + start * width, size * width, os.POSIX_FADV_WILLNEED)
        return self._view(size)[starts]


class MarkedIds(MappedIds):
    """A file of ids with their marks, which lie next to it."""

    def __init__(self, path: str):
        marks = Path(path).with_suffix(".marks")
        super().__init__(path, f"<u{Path(path).stat().st_size // marks.stat().st_size}")
        self._marks = MappedIds(str(marks), "u1")

    def __getitem__(self, part: slice) -> np.ndarray:
        return super().__getitem__(part).astype(DTYPE) | (self._marks[part].astype(DTYPE) << 30)

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        return super().windows(starts, size).astype(DTYPE) | (
            self._marks.windows(starts, size).astype(DTYPE) << 30
        )
