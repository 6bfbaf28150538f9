"""An optimizer in a file outside the package, by its path."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from trainit.config import ConfigError, require


def load(path: str) -> ModuleType:
    """The file as a module.

    Args:
        path: ends with .py; a relative one counts from the working directory.

    Raises:
        ConfigError: there is no such file, it fails, or it lacks one of the two functions.
    """
    file = Path(path).expanduser().absolute()
    require(file.is_file(), f"optimizer={path}: there is no such file in {file.parent}")
    return _execute(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _execute(file: Path, modified: int) -> ModuleType:
    """Once for each state of the file."""
    del modified
    spec = importlib.util.spec_from_file_location(str(file), file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"optimizer={file} raises {type(error).__name__}: {error}") from None
    for function in ("get_config", "make"):
        require(callable(getattr(module, function, None)), f"optimizer={file} has no function {function}")
    return module
