"""Ids with marks: how batches say which targets count, and where a document ends.

The two highest bits of ids of 32 bits are marks, which are set for conversations only: all other ids of 32
bits are what they look like. On the disk, marks lie next to the ids, and SHARD.marks has a byte for each.
"""

import numpy as np

DTYPE = "<u4"  # of ids with marks
LAST = 1 << 30  # the last token of its document, whatever its id
IGNORED = 1 << 31  # it is no target
END = -2  # model.end_of_text: no id ends a document, the marks do


def mark(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns a document's ids (n,) with marks; `counts` (n,) says which of them are targets."""
    marked = ids.astype(DTYPE) | np.where(counts, 0, IGNORED).astype(DTYPE)
    marked[-1:] |= np.uint32(LAST)
    return marked


def ids_of(marked: np.ndarray) -> np.ndarray:
    """Returns ids without marks; they may have had none."""
    return marked & (LAST - 1) if marked.dtype.itemsize == 4 else marked


def marks_of(marked: np.ndarray) -> np.ndarray:
    """Returns marks as they lie on the disk: uint8, 1 where a document ends, 2 where a token is no target."""
    return (marked >> 30).astype(np.uint8)


def last(marks: np.ndarray) -> np.ndarray:
    """Returns the places of marks (n,), as they lie on the disk, that end a document."""
    return np.flatnonzero(marks & 1)
