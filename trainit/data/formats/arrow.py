"""Token ids in the column `input_ids` of Arrow files, as Hugging Face's `datasets` saves, and parquet files.

Rows follow each other as they are stored: nothing is put between them. Arrow files are mapped and not copied.
Parquet files are compressed: a process keeps a few decompressed row groups, so that reading in order
decompresses each group once, and reading at random decompresses a group for each row.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainit.data.dataset import DatasetError, pieces
from trainit.data.formats.binary import Shard

COLUMN = "input_ids"
ROW_GROUPS = 4  # of parquet files that a process keeps decompressed


class Chunks:
    """Arrays one after another, sliced as if they were one. It loads only the arrays that a slice needs."""

    def __init__(self, sizes: Sequence[int], load: Callable[[int], np.ndarray]):
        self._ends, self._load = list(itertools.accumulate(sizes)), load

    def __getitem__(self, part: slice) -> np.ndarray:
        stop = min(part.stop, self._ends[-1])
        found = [self._load(chunk)[first:last] for chunk, first, last in pieces(self._ends, part.start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)


def inspect_arrow(path: Path) -> list[Shard]:
    """Returns what an Arrow file holds. Only the heads of its record batches are read."""
    tokens, lengths, dtype = 0, set(), ""
    for column, ids in _arrow_batches(path):
        tokens, dtype = tokens + len(ids), ids.dtype.str
        lengths.add(_row_length(len(column), len(ids), len(column[0]) if len(column) else 0))
    return [Shard(path, "Arrow", tokens, _only(lengths), dtype, functools.partial(open_arrow, path))]


def open_arrow(path: Path) -> Chunks:
    """The ids of an Arrow file, mapped: one array a record batch."""
    arrays = [ids for _, ids in _arrow_batches(path)]
    return Chunks([len(ids) for ids in arrays], arrays.__getitem__)


def inspect_parquet(path: Path) -> list[Shard]:
    """Returns what a parquet file holds, from its footer and its first row."""
    with _parquet(path) as file:
        sizes = _group_sizes(file)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        some = file.iter_batches(1, columns=[COLUMN], use_threads=False) if sum(rows) else ()
        first = next((len(batch.column(0)[0].as_py() or ()) for batch in some), 0)  # length of the first row
        dtype = f"<u{_item_type(path, file.schema_arrow.field(COLUMN).type).bit_width // 8}"
    lengths = {_row_length(*counts, first) for counts in zip(rows, sizes, strict=True)}
    opener = functools.partial(open_parquet, path)
    return [Shard(path, "parquet", sum(sizes), _only(lengths), dtype, opener)]


def open_parquet(path: Path) -> Chunks:
    """The ids of a parquet file: one array a row group, decompressed when it is needed."""
    with _parquet(path) as file:
        sizes = _group_sizes(file)
    return Chunks(sizes, lambda group: _row_group(path, group, sizes[group]))


@functools.lru_cache(maxsize=ROW_GROUPS)
def _row_group(path: Path, group: int, expected: int) -> np.ndarray:
    with _parquet(path) as file:
        column = file.read_row_group(group, columns=[COLUMN], use_threads=False).column(0)
        ids = np.concatenate([_ids(path, chunk) for chunk in column.chunks])
    if len(ids) != expected:
        raise DatasetError(f"{path}: row group {group} has {len(ids)} ids, its head says {expected}")
    return ids


def _row_length(rows: int, tokens: int, first: int) -> int | None:
    """Returns the length of all rows if it is that of the first, 0 if they differ, None without rows."""
    if not rows:
        return None
    return first if rows * first == tokens else 0


def _only(lengths: set[int | None]) -> int:
    known = [length for length in lengths if length is not None]
    return known[0] if len(known) == 1 else 0


def _arrow_batches(path: Path) -> Iterator[tuple[Any, np.ndarray]]:
    """The column of each record batch, and its ids: views of the mapped file."""
    pa = _pyarrow(path)
    try:
        content = pa.memory_map(str(path)).read_buffer()
        if content.slice(0, 6).to_pybytes() == b"ARROW1":
            file = pa.ipc.open_file(content)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            batches = file = pa.ipc.open_stream(content)
        if COLUMN not in file.schema.names:
            raise _no_column(path, file.schema.names)
        for batch in batches:
            column = batch.column(COLUMN)
            ids = _ids(path, column)
            stored = column.values.buffers()[-1]
            if len(ids) and not 0 <= stored.address - content.address < content.size:
                raise DatasetError(f"{path} is compressed; save it with save_to_disk, or as parquet")
            yield column, ids
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}); copy or make it again") from None


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Opens a parquet file with a column of ids; damage that the block finds is reported by its name."""
    pa = _pyarrow(path)
    try:
        with pa.parquet.ParquetFile(path, buffer_size=1 << 16) as file:
            if COLUMN not in file.schema_arrow.names:
                raise _no_column(path, file.schema_arrow.names)
            _item_type(path, file.schema_arrow.field(COLUMN).type)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is damaged ({error}); copy or make it again") from None


def _group_sizes(file: Any) -> list[int]:
    """Ids of each row group. An empty row counts as a value, but not in the statistics."""
    schema, about = file.schema, file.metadata
    (column,) = (i for i in range(len(schema)) if schema.column(i).path.split(".")[0] == COLUMN)
    columns = [about.row_group(group).column(column) for group in range(about.num_row_groups)]
    return [c.statistics.num_values if c.statistics else c.num_values for c in columns]


def _ids(path: Path, column: Any) -> np.ndarray:
    """The ids of a column of lists as unsigned integers: without a copy, if they lie in their order."""
    _item_type(path, column.type)
    values = _values_of_views(column) if "list_view" in str(column.type) else column.flatten()
    if column.null_count or values.null_count:
        raise DatasetError(f"{path}: {COLUMN} has rows or ids that are null; leave them out")
    ids = values.to_numpy(zero_copy_only=True)
    return ids.view(f"<u{ids.itemsize}")


def _values_of_views(column: Any) -> Any:
    """The values of lists that each say where they lie, which may be in any order and with gaps."""
    if not len(column) or column.null_count:
        return column.flatten()
    offsets, sizes = column.offsets.to_numpy(), column.sizes.to_numpy()
    if (offsets[1:] != offsets[:-1] + sizes[:-1]).any():
        return column.flatten()
    return column.values.slice(offsets[0], sizes.sum())


def _item_type(path: Path, kind: Any) -> Any:
    """The type of the integers in lists of this type."""
    types = _pyarrow(path).types
    kinds = "list", "large_list", "fixed_size_list", "list_view", "large_list_view"
    if not any(getattr(types, f"is_{name}")(kind) for name in kinds) or not types.is_integer(kind.value_type):
        raise DatasetError(f"{path}: {COLUMN} is of type {kind} instead of a list of integers")
    return kind.value_type


def _no_column(path: Path, names: list[str]) -> DatasetError:
    return DatasetError(f"{path} has no column {COLUMN}, only {', '.join(names)}: tokenize it first")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DatasetError(f"reading {path} needs pyarrow: pip install 'trainit[parquet]'") from None
    return pyarrow
