"""TrainState, its sharded birth, the train step and the eval step."""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax

from trainit import config as config_lib
from trainit import optimizers
from trainit.config import Config
from trainit.model import attention as kernels
from trainit.model import cross_entropy as losses
from trainit.model.gpt import GPT
from trainit.optimizers.common import schedules
from trainit.parallel import float8
from trainit.parallel.layout import replicated_sharding, state_shardings
from trainit.parallel.matmul import Parallel
from trainit.parallel.mesh import RunShape, wants_squares
from trainit.parallel.trees import inner_product
from trainit.train import diagnostics, loss_scale
from trainit.train.compiled import CompiledFunction


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "skipped", "skipped_in_a_row", "diagnostics", "loss_scale"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that a step changes. `step` counts steps done, skipped updates included."""

    step: jax.Array  # int32
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array  # int32: updates left out because something was not finite
    skipped_in_a_row: jax.Array  # int32: of them, those since the last good one that lowered no loss scale
    diagnostics: dict  # what diagnostics keep; empty where there are none
    loss_scale: dict  # what `loss_scale` keeps; empty where nothing is scaled


@dataclass(frozen=True)
class CompiledSteps:
    """The compiled functions of a run on its mesh."""

    abstract_state: TrainState  # shapes, types and shardings
    init: CompiledFunction  # () -> TrainState, born sharded
    begin_diagnostics: CompiledFunction  # params -> what TrainState keeps of them
    begin_loss_scale: CompiledFunction  # () -> what TrainState keeps of it
    train: CompiledFunction  # (TrainState, batch) -> (TrainState, metrics); gives its state's memory away
    evaluate: CompiledFunction  # (params, batch, token_bytes, subsets) -> sums


def named_key(seed: int, name: str) -> jax.Array:
    """The run's key for one purpose; purposes do not disturb each other."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def build(config: Config, shape: RunShape) -> CompiledSteps:
    """The functions of a run.

    Args:
        config: resolved.
        shape: from `run_shape`, or `shape_on` for a mesh that there is.

    Raises:
        ConfigError: something was asked for that this platform cannot do.
    """
    mesh, device = shape.mesh, shape.mesh.devices.flat[0]
    try:
        parts = float8.parts(config.precision_of, config.precision, device)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from None

    @functools.cache
    def network(parallel: Parallel) -> tuple[GPT, losses.CrossEntropy]:
        attend = _attention(shape.attention, device.platform, parallel)
        model = GPT(config.model, config.precision, attend, parallel, parts)
        return model, losses.CrossEntropy(parallel, config.logits_mib, config.z_loss)

    model, cross_entropy = network(Parallel(mesh))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    schedule = schedules.build(config.schedule, config.optimizer.learning_rate, shape.batch_sizes)
    key = jax.random.key_data(named_key(config.seed, "optimizer"))
    optimizer = optimizers.of_run(config, schedule, shapes, key, mesh)

    is_scaled = "float16" in (config.precision, *config.precision_of.values())
    diagnostics.check(config.diagnostics, shapes, shape.batch_at(0).micro_steps)

    def init() -> TrainState:
        params = model.init(named_key(config.seed, "parameters"))
        zero = jnp.zeros((), jnp.int32)
        kept = diagnostics.init(config.diagnostics, params)
        scale = loss_scale.init(is_scaled)
        return TrainState(zero, params, optimizer.init(params), zero, zero, kept, scale)

    abstract = jax.eval_shape(init)
    layout = state_shardings(abstract, shapes, mesh)
    replicated = replicated_sharding(mesh)
    return CompiledSteps(
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, layout
        ),
        init=CompiledFunction("init", jax.jit(init, out_shardings=layout)),
        begin_diagnostics=CompiledFunction(
            "begin_diagnostics",
            jax.jit(
                functools.partial(diagnostics.init, config.diagnostics), out_shardings=layout.diagnostics
            ),
        ),
        begin_loss_scale=CompiledFunction(
            "begin_loss_scale",
            jax.jit(functools.partial(loss_scale.init, is_scaled), out_shardings=layout.loss_scale),
        ),
        train=CompiledFunction(
            "train",
            jax.jit(
                _train_step(config, _sums(config, shape, network, layout.params), optimizer, schedule),
                donate_argnums=0,
                out_shardings=(layout, replicated),
            ),
        ),
        evaluate=CompiledFunction(
            "evaluate",
            jax.jit(
                functools.partial(_eval_step, model, cross_entropy),
                static_argnums=3,
                out_shardings=replicated,
            ),
            static=(3,),
        ),
    )


def _attention(name: str, platform: str, parallel: Parallel) -> Callable:
    """Attention's kernel of this name, each device working on its own rows and heads."""
    kernel = {"plain": kernels.plain, "blockwise": kernels.blockwise, "cudnn": kernels.cudnn}[name]
    if name == "blockwise" and platform != "cpu":  # which want much to do at once
        kernel = functools.partial(kernel, scores_mib=kernels.SCORES_MIB_OF_GPUS)
    queries = parallel.spec("batch", "length", "heads", None)
    keys = parallel.spec("batch", "length", "kv_heads", None)
    inputs = (queries, keys, keys, parallel.spec("batch", "length"), parallel.spec("batch", "kv_heads"))

    def attend(*arrays, rate: float) -> jax.Array:
        return parallel.on_devices(functools.partial(kernel, rate=rate), inputs, queries)(*arrays)

    return attend


