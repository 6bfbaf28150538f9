"""One process's part of a snapshot: its shards of the state, copied to the host, and a file of them.

The file has the length of its header (8 bytes), the header's digest, the header as JSON, the shards' bytes
one after another, and their digest. Shards that several devices of the process have are in it once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from trainit.cluster.files import errors_name, new_file
from trainit.parallel.trees import path_name

DIGEST_BYTES = 16
READ_BYTES = 1 << 24  # at a time


class Part(NamedTuple):
    """A part that was read, and is as it was written."""

    path: Path
    header: dict[str, Any]
    content: np.ndarray  # the shards' bytes


def layout(state: Any) -> list[list]:
    """Which shards of each array this process has: [path, dtype, shape, [[[start, stop], ...], ...]].

    The state may be abstract.
    """
    return [
        [path_name(path), str(np.dtype(leaf.dtype)), list(leaf.shape), np.array(_places(leaf)).tolist()]
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


def copy(state: Any) -> list[np.ndarray]:
    """Copies this process's shards of a state to the host, in the order of `layout`.

    The caller may reuse the state's memory as soon as this returns.
    """
    shards: list[jax.Array] = []
    for leaf in jax.tree.leaves(state):
        own = {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
        shards += [own[place] for place in sorted(own)]
    for shard in shards:  # all transfers begin at once
        shard.copy_to_host_async()
    # On CPUs, a NumPy array of a shard is the shard's own memory.
    is_own = jax.local_devices()[0].platform == "cpu"
    return [np.array(shard) if is_own else np.asarray(shard) for shard in shards]


def write(path: Path, header: Mapping[str, Any], shards: list[np.ndarray]) -> int:
    """Writes a part; returns its bytes. OSError leaves nothing.

    It is not forced to the disk: a host that goes down loses its part anyway.
    """
    text, digest = json.dumps(header).encode(), xxhash.xxh3_128()
    with errors_name(path), new_file(path) as file:
        file.write(len(text).to_bytes(DIGEST_BYTES // 2, "little") + _digest_of(text) + text)
        for shard in shards:
            content = np.ascontiguousarray(shard).reshape(-1).view(np.uint8).data
            digest.update(content)
            file.write(content)
        file.write(digest.digest())
        return file.tell()


def read_header(path: Path) -> dict[str, Any]:
    """The header of a part's file. ValueError if it is damaged, OSError if it cannot be read."""
    with errors_name(path), path.open("rb") as file:
        return _read_header(file, path)


def read(path: Path) -> Part:
    """Reads a part into memory; errors as of `read_header`."""
    with errors_name(path), path.open("rb") as file:
        header = _read_header(file, path)
        content = np.fromfile(file, np.uint8)
    content, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if digest.tobytes() != _digest_of(content):
        raise ValueError(f"{path} is damaged")
    return Part(path, header, content)


def is_whole(path: Path) -> bool:
    """Whether a part can be read, and its content is as it was written; needs little memory."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            _read_header(file, path)
            left = path.stat().st_size - file.tell() - DIGEST_BYTES
            while left > 0 and (block := file.read(min(left, READ_BYTES))):
                digest.update(block)
                left -= len(block)
            return file.read() == digest.digest()
    except (OSError, ValueError):
        return False


def restore(part: Part, abstract_state: Any) -> Any:
    """The state of which all processes have read their parts, laid out as `abstract_state`.

    The part must be of this layout: see `layout`.
    """
    offset, arrays = 0, []
    for leaf in jax.tree.leaves(abstract_state):
        shape, dtype = leaf.sharding.shard_shape(leaf.shape), np.dtype(leaf.dtype)
        count, shards = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, {}
        for place in _places(leaf):
            shards[place] = part.content[offset : offset + count].view(dtype).reshape(shape)
            offset += count
        devices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        on_devices = [
            jax.device_put(shards[_bounds(index, leaf.shape)], device) for device, index in devices.items()
        ]
        arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, on_devices))
    return jax.block_until_ready(jax.tree.unflatten(jax.tree.structure(abstract_state), arrays))


def _read_header(file: Any, path: Path) -> dict[str, Any]:
    start = file.read(DIGEST_BYTES // 2 + DIGEST_BYTES)
    size = int.from_bytes(start[: DIGEST_BYTES // 2], "little")
    text = file.read(size) if size <= path.stat().st_size else b""
    if start[DIGEST_BYTES // 2 :] != _digest_of(text):
        raise ValueError(f"{path} is damaged")
    return dict(json.loads(text))


def _digest_of(data: Any) -> bytes:
    return xxhash.xxh3_128(data).digest()


def _places(leaf: Any) -> list[tuple]:
    """The parts of an array that this process's devices have, each once, in order."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return sorted({_bounds(index, leaf.shape) for index in indices})


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    """An index of an array as pairs of start and stop."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
