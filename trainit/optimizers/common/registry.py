"""Finds an optimizer by its name: a file here, a file of the user's, a function of optax, or a wrapper."""

import contextlib
import functools
import hashlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainit.config import OPTIMIZER_FIELDS, USUAL_FIELDS, Config, ConfigDict, ConfigError, field, require
from trainit.config.schema import describe_error
from trainit.optimizers import wrappers
from trainit.optimizers.common import optax_adapter
from trainit.parallel.trees import path_name
from trainit.transforms.context import Context, by_signature

PACKAGE = "trainit.optimizers"
FOLDER = Path(__file__).parent.parent
# Choices that share another one's file: NAME's functions there are get_NAME_config and make_NAME.
VARIANTS = {"muon_og": "muon", "nadam": "adam", "rmsprop": "adam"}
# Wrappers that choose where gradients are taken, with what they do.
FIRST = {
    "schedule_free": "averages what parameters do",
    "ema_nesterov": "takes gradients ahead of the parameters",
}
# Wrappers that apply another optimizer's update elsewhere or with another length, which a sphere cannot have.
BELOW_A_SPHERE = {"mechanic", "offset", "schedule_free"}
# What an update can ask for in addition: functions, each of which costs a forward and backward pass.
GRADIENTS = frozenset({"gradient_at", "sampled_gradient_at"})


@dataclass(frozen=True)
class Definition:
    """What an optimizer's file declares."""

    get_config: Callable[[], ConfigDict]
    make: Callable[[Config, Context], optax.GradientTransformation]
    needs: Callable[[Config], frozenset[str]]  # of GRADIENTS
    elementwise: bool  # updates have no matrix products: cheap enough to be computed twice


