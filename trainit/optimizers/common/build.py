"""The optimizer of a run: made from its config, with parameter groups and the precision of its state."""

import functools
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
from trainit.optimizers.common import low_bit_state, registry
from trainit.parallel.layout import check_blocks, parameter_kind
from trainit.parallel.trees import path_name
from trainit.transforms import schedules
from trainit.transforms.context import Context, by_signature
from trainit.transforms.schedules import Schedule

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
    decay, clip_norm = config.optimizer.weight_decay, config.clip_norm
    context = Context(schedule, config.steps, parameters, decay, clip_norm, key, mesh)
    return build(config.optimizer, context, config.parameter_groups, config.optimizer_state)


def build(config: Config, context: Context, groups: Sequence[str] = (), state: str = "float32") -> Optimizer:
    """The optimizer of a run: that of the sub-config `optimizer` for what no line of `groups` matches.

    Its state is kept as `state`: float32, bfloat16 or int8. ConfigError: there is none of this name, it has
    other fields or refuses their values; a group cannot be read, has no parameter, or needs gradients of all
    parameters; the mesh would split blocks of int8.
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
    """Finds what is wrong with the optimizer and groups of a resolved config on shapes: no device is touched.

    ConfigError: as `build`; or the state has what no checkpoint can hold; or a file of the user's asks for
    gradients that it does not declare.
    """
    names = " ".join([config.optimizer.name, *map(str, config.parameter_groups)])
    stuck = "optimizer=sphere+NAME: under model.init=zero_outputs, matrices begin at 0 and would stay there"
    require("sphere+" not in names or config.model.init != "zero_outputs", f"{stuck}; set model.init=gpt2")
    shapes = GPT(config.model).shapes

    def begin(params: dict):
        key = jax.random.key_data(jax.random.key(0))  # in here, where it is no array on a device
        schedule = schedules.build(config.schedule, config.optimizer.learning_rate, batch_sizes(config))
        optimizer = of_run(config, schedule, shapes, key)
        state = optimizer.init(params)
        # The package's own files are known to declare what they need; a test holds them to it.
        if registry.own_files(config.optimizer, config.parameter_groups):
            given = {"gradient_at": lambda x: x, "sampled_gradient_at": lambda x, key: (x, 1.0)}
            optimizer.update(training_point(state, params), state, params, step=jnp.int32(0), **given)
        return state

    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(begin, shapes)):
        has = f"optimizer.name={config.optimizer.name}: its state has {path_name(path)} of type {leaf.dtype}"
        message = f"{has}, which no checkpoint can hold; keep jax.random.key_data of it"
        require(not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended), message)


def assigned(
    config: Config, groups: Sequence[str], parameters: dict
) -> tuple[dict, dict[str, tuple[Config, list[str]]]]:
    """A label for each parameter, and {label: (its optimizer's config, its parameters' paths)}."""
    read = [group_lines.read(line, config, registry.choices()) for line in groups]
    labels = group_lines.assign([pattern for pattern, _ in read], parameters)
    named = [*((str(i), own) for i, (_, own) in enumerate(read)), (group_lines.REST, config)]
    return labels, {label: (own, group_lines.paths(labels, label)) for label, own in named}


def _join(config: Config, context: Context, groups: Sequence[str]) -> Optimizer:
    """The optimizer of all parameters, its state in whatever types it likes."""
    if not groups:
        return _make(config, context)
    labels, members = assigned(config, groups, context.parameters)
    parts = {}
    for label, (own, paths) in members.items():
        # What is asked for is done: a group of vectors alone decays if its line says so.
        settings = [] if label == group_lines.REST else group_lines.split(groups[int(label)])[1]
        asks = any(field == "weight_decay" for field, *_ in settings)
        part = _part(context, labels, label, own, config.learning_rate)
        vectors = asks and all(parameter_kind(path) == "vector" for path in paths)
        parts[label] = _make(own, replace(part, decays_vectors=vectors))
        has_all = len(paths) == len(jax.tree.leaves(context.parameters))
        elsewhere = f"an optimizer that takes gradients elsewhere, as {own.name}, must have all parameters"
        require(not parts[label].needs or has_all, f"parameter_groups: {elsewhere}")
    transformations = {label: part.transformation for label, part in parts.items()}
    joined = optax.chain(context.clip(), optax.partition(transformations, labels))
    needs = frozenset[str]().union(*(part.needs for part in parts.values()))
    return Optimizer(joined.init, joined.update, needs, all(part.elementwise for part in parts.values()))


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
    decay, schedule = config.weight_decay, lambda step: factor * context.schedule(step)
    # Without clipping: all parameters are clipped together, before.
    return replace(context, schedule=schedule, parameters=parameters, weight_decay=decay, clip_norm=0.0)


def _make(config: Config, context: Context) -> Optimizer:
    """The optimizer that `config.name` names."""
    choices = registry.choices()
    if config.name not in choices:
        raise ConfigError(f"optimizer.name={config.name!r}: there are {', '.join(choices)}")
    declared = choices[config.name]()
    fields, given = ", ".join(sorted(declared)), ", ".join(sorted(config))
    choose = f"choose it as a group: --config=FILE:optimizer={config.name}"
    require(fields == given, f"optimizer.name={config.name} has the fields {fields}, not {given}; {choose}")
    check_fields(config, declared, "optimizer.")
    definition = registry.load(config.name)
    needs = frozenset(definition.needs(config))
    unknown, known = ", ".join(sorted(needs - registry.GRADIENTS)), " and ".join(sorted(registry.GRADIENTS))
    require(not unknown, f"optimizer={config.name}: NEEDS has {unknown}; a step can give {known}")
    made = by_signature(definition.make(config, context))
    refused = {name: functools.partial(_refuse, config.name, name) for name in registry.GRADIENTS - needs}

    def update(gradients, state, params=None, *, step, **extra_args):
        return made.update(gradients, state, params, step=step, **extra_args | refused)

    return Optimizer(made.init, update, needs, definition.elementwise)


def _refuse(optimizer: str, gradient: str, *args):
    """Stands in for a gradient function that the optimizer's file does not declare."""
    declare = f"add NEEDS = {{{gradient!r}}} to its file"
    raise ConfigError(f"optimizer={optimizer} calls {gradient} but does not declare it: {declare}")


def logged(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """{"optimizer/NAME": scalar}, for a group of parameters "optimizer/GROUP/NAME".

    Optimizers report these in a dict that is a field `logged` of their state.
    """
    scalars = {}
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        names = path_name(path).split("/")
        if "logged" in names:
            group = names[names.index("inner_states") + 1 :][:1] if "inner_states" in names else []
            scalars["/".join(["optimizer", *group, names[-1]])] = leaf
    return scalars


def training_point(opt_state: optax.OptState, params: dict) -> dict:
    """Where the next gradient is taken: at the model's parameters, unless a state's method says where."""
    if isinstance(opt_state, low_bit_state.NarrowState):
        opt_state = low_bit_state.decode(opt_state)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, "training_point")):
        params = state.training_point(params) if hasattr(state, "training_point") else params
    return params
