"""Optimizers: each is one file with two functions.

def get_config() -> ConfigDict                       # name, learning_rate, weight_decay, its own
def make(config, context) -> optax.GradientTransformation

`optimizer=NAME` finds the file here by its name, `optimizer=path/to/mine.py` one anywhere, and
`optimizer=optax.NAME` or `optax.contrib.NAME` an optimizer of optax. `optimizer=WRAPPER+NAME` changes
any of them by one of `wrappers`. Names that begin with an underscore are helpers.
"""

import functools
import hashlib
import importlib
import pkgutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trainit.config import (
    OPTIMIZER_FIELDS,
    Config,
    ConfigDict,
    ConfigError,
    batch_sizes,
    check_fields,
    require,
)
from trainit.model.gpt import GPT
from trainit.optimizers import wrappers
from trainit.optimizers.common import groups as _groups
from trainit.optimizers.common import low_bit_state, optax_adapter, registry, schedules
from trainit.optimizers.common.schedules import Schedule
from trainit.parallel.layout import check_blocks, parameter_kind
from trainit.parallel.trees import path_name

ROUNDING = zlib.crc32(b"rounding")  # what the key is folded with, from which the state is rounded


class _Choices(Mapping):
    """Iterates over the names of the files here; takes the other names too."""

    def __iter__(self) -> Iterator[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
        return (name for name in names if not name.startswith("_"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Callable[[], ConfigDict]:
        _load(name)
        return functools.partial(_config, name)


def choices() -> Mapping[str, Callable[[], ConfigDict]]:
    """Every optimizer's name and what makes its config: the group for `config.choose`."""
    return _Choices()


def _load(name: str):
    """What has the two functions. Raises KeyError for an unknown name, ConfigError for what it cannot be."""
    if "+" in name:
        wrapper, _, base = name.partition("+")
        there = [module.name for module in pkgutil.iter_modules(wrappers.__path__)]
        require(
            wrapper in there, f"optimizer={name}: unknown wrapper {wrapper!r}: there are {', '.join(there)}"
        )
        require(
            "schedule_free" not in base.split("+"),
            f"optimizer={name}: schedule_free averages what parameters do, and so must come first",
        )
        module = importlib.import_module(f"{wrappers.__name__}.{wrapper}")
        return _Wrapped(wrapper, module, base, _load(base))
    if name.endswith(".py"):
        return registry.load(name)
    if name.startswith("optax."):
        return optax_adapter.load(name)
    if name not in list(_Choices()):
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


@dataclass(frozen=True)
class _Wrapped:
    """A wrapper around another optimizer, with the two functions of an optimizer's file."""

    wrapper: str
    module: ModuleType
    base: str
    loaded: Any  # the other's two functions

    def get_config(self) -> ConfigDict:
        return self.module.get_config(_config(self.base))

    def make(self, config: Config, context: "Context") -> optax.GradientTransformation:
        own = {field: value for field, value in config.items() if field != self.wrapper}
        base = Config(own | {"name": self.base})

        def make_base(context: Context) -> optax.GradientTransformationExtraArgs:
            return optax.with_extra_args_support(self.loaded.make(base, context))

        return self.module.wrap(config[self.wrapper], context, make_base)


def own_files_hash(config: Config, groups: Sequence[str]) -> str:
    """Of the content of all files outside the package that a run's optimizers are; "" without any."""
    words = [config.name, *(word.removeprefix("optimizer=") for line in groups for word in str(line).split())]
    files = sorted({word.rpartition("+")[2] for word in words if word.endswith(".py")})
    content = b"".join(
        Path(file).expanduser().read_bytes() for file in files if Path(file).expanduser().is_file()
    )
    return hashlib.sha256(content).hexdigest()[:8] if files else ""


def _config(name: str) -> ConfigDict:
    """The config of an optimizer, with the name by which it is found again."""
    try:
        config = ConfigDict(_load(name).get_config().copy_and_resolve_references())
        config.name = name
        config.declare_rest(OPTIMIZER_FIELDS)
        lacking = {"learning_rate", "weight_decay"} - set(config)
    except Exception as error:
        raise ConfigError(f"optimizer={name}: get_config raises {type(error).__name__}: {error}") from None
    require(not lacking, f"optimizer={name}: its get_config declares no {' and no '.join(sorted(lacking))}")
    return config


@dataclass(frozen=True)
class Context:
    """What an optimizer may want to know of the run that it serves."""

    schedule: Schedule  # step -> learning rate
    steps: int  # of the whole run
    parameters: dict  # shapes and dtypes, as nested as the parameters
    weight_decay: float
    clip_norm: float  # 0: no clipping
    key: jax.Array  # for the optimizer's own randomness: uint32 (2,), as checkpoints can hold
    mesh: Mesh | None = None  # None: one device

    def by_path(self, function: Callable[[str, str], Any]) -> dict:
        """function(path, kind) for every parameter, kinds being those of `parameter_kind`."""
        return _by_path(function, self.parameters)

    @property
    def decay_mask(self) -> dict:
        """True where weights decay: matrices, embeddings and the head; not biases and norms' scales."""
        return _decays(self.parameters)

    def clip(self) -> optax.GradientTransformation:
        """The gradient, clipped by its global norm: what comes first."""
        return _clip(self.clip_norm) if self.clip_norm else optax.identity()

    def decay(self) -> optax.GradientTransformation:
        """Adds weight_decay * parameters where `decay_mask` says so, for all parameters or some."""
        return optax.add_decayed_weights(self.weight_decay, _decays)

    def descend(
        self, direction: optax.GradientTransformation, decay: str = "decoupled"
    ) -> optax.GradientTransformation:
        """Completes a direction to an optimizer.

        The gradient is clipped by its global norm, goes through `direction`, and is multiplied by minus
        the scheduled learning rate.

        Args:
            direction: of gradients.
            decay: "decoupled": weight_decay * parameters is added behind the direction (Loshchilov & Hutter
                2017, arXiv 1711.05101); "coupled": to the clipped gradient, before it; "own": nowhere.
        """
        order = {
            "decoupled": (direction, self.decay()),
            "coupled": (self.decay(), direction),
            "own": (direction,),
        }
        return optax.chain(self.clip(), *order[decay], scale_by_minus(self.schedule))


def _clip(most: float) -> optax.GradientTransformation:
    """As optax.clip_by_global_norm, by a factor: a choice between two gradients would keep both in memory."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda u: (factor * u.astype(jnp.float32)).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _by_path(function: Callable[[str, str], Any], tree: dict) -> dict:
    def apply(path, _):
        name = path_name(path)
        return function(name, parameter_kind(name))

    return jax.tree.map_with_path(apply, tree)


def _decays(tree: dict) -> dict:
    return _by_path(lambda path, kind: kind != "vector", tree)


def scale_by_minus(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -schedule(step), `step` being the run's and not a count of its own.

    A skipped update therefore does not shift the schedule.
    """

    def update(updates, state, params=None, *, step, **extra_args):
        del params, extra_args
        rate = -schedule(step)
        return jax.tree.map(lambda u: (rate * u.astype(jnp.float32)).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def logged(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What optimizers tell of themselves: scalars in a dict that is a field `logged` of their state.

    Returns:
        {"optimizer/NAME": scalar}; of a group of parameters, "optimizer/GROUP/NAME".
    """
    found = {}
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        names = path_name(path).split("/")
        if "logged" in names:
            group = names[names.index("inner_states") + 1 :][:1] if "inner_states" in names else []
            found["/".join(["optimizer", *group, names[-1]])] = leaf
    return found


def training_point(opt_state: optax.OptState, params: dict) -> dict:
    """Where the next gradient is to be taken: at the parameters, unless a state has a method that says where.

    Args:
        opt_state: of the whole run.
        params: that the model has, and is validated at.
    """
    if isinstance(opt_state, low_bit_state.NarrowState):
        opt_state = low_bit_state.decode(opt_state)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "training_point")):
        params = state.training_point(params) if hasattr(state, "training_point") else params
    return params


def of_run(
    config: Config, schedule: Schedule, parameters: dict, key: jax.Array, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a whole resolved config describes, as `build`; other arguments as in `Context`."""
    context = Context(
        schedule=schedule,
        steps=config.steps,
        parameters=parameters,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.clip_norm,
        key=key,
        mesh=mesh,
    )
    return build(config.optimizer, context, config.parameter_groups, config.optimizer_state)


def check(config: Config):
    """What is wrong with a run's optimizer or its groups, found out on shapes: no device is touched.

    Args:
        config: whole and resolved.

    Raises:
        ConfigError: as `build`; or its state has what no checkpoint can hold; or a group's optimizer takes
            gradients elsewhere, for which it must have all parameters.
    """
    model = GPT(config.model)

    def begin():
        key = jax.random.key(0)
        params = model.init(key)
        schedule = schedules.build(config.schedule, config.optimizer.learning_rate, batch_sizes(config))
        optimizer = of_run(config, schedule, jax.eval_shape(model.init, key), jax.random.key_data(key))
        state = optimizer.init(params)
        if config.parameter_groups:
            elsewhere = functools.partial(_require_all, params)
            optimizer.update(
                params,
                state,
                params,
                step=jnp.int32(0),
                gradient_at=elsewhere,
                sampled_gradient_at=lambda there, key: (elsewhere(there), 1.0),
            )
        return state

    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(begin)):
        require(
            not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended),
            f"optimizer.name={config.optimizer.name}: its state has {path_name(path)} of type "
            f"{leaf.dtype}, which no checkpoint can hold; keep jax.random.key_data of it",
        )


def _require_all(params: dict, there: dict) -> dict:
    """`there`, unless it lacks some of the parameters."""
    require(
        jax.tree.structure(there) == jax.tree.structure(params),
        "parameter_groups: an optimizer that takes gradients elsewhere, as sam+NAME and sophia, must have "
        "all parameters",
    )
    return there


def assigned(
    config: Config, groups: Sequence[str], parameters: dict
) -> tuple[dict, dict[str, tuple[Config, list[str]]]]:
    """Which optimizer each parameter has.

    Args:
        config: the sub-config `optimizer`, for what matches no group.
        groups: lines of `_groups`.
        parameters: their shapes.

    Returns:
        A label for each parameter, and {label: (its optimizer's config, its parameters' paths)}.
    """
    patterns, configs = zip(*(_groups.read(line, config, choices()) for line in groups), strict=True)
    labels = _groups.assign(patterns, parameters)
    named = [*((str(i), c) for i, c in enumerate(configs)), (_groups.REST, config)]
    return labels, {label: (own, _groups.paths(labels, label)) for label, own in named}


def build(
    config: Config, context: Context, groups: Sequence[str] = (), state: str = "float32"
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run. Its update takes `step`, the run's, beside the gradients.

    Args:
        config: the sub-config `optimizer`; its name says which.
        context: what it may know.
        groups: lines of `_groups`; the first that matches a parameter's path counts, `config` for the rest.
        state: in what its state is kept: float32, bfloat16 or int8.

    Raises:
        ConfigError: there is none of this name, it has other fields, or refuses their values; a group
            cannot be read, or has no parameter; the mesh would split blocks of int8.
    """
    optimizer = _join(config, context, groups)
    if state == "float32":
        return optimizer
    if state == "int8" and context.mesh is not None:
        check_blocks(context.parameters, context.mesh)
    key = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(context.key), ROUNDING))
    return low_bit_state.narrow(optimizer, state, context.parameters, key)


def _join(config: Config, context: Context, groups: Sequence[str]) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose state is in whatever types it likes."""
    if not groups:
        return _make(config, context)
    labels, own_configs = assigned(config, groups, context.parameters)
    transforms = {
        label: _make(own, _part(context, labels, label, own, config.learning_rate))
        for label, (own, _) in own_configs.items()
    }
    return optax.chain(context.clip(), optax.partition(transforms, labels))


def _part(context: Context, labels: dict, label: str, config: Config, peak: float) -> Context:
    """The context of one group: its parameters alone, its decay, and the schedule up to its own peak."""
    require(
        peak > 0 or config.learning_rate == peak,
        f"optimizer.learning_rate={peak} must be above 0: groups follow the shape of its schedule",
    )
    factor = config.learning_rate / peak if peak else 1.0
    mine = jax.tree.map(lambda own, p: p if own == label else optax.MaskedNode(), labels, context.parameters)
    return replace(
        context,
        schedule=lambda step: factor * context.schedule(step),
        parameters=mine,
        weight_decay=config.weight_decay,
        clip_norm=0.0,  # all parameters are clipped together, before
    )


def _make(config: Config, context: Context) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.name` names."""
    there = choices()
    if config.name not in there:
        raise ConfigError(f"optimizer.name={config.name!r}: there are {', '.join(sorted(there))}")
    declared = there[config.name]()
    fields = sorted(declared)
    if fields != sorted(config):
        raise ConfigError(
            f"optimizer.name={config.name} has the fields {', '.join(fields)}, not "
            f"{', '.join(sorted(config))}; choose it as a group: --config=FILE:optimizer={config.name}"
        )
    check_fields(config, declared, "optimizer.")
    return optax.with_extra_args_support(_load(config.name).make(config, context))
