"""Arrays of a model in files of safetensors, with an index where there are several."""

import errno
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from trainit.cluster.files import write_json

SHARD_BYTES = 1 << 30  # of a file, unless one array is larger


def write(folder: Path, parts: Iterable[dict[str, np.ndarray]], dtype: str) -> int:
    """Writes named arrays as `dtype` into files of at most SHARD_BYTES; returns the bytes of all arrays.

    One file, twice while it is written, and one of the parts are in memory at a time.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    size = total = 0

    def close() -> None:
        nonlocal waiting, size
        path = folder / f"{len(shards)}.unnamed"
        try:
            save_file(waiting, path, {"format": "pt"})
        except SafetensorError as error:  # as of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from None
        shards.append(list(waiting))
        waiting, size = {}, 0

    for part in parts:
        for name, array in part.items():
            value = np.ascontiguousarray(array).astype(jnp.dtype(dtype))
            if waiting and size + value.nbytes > SHARD_BYTES:
                close()
            waiting[name] = value
            size, total = size + value.nbytes, total + value.nbytes
    close()

    # How many there are is known only now.
    index: dict[str, str] = {}
    of = f"-of-{len(shards):05d}"
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}{of}.safetensors"
        path = (folder / f"{number - 1}.unnamed").rename(folder / file)
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", content)
    return total