def _inputs_and_targets(micro_batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs and targets (b, L) int32, and which targets count."""
    tokens = micro_batch["tokens"].astype(jnp.int32)  # (b, L + 1): narrow until here
    mask_BL = jnp.arange(tokens.shape[1] - 1) < micro_batch["lengths"][:, None]
    return tokens[:, :-1], tokens[:, 1:], mask_BL


def _draw(logits_BLV: jax.Array, key: jax.Array, first_row: jax.Array | int) -> jax.Array:
    """Targets (B, L) from the model's own distribution, each row's with a key of its own."""
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(first_row + jnp.arange(len(logits_BLV)))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BLV.astype(jnp.float32))


def _over_micro_steps(function: Callable[[int, dict], tuple], batch: dict, zeros):
    """The sum of function(number, micro-batch) over a batch's micro-steps; `zeros` is one of nothing."""
    micro_steps = batch["lengths"].shape[0]
    if micro_steps == 1:
        return function(0, jax.tree.map(lambda x: x[0], batch))

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, function(*numbered)), None

    return jax.lax.scan(add, zeros, (jnp.arange(micro_steps), batch))[0]


def _sums(config, shape: RunShape, network: Callable[[Parallel], tuple], layout) -> tuple[Callable, Callable]:
    """Functions of (params, batch, step), for one and the same dropout, over all micro-steps.

    The first gives the mean loss's gradient (float32, laid out as params) and sums of the loss's parts, and
    where the noise scale is asked for also "square", the sum of squares of the micro-steps' mean gradients.
    With a key for it, targets are drawn from the model instead of taken from the batch; with a scale, it is
    what `loss_scale` says on the way, and out of the gradient in the end. The second gives the loss's parts
    alone.

    Gradients are summed over data in each micro-step; or each of data's replicas adds up its own over all of
    them, and they are summed in the end.
    """
    uses_dropout = any(config.model[field] for field in config_lib.DROPOUTS)
    with_square = wants_squares(config)
    whole, apart = Parallel(shape.mesh), Parallel(shape.mesh, apart=True)
    names = ("loss", "correct", "count", "z_loss") if config.z_loss else ("loss", "correct", "count")
    no_sums = dict.fromkeys(names, jnp.float32(0))

    def loss(parallel: Parallel, params, step, number, micro_batch, sampling=None, scale=None):
        key = jax.random.fold_in(named_key(config.seed, "dropout"), step) if uses_dropout else None
        inputs_BL, targets_BL, mask_BL = _inputs_and_targets(micro_batch)
        first_row = parallel.first_row(number, len(inputs_BL))
        model, cross_entropy = network(parallel)
        x_BLD, head = model.hidden(params, inputs_BL, key, first_row)
        if sampling is not None:
            targets_BL = _draw(jax.lax.stop_gradient(head(x_BLD)), sampling, first_row)
        with jax.named_scope("head"):
            return cross_entropy.sums(head, x_BLD, targets_BL, mask_BL, scale)

    def add_up(parallel: Parallel, batch, params, step, sampling, scale, count):
        """What `gradients` gives, of the rows in this batch, out of `count` targets in all."""
        factor = None if scale is None else scale / config.model.context_length

        def lay_out(grads):
            return jax.tree.map(lambda g, s: parallel.lay_out(g, s.spec), grads, layout)

        def micro(number, micro_batch):
            def share(params):
                total, sums = loss(parallel, params, step, number, micro_batch, sampling, factor)
                return total / count if factor is None else total, sums

            grads, sums = jax.grad(share, has_aux=True)(params)
            grads = lay_out(grads)
            if factor is not None:
                grads = jax.tree.map(lambda g: g / (factor * count), grads)
            if with_square:
                sums["square"] = inner_product(grads, grads) * (count / sums["count"]) ** 2
            return grads, sums

        zeros = lay_out(jax.tree.map(jnp.zeros_like, params))
        return _over_micro_steps(
            micro, batch, (zeros, no_sums | ({"square": jnp.float32(0)} if with_square else {}))
        )

    def gradients(params: dict, batch: dict, step: jax.Array, sampling=None, scale=None) -> tuple[dict, dict]:
        lengths = batch["lengths"]
        count = jnp.sum(lengths.astype(jnp.float32))  # of targets: nothing is divided by it later
        arguments = batch, params, step, sampling, scale, count
        if shape.accumulates_locally(lengths.shape[0]):
            return apart.of_replicas(functools.partial(add_up, apart), *arguments)
        return add_up(whole, *arguments)

    def parts(params: dict, batch: dict, step: jax.Array) -> dict:
        return _over_micro_steps(
            lambda number, micro_batch: loss(whole, params, step, number, micro_batch)[1], batch, no_sums
        )

    return gradients, parts


