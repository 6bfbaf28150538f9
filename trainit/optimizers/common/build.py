"""The optimizer of a run: made from its config, with parameter groups and the precision of its state."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trainit.config import Config, ConfigError, batch_sizes, check_fields, require
from trainit.model.gpt import GPT
from trainit.optimizers.common import groups as group_lines
from trainit.optimizers.common import low_bit_state, registry, schedules
from trainit.optimizers.common.context import Context
from trainit.optimizers.common.schedules import Schedule
from trainit.parallel.layout import check_blocks
from trainit.parallel.trees import path_name

ROUNDING = zlib.crc32(b"rounding")  # folded into the key, it gives the key with which the state is rounded


@dataclass(frozen=True)
class Optimizer:
    """An optax transformation whose `update` takes the run's `step`, and what the train step plans with."""

    init: Callable[[dict], optax.OptState]
    update: Callable[..., tuple[dict, optax.OptState]]  # (gradients, state, params, *, step, **needs)
    needs: frozenset[str]  # which of `registry.GRADIENTS` its update is to be given as keyword arguments
    elementwise: bool  # its update has no matrix products: cheap enough to be computed twice

    @property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Without the declarations, as optax's own functions take it."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


def of_run(
    config: Config, schedule: Schedule, parameters: dict, key: jax.Array, mesh: Mesh | None = None
) -> Optimizer:
    """The optimizer that a whole resolved config describes. For the other arguments see `Context`."""
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


def build(config: Config, context: Context, groups: Sequence[str] = (), state: str = "float32") -> Optimizer:
    """The optimizer of a run.

    Args:
        config: the sub-config `optimizer`; its name says which.
        context: what it may know of the run.
        groups: lines of `common.groups`; the first that matches a parameter's path counts, `config` for the
            rest.
        state: in what its state is kept: float32, bfloat16 or int8.

    Raises:
        ConfigError: there is none of this name, it has other fields, or refuses their values; a group
            cannot be read, has no parameter, or needs gradients that only all parameters together have;
            the mesh would split blocks of int8.
    """
    optimizer = _join(config, context, groups)
    if state == "float32":
        return optimizer
    if state == "int8" and context.mesh is not None:
        check_blocks(context.parameters, context.mesh)
    key = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(context.key), ROUNDING))
    rounded = low_bit_state.narrow(optimizer.transformation, state, context.parameters, key)
    return replace(optimizer, init=rounded.init, update=rounded.update)


def check(config: Config):
    """Finds out what is wrong with a run's optimizer or its groups on shapes: no device is touched.

    Args:
        config: whole and resolved.

    Raises:
        ConfigError: as `build`; or its state has what no checkpoint can hold; or the update in a file of the
            user's asks for gradients that the file does not declare.
    """
    model = GPT(config.model)

    def begin():
        key = jax.random.key(0)  # in here, where it is no array on a device
        params = model.init(key)
        schedule = schedules.build(config.schedule, config.optimizer.learning_rate, batch_sizes(config))
        optimizer = of_run(config, schedule, jax.eval_shape(model.init, key), jax.random.key_data(key))
        state = optimizer.init(params)
        # The package's own files are known to declare what they need; a test holds them to it.
        if registry.own_files(config.optimizer, config.parameter_groups):
            gradients = {
                "gradient_at": lambda params: params,
                "sampled_gradient_at": lambda params, key: (params, 1.0),
            }
            needed = {name: gradients[name] for name in optimizer.needs}
            optimizer.update(params, state, params, step=jnp.int32(0), **needed)
        return state

    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(begin)):
        require(
            not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended),
            f"optimizer.name={config.optimizer.name}: its state has {path_name(path)} of type "
            f"{leaf.dtype}, which no checkpoint can hold; keep jax.random.key_data of it",
        )


def assigned(
    config: Config, groups: Sequence[str], parameters: dict
) -> tuple[dict, dict[str, tuple[Config, list[str]]]]:
    """Which optimizer each parameter has.

    Args:
        config: the sub-config `optimizer`, for what matches no group.
        groups: lines of `common.groups`.
        parameters: their shapes.

    Returns:
        A label for each parameter, and {label: (its optimizer's config, its parameters' paths)}.
    """
    read = [group_lines.read(line, config, registry.choices()) for line in groups]
    labels = group_lines.assign([pattern for pattern, _ in read], parameters)
    named = [*((str(i), own) for i, (_, own) in enumerate(read)), (group_lines.REST, config)]
    return labels, {label: (own, group_lines.paths(labels, label)) for label, own in named}