class _Choices(Mapping):
    """Iterates over the names of the optimizers in this package; takes all other kinds of names, too."""

    def __iter__(self) -> Iterator[str]:
        files = {module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.ispkg}
        return iter(sorted(files | set(VARIANTS)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Callable[[], ConfigDict]:
        load(name)
        return functools.partial(get_config, name)


def choices() -> Mapping[str, Callable[[], ConfigDict]]:
    """Every optimizer's name and what makes its config: the group for `config.choose`."""
    return _Choices()


def get_config(name: str) -> ConfigDict:
    """The optimizer's default config and its name. ConfigError: its file fails or lacks a required field."""
    try:
        config = ConfigDict(load(name).get_config().copy_and_resolve_references())
        config.name = field(name, "the optimizer's name")
        # Files of the user's may set plain values.
        config.declare_rest(OPTIMIZER_FIELDS if name.startswith("optax.") else USUAL_FIELDS)
        missing = set(OPTIMIZER_FIELDS) - set(config)
    except Exception as error:
        file = str(_absolute(name.rpartition("+")[2]))
        raise ConfigError(f"optimizer={name}: get_config raises {describe_error(error, file)}") from None
    require(not missing, f"optimizer={name}: its get_config declares no {' and no '.join(sorted(missing))}")
    return config


def load(name: str) -> Definition:
    """The optimizer with this name. KeyError: there is none; ConfigError: it cannot be made an optimizer."""
    if "+" in name:
        return _wrapped(name)
    if name.endswith(".py"):
        own = _definition(_load_file(name))
        return replace(own, make=functools.partial(_checked, name, own.make))
    if name.startswith("optax."):
        return _definition(optax_adapter.load(name))
    if name not in list(_Choices()):
        has_optax = callable(getattr(optax, name, None))
        require(not has_optax, f"unknown optimizer {name!r}; did you mean optax.{name}?")
        raise KeyError(name)
    module = importlib.import_module(f"{PACKAGE}.{VARIANTS.get(name, name)}")
    if name in VARIANTS:
        return _definition(module, getattr(module, f"get_{name}_config"), getattr(module, f"make_{name}"))
    return _definition(module)


def _definition(module: Any, get_config: Callable | None = None, make: Callable | None = None) -> Definition:
    """What a module, or an object with the same attributes, declares."""
    declared = frozenset(getattr(module, "NEEDS", ()))
    needs = getattr(module, "needs", lambda config: declared)
    elementwise = getattr(module, "ELEMENTWISE", False)
    return Definition(get_config or module.get_config, make or module.make, needs, elementwise)


def _wrapped(name: str) -> Definition:
    """WRAPPER+NAME: the other optimizer's definition, changed by the wrapper's module."""
    wrapper, _, base_name = name.partition("+")
    available = [module.name for module in pkgutil.iter_modules(wrappers.__path__)]
    unknown = f"optimizer={name}: unknown wrapper {wrapper!r}: there are {', '.join(available)}"
    require(wrapper in available, unknown)
    for other, why in FIRST.items():
        late = f"optimizer={name}: {other} {why}, and so must come first"
        require(other not in base_name.split("+"), late)
    changed = wrapper in BELOW_A_SPHERE and "sphere" in base_name.split("+")
    message = (
        f"optimizer={name}: {wrapper} changes the updates by which sphere keeps norms; leave one of them out"
    )
    require(not changed, message)
    module, base = importlib.import_module(f"{wrappers.__name__}.{wrapper}"), load(base_name)

    def config_of_base(config: Config) -> Config:
        own = {field: value for field, value in config.items() if field != wrapper}
        return Config(own | {"name": base_name})

    def make(config: Config, context: Context) -> optax.GradientTransformation:
        make_base = functools.partial(base.make, config_of_base(config))
        has_fields = wrapper in config
        own = config[wrapper] if has_fields else None
        return module.wrap(own, context, lambda c: by_signature(make_base(c)))

    return Definition(
        get_config=lambda: module.get_config(get_config(base_name)),
        make=make,
        needs=lambda config: frozenset(getattr(module, "NEEDS", ())) | base.needs(config_of_base(config)),
        elementwise=module.ELEMENTWISE and base.elementwise,
    )


def own_files(config: Config, groups: Sequence[str]) -> list[Path]:
    """The files outside the package that a run's optimizers are in, those of its `parameter_groups` too."""
    words = [config.name, *(word.removeprefix("optimizer=") for line in groups for word in str(line).split())]
    names = sorted({word.rpartition("+")[2] for word in words if word.endswith(".py")})
    return [Path(name).expanduser() for name in names]


def own_files_hash(config: Config, groups: Sequence[str]) -> str:
    """A hash of the content of all `own_files`; "" if there are none."""
    files = own_files(config, groups)
    content = b"".join(file.read_bytes() for file in files if file.is_file())
    return hashlib.sha256(content).hexdigest()[:8] if files else ""


def _checked(name: str, make: Callable, config: Config, context: Context) -> optax.GradientTransformation:
    """What `make` of a file of the user's returns; its updates must keep all shapes and the state's types."""
    in_one_line = _in_one_line(name, context.parameters)
    made = in_one_line(make)(config, context)
    returned = f"optimizer={name}: make returns a {type(made).__name__}, not an optax transformation"
    require(isinstance(made, optax.GradientTransformation), returned)
    part = by_signature(made)

    def types(updates, state) -> dict[str, str]:
        tree = {"update": jax.tree.map(lambda u: jnp.asarray(u, jnp.float32), updates), "state": state}
        leaves = jax.tree.leaves_with_path(tree)
        return {path_name(path): f"{jnp.result_type(x)}{list(jnp.shape(x))}" for path, x in leaves}

    def update(gradients, state, params=None, **extra_args):
        updates, new = part.update(gradients, state, params, **extra_args)
        before, after = types(gradients, state), types(updates, new)
        for path in before | after:
            was, now = before.get(path, "nothing"), after.get(path, "nothing")
            require(now == was, f"optimizer={name}: its update returns {path} as {now}, which was {was}")
        return updates, new

    return optax.GradientTransformationExtraArgs(in_one_line(part.init), in_one_line(update))


@contextlib.contextmanager
def _in_one_line(name: str, parameters: dict) -> Iterator[None]:
    """Names file, line and, if it is clear, parameter where a function of a file of the user's fails."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        at = ""
        with contextlib.suppress(Exception):  # frames may hold what is no tree
            at = f" at the parameter {_parameter_at(error, parameters)}"
        message = describe_error(error, str(_absolute(name)))
        raise ConfigError(f"optimizer={name} raises {message}{at}") from error


def _parameter_at(error: Exception, parameters: dict) -> str:
    """The parameter to which the innermost array belongs that is a leaf of any tree. IndexError: none."""
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(parameters)]
    frames = traceback.walk_tb(error.__traceback__)
    values = [value for frame, _ in frames for value in frame.f_locals.values()]
    trees = [value for value in values if isinstance(value, dict | tuple)]
    leaves = [(id(leaf), path_name(path)) for tree in trees for path, leaf in jax.tree.leaves_with_path(tree)]
    owners = {leaf: name for leaf, path in leaves for name in names if f"/{path}".endswith(f"/{name}")}
    return [owners[id(value)] for value in values if isinstance(value, jax.Array) and id(value) in owners][-1]


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _load_file(path: str) -> ModuleType:
    """A file outside the package as a module. ConfigError: there is none, or it is no optimizer's."""
    file = _absolute(path)
    require(file.is_file(), f"optimizer={path}: there is no such file in {file.parent}")
    return _execute(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _execute(file: Path, modified: int) -> ModuleType:
    """Executes a file once for each time of its last change."""
    spec = importlib.util.spec_from_file_location(str(file), file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    with _in_one_line(str(file), {}):  # not by Python's cache, which takes changes within a second for none
        exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
    for function in ("get_config", "make"):
        require(callable(getattr(module, function, None)), f"optimizer={file} has no function {function}")
    return module
