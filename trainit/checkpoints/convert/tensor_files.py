"""Arrays of a folder of safetensors, each as a view into its file: what is not used is not read."""

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from trainit.config import ConfigError, require

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # of models; no others are read
INDEX = "model.safetensors.index.json"


def views(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a model by name, mapped from its files.

    Raises ConfigError if a file is missing, cut or no safetensors, or lacks what the index says.
    """
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map", {})
        found = {
            name: (file, view) for file in sorted(set(places.values())) for name, view in _of(folder / file)
        }
        wrong = [name for name, file in places.items() if found.get(name, ("",))[0] != file]
        require(not wrong, f"{folder / INDEX}: {wrong[:1]} is not in the file that it names")
        return {name: view for name, (_, view) in found.items()}
    require(
        (folder / "model.safetensors").exists(),
        f"{folder} has neither model.safetensors nor {INDEX}; weights in other forms are not read",
    )
    return dict(_of(folder / "model.safetensors"))


def _of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of one file: 8 bytes of length, a header in JSON, and the numbers."""
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            require(8 + length <= size, f"{path} is no safetensors file, or is cut: it has {size:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        end = begin + max((about["data_offsets"][1] for about in header.values()), default=0)
        require(size == end, f"{path} has {size:,} bytes, and by its header {end:,}: it is cut or damaged")
        content = np.memmap(path, np.uint8, "r")
        for name, about in header.items():
            kind, shape, (first, last) = about["dtype"], about["shape"], about["data_offsets"]
            if kind in TYPES:
                dtype = np.dtype(TYPES[kind])
                require(
                    last - first == math.prod(shape) * dtype.itemsize,
                    f"{path} is damaged: {name} has {last - first} bytes, not those of {kind}{shape}",
                )
                yield name, content[begin + first : begin + last].view(dtype).reshape(shape)
            else:  # masks and the like of old versions are of other types
                yield name, np.zeros(0, np.bool)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no safetensors file: {error}") from None


def release(view: np.ndarray) -> None:
    """Gives back what has been read of the file of a view, which counts as memory of this process."""
    content: Any = view
    while isinstance(content, np.ndarray):
        content = content.base
    if isinstance(content, mmap.mmap):
        content.madvise(mmap.MADV_DONTNEED)


def read_json(path: Path) -> dict:
    """An object of JSON; ConfigError if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    require(isinstance(content, dict), f"{path} is damaged: it holds no JSON object")
    return content