def _join(config: Config, context: Context, groups: Sequence[str]) -> Optimizer:
    """The optimizer of all parameters, its state in whatever types it likes."""
    if not groups:
        return _make(config, context)
    labels, members = assigned(config, groups, context.parameters)
    parts = {
        label: _make(own, _part(context, labels, label, own, config.learning_rate))
        for label, (own, _) in members.items()
    }
    for label, (own, paths) in members.items():
        require(
            not parts[label].needs or len(paths) == len(jax.tree.leaves(context.parameters)),
            f"parameter_groups: an optimizer that takes gradients elsewhere, as {own.name}, must have all "
            f"parameters",
        )
    transformations = {label: part.transformation for label, part in parts.items()}
    joined = optax.chain(context.clip(), optax.partition(transformations, labels))
    return Optimizer(
        joined.init,
        joined.update,
        needs=frozenset().union(*(part.needs for part in parts.values())),
        elementwise=all(part.elementwise for part in parts.values()),
    )


def _part(context: Context, labels: dict, label: str, config: Config, peak: float) -> Context:
    """The context of one group: its parameters alone, its decay, and the schedule up to its own peak."""
    require(
        peak > 0 or config.learning_rate == peak,
        f"optimizer.learning_rate={peak} must be above 0: groups follow the shape of its schedule",
    )
    factor = config.learning_rate / peak if peak else 1.0
    parameters = jax.tree.map(
        lambda own, p: p if own == label else optax.MaskedNode(), labels, context.parameters
    )
    return replace(
        context,
        schedule=lambda step: factor * context.schedule(step),
        parameters=parameters,
        weight_decay=config.weight_decay,
        clip_norm=0.0,  # all parameters are clipped together, before
    )


def _make(config: Config, context: Context) -> Optimizer:
    """The optimizer that `config.name` names."""
    choices = registry.choices()
    if config.name not in choices:
        raise ConfigError(f"optimizer.name={config.name!r}: there are {', '.join(choices)}")
    declared = choices[config.name]()
    fields = sorted(declared)
    require(
        fields == sorted(config),
        f"optimizer.name={config.name} has the fields {', '.join(fields)}, not "
        f"{', '.join(sorted(config))}; choose it as a group: --config=FILE:optimizer={config.name}",
    )
    check_fields(config, declared, "optimizer.")
    definition = registry.load(config.name)
    needs = frozenset(definition.needs(config))
    require(
        needs <= registry.GRADIENTS,
        f"optimizer={config.name}: NEEDS has {', '.join(sorted(needs - registry.GRADIENTS))}; a step can "
        f"give {' and '.join(sorted(registry.GRADIENTS))}",
    )
    made = optax.with_extra_args_support(definition.make(config, context))
    refused = {name: _refuse(config.name, name) for name in registry.GRADIENTS - needs}

    def update(gradients, state, params=None, **extra_args):
        return made.update(gradients, state, params, **extra_args | refused)

    return Optimizer(made.init, update, needs, definition.elementwise)


def _refuse(optimizer: str, gradient: str) -> Callable:
    """Stands in for a gradient function that the optimizer's file does not declare."""

    def refuse(*args):
        raise ConfigError(
            f"optimizer={optimizer} calls {gradient} but does not declare it: add "
            f"NEEDS = {{{gradient!r}}} to its file"
        )

    return refuse


def logged(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What optimizers report of themselves: scalars in a dict that is a field `logged` of their state.

    Returns:
        {"optimizer/NAME": scalar}; for a group of parameters "optimizer/GROUP/NAME".
    """
    scalars = {}
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        names = path_name(path).split("/")
        if "logged" in names:
            group = names[names.index("inner_states") + 1 :][:1] if "inner_states" in names else []
            scalars["/".join(["optimizer", *group, names[-1]])] = leaf
    return scalars


def training_point(opt_state: optax.OptState, params: dict) -> dict:
    """Where the next gradient is to be taken: at the parameters, unless a state has a method that says where.

    Args:
        opt_state: the state of the whole run.
        params: that the model has, and is validated at.
    """
    if isinstance(opt_state, low_bit_state.NarrowState):
        opt_state = low_bit_state.decode(opt_state)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "training_point")):
        params = state.training_point(params) if hasattr(state, "training_point") else params
    return params