def _train_step(config, sums, optimizer, schedule) -> Callable:
    """The train step: one optimizer update from G accumulated micro-steps."""
    gradients, parts = sums

    def measure(state: TrainState, batch: dict, grads: dict, updates: dict, sums: dict, good: jax.Array):
        """Diagnostics of this step, and what is kept for the next one."""

        def loss_at(params: dict) -> jax.Array:
            there = parts(params, batch, state.step)
            return there["loss"] / there["count"]

        micro_steps, rows = batch["lengths"].shape
        now = diagnostics.Now(
            params=state.params,
            gradients=grads,
            updates=updates,
            loss=sums["loss"] / sums["count"],
            loss_at=loss_at,
            micro_square=sums["square"] / micro_steps if "square" in sums else None,
            batches=(rows, micro_steps * rows),
            factor=optimizers.logged(state.opt_state).get("optimizer/random_scaling"),
        )
        return diagnostics.measure(config.diagnostics, state.diagnostics, now, state.step + 1, good)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        scale, elsewhere = state.loss_scale.get("scale"), []

        def gradient_at(params: dict) -> dict:
            elsewhere.append("asked for")
            return gradients(params, batch, state.step, scale=scale)[0]

        def sampled_gradient_at(params: dict, key: jax.Array) -> tuple[dict, jax.Array]:
            elsewhere.append("asked for")
            grads, sums = gradients(params, batch, state.step, key, scale)
            return grads, sums["count"]

        at = optimizers.training_point(state.opt_state, state.params)
        grads, sums = gradients(at, batch, state.step, scale=scale)
        grad_norm = optax.tree.norm(grads)

        @jax.named_scope("optimizer")
        def update():
            return optimizer.update(
                grads,
                state.opt_state,
                state.params,
                step=state.step,
                gradient_at=gradient_at,
                sampled_gradient_at=sampled_gradient_at,
            )

        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = update()
        # With gradients taken elsewhere an update is costly, and to trace it again, too.
        update_norm = optax.tree.norm(updates) if elsewhere else _norm_apart(updates, update, finite)
        good = finite & jnp.isfinite(update_norm)
        if state.loss_scale and elsewhere:
            good &= loss_scale.stays_finite(opt_state, state.opt_state)

        def if_good(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        measured, kept = {}, {}
        if config.diagnostics.every_steps:
            measured, kept = measure(replace(state, params=at), batch, grads, updates, sums, good)
        bad = (~good).astype(jnp.int32)
        next_scale, lowered = loss_scale.after(state.loss_scale, good)
        with jax.named_scope("optimizer"):
            new_params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=if_good(new_params, state.params),
            opt_state=if_good(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            # A step that lowers the loss scale is none of those that end a run: the next may be good.
            skipped_in_a_row=(state.skipped_in_a_row + bad * ~lowered) * bad,
            diagnostics=kept,
            loss_scale=next_scale,
        )
        return new_state, {
            "train/loss": sums["loss"] / sums["count"],
            "train/accuracy": sums["correct"] / sums["count"],
            **({"train/z_loss": sums["z_loss"] / sums["count"]} if config.z_loss else {}),
            "train/grad_norm": grad_norm,
            "train/update_norm": update_norm,
            "train/learning_rate": schedule(state.step),
            "train/skipped": new_state.skipped,
            **({"train/loss_scale": scale} if state.loss_scale else {}),
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "diagnostics": measured,
            **optimizers.logged(new_state.opt_state),
        }

    return train_step


def _norm_apart(updates: dict, update: Callable[[], tuple], finite: jax.Array) -> jax.Array:
    """The global norm of updates, which may be NaN if not `finite`.

    Whether a step is good is known when this norm is, and nothing of the state can be overwritten before.
    All that is new would wait in memory until then. So an update without matrix products, which is cheap, is
    made once more in a branch of its own, where it is summed up as it arises.
    """
    if "dot_general" in str(jax.make_jaxpr(lambda: update()[0])()):
        return optax.tree.norm(updates)
    return jax.lax.cond(finite, lambda: optax.tree.norm(update()[0]), lambda: jnp.float32(jnp.nan))


def _eval_step(model, cross_entropy, params: dict, batch: dict, token_bytes_V, subsets: int) -> dict:
    """Sums over one batch of a single micro-step: "loss", "correct", "count" and "bytes" of the targets.

    Each is float32 (subsets,): one sum for each subset that batch["subsets"] numbers; without it, of all.
    """
    micro_batch = jax.tree.map(lambda x: x[0], batch)
    inputs_BL, targets_BL, mask_BL = _inputs_and_targets(micro_batch)
    x_BLD, head = model.hidden(params, inputs_BL)
    tokens = cross_entropy.tokens(head, x_BLD, targets_BL)
    number_BL = micro_batch["subsets"] if "subsets" in micro_batch else jnp.zeros(targets_BL.shape, jnp.int32)
    values = {"count": 1.0, "bytes": token_bytes_V[targets_BL]}
    values |= {name: tokens[name] for name in ("loss", "correct")}

    def sums(k):
        return {
            name: jnp.sum(jnp.where(mask_BL & (number_BL == k), value, 0.0)) for name, value in values.items()
        }

    return jax.lax.map(sums, jnp.arange(subsets))
