"""The train step and the eval step of a run, compiled for its mesh."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax

from trainit import optimizers
from trainit.checkpoints.state import TrainState, named_key
from trainit.cluster import device_checks
from trainit.config import Config
from trainit.model.cross_entropy import CrossEntropy
from trainit.model.gpt import GPT
from trainit.model.kernels import kernel_on
from trainit.model.precision import part_precisions
from trainit.parallel import sequence
from trainit.parallel.collectives import Parallel
from trainit.parallel.cpu_workarounds import computed_again
from trainit.parallel.layout import replicated_sharding, state_shardings
from trainit.parallel.mesh import RunShape
from trainit.tokenizers.chat.on_device import inputs_and_targets
from trainit.train import diagnostics
from trainit.train.compiled import CompiledFunction
from trainit.train.gradients import LossAndGradient
from trainit.train.skipped import loss_scale, spikes
from trainit.transforms import schedules


@dataclass(frozen=True)
class CompiledSteps:
    """A run's functions on its mesh; each is compiled when it is needed, or ahead of that in a thread."""

    abstract_state: TrainState  # shapes, types and shardings
    init: CompiledFunction  # () -> TrainState, created shard by shard
    begin: CompiledFunction  # params -> TrainState at step 0 of these parameters, whose memory it takes over
    begin_separate: dict[str, CompiledFunction]  # params -> the state's field of this name, in a resume
    train: CompiledFunction  # (TrainState, batch) -> (TrainState, metrics); reuses the old state's memory
    hashes: dict[str, CompiledFunction]  # -> a number for each device: see `device_checks.functions`
    evaluate: CompiledFunction  # (params, batch, token_bytes, subsets) -> sums


def build(config: Config, shape: RunShape) -> CompiledSteps:
    """Makes the functions of a run. Raises ConfigError if the platform cannot do what the config asks for."""
    # Model and loss, for gradients summed in each micro-step or once a step (`RunShape.accumulates_locally`).
    mesh = shape.device_mesh
    device = mesh.devices.flat[0]
    parts = part_precisions(config.precision_of, config.precision, device)

    @functools.cache
    def model_for(parallel: Parallel) -> tuple[GPT, CrossEntropy]:
        attend = kernel_on(shape.attention, device.platform, parallel)
        model = GPT(config.model, config.precision, attend, parallel, parts)
        return model, CrossEntropy(parallel, config.logits_mib, config.z_loss)

    # The optimizer, which may want to know the parameters' shapes.
    model, cross_entropy = model_for(Parallel(mesh))
    parameters = model.shapes
    schedule = schedules.build(config.schedule, config.optimizer.learning_rate, shape.batch_sizes)
    optimizer_key = jax.random.key_data(named_key(config.seed, "optimizer"))
    optimizer = optimizers.of_run(config, schedule, parameters, optimizer_key, mesh)

    # The state at the start. Each device computes its own shards: no whole array exists in one place.
    is_scaled = "float16" in (config.precision, *config.precision_of.values())
    separate = {
        "diagnostics": lambda params: diagnostics.init(config.diagnostics, params),
        "loss_scale": lambda _: loss_scale.init(is_scaled),
        "spikes": lambda _: spikes.init(config.spikes),
    }

    def begin(params: dict) -> TrainState:
        zero, kept = jnp.zeros((), jnp.int32), {name: start(params) for name, start in separate.items()}
        return TrainState(zero, params, optimizer.init(params), zero, zero, **kept)

    def init() -> TrainState:
        return begin(model.init(named_key(config.seed, "parameters")))

    shapes = jax.eval_shape(begin, parameters)
    layout = state_shardings(shapes, shapes.params, mesh)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
    )

    # The steps.
    diagnostics.check(config.diagnostics, parameters, shape.batch_at(0).micro_steps)
    loss_and_gradient = LossAndGradient(config, shape, model_for, layout.params)
    train_step = TrainStep(config, loss_and_gradient, optimizer, schedule).train_step
    eval_step = functools.partial(_eval_step, model, cross_entropy)

    replicated = replicated_sharding(mesh)
    hashed = device_checks.functions(mesh, layout.params, layout.opt_state, loss_and_gradient.gradient)
    begun = {name: CompiledFunction(name, start, getattr(layout, name)) for name, start in separate.items()}
    return CompiledSteps(
        abstract_state=abstract_state,
        init=CompiledFunction("init", init, layout),
        begin=CompiledFunction("begin", begin, layout, donate_argnums=0),
        begin_separate=begun,
        train=CompiledFunction("train", train_step, (layout, replicated), donate_argnums=0),
        hashes={name: CompiledFunction(name, hashes, replicated) for name, hashes in hashed.items()},
        evaluate=CompiledFunction("evaluate", eval_step, replicated, static_argnums=(3,)),
    )


@dataclass
class TrainStep:
    """One optimizer step on one global batch.

    If something is not finite, or a spike, parameters and optimizer state stay; the step counts as skipped.
    """

    config: Config
    loss_and_gradient: LossAndGradient
    optimizer: optimizers.Optimizer
    schedule: schedules.Schedule

    def train_step(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """The state after the step, and the step's metrics (scalars, on the device).

        The batch has "tokens" (G, rows, L + 1) and "lengths" (G, rows). Its G micro-steps make one update.
        """
        # 1. The gradient of the mean loss, at the parameters unless the optimizer wants another point.
        scale, optimizer = state.loss_scale.get("scale"), self.optimizer
        point = optimizers.training_point(state.opt_state, state.params)
        grads, sums = self.loss_and_gradient.gradient(point, batch, state.step, scale=scale)
        grad_norm = optax.tree.norm(grads)

        # 2. The update that the optimizer makes of it.
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = self._update(state, batch, grads)
        update_norm = optax.tree.norm(updates)
        if optimizer.elementwise and not optimizer.needs:
            # The state may be overwritten only once this norm is known: a cheap update is computed twice.
            mesh = self.loss_and_gradient.shape.device_mesh
            update_norm = computed_again(
                lambda *args: optax.tree.norm(self._update(*args)[0]), finite, mesh, state, batch, grads
            )

        # 3. Whether everything is finite. What overflowed in further gradients of the optimizer (NEEDS) may
        # show in its new state alone, which is then checked if losses are scaled.
        finite &= jnp.isfinite(update_norm)
        if state.loss_scale and optimizer.needs:
            finite &= loss_scale.stays_finite(opt_state, state.opt_state)
        good, seen, bounds = spikes.judge(self.config.spikes, state.spikes, sums, grad_norm, finite)

        # 4. Diagnostics, of the state before the update.
        measured, kept = diagnostics.measure_step(
            self.loss_and_gradient, replace(state, params=point), batch, grads, updates, sums, good
        )

        # 5. The new state, and the metrics.
        kept = {"diagnostics": kept, "spikes": seen}
        new_state = self._next_state(state, (updates, opt_state), finite, good, kept)
        count = jnp.maximum(sums["count"], 1)  # of a batch of conversations, no target may count
        return new_state, {
            "train/loss": sums["loss"] / count,
            "train/accuracy": sums["correct"] / count,
            **({"train/z_loss": sums["z_loss"] / count} if self.config.z_loss else {}),
            "train/grad_norm": grad_norm,
            "train/update_norm": update_norm,
            "train/learning_rate": self.schedule(state.step),
            "train/skipped": new_state.skipped,
            **bounds,
            **({"train/loss_scale": scale} if state.loss_scale else {}),
            "tokens": sums["count"],
            "rows_tokens": jnp.sum(batch["lengths"]),
            "skipped_in_a_row": new_state.skipped_in_a_row,
            "diagnostics": measured,
            **optimizers.logged(new_state.opt_state),
        }

    @jax.named_scope("optimizer")
    def _update(self, state: TrainState, batch: dict, grads: dict) -> tuple[dict, optax.OptState]:
        """The optimizer's updates and its new state. It gets the further gradients that it declares."""
        scale = state.loss_scale.get("scale")

        def gradient_at(params: dict) -> dict:
            return self.loss_and_gradient.gradient(params, batch, state.step, scale=scale)[0]

        def sampled_gradient_at(params: dict, key: jax.Array) -> tuple[dict, jax.Array]:
            grads, sums = self.loss_and_gradient.gradient(params, batch, state.step, key, scale)
            return grads, sums["count"]

        gradients = {"gradient_at": gradient_at, "sampled_gradient_at": sampled_gradient_at}
        needed = {name: gradients[name] for name in self.optimizer.needs}
        return self.optimizer.update(grads, state.opt_state, state.params, step=state.step, **needed)

    def _next_state(
        self, state: TrainState, new: tuple[dict, dict], finite: jax.Array, good: jax.Array, kept: dict
    ) -> TrainState:
        """The state after the step: with `new` updates and optimizer state if `good`, else with the old."""

        def if_good(new, old):
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        bad = (~good).astype(jnp.int32)
        next_scale, lowered = loss_scale.after(state.loss_scale, finite)
        updates, opt_state = new
        with jax.named_scope("optimizer"):
            new_params = optax.apply_updates(state.params, updates)
        return TrainState(
            step=state.step + 1,
            params=if_good(new_params, state.params),
            opt_state=if_good(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            # A step that lowers the loss scale does not count: the next one may be good.
            skipped_in_a_row=(state.skipped_in_a_row + bad * ~lowered) * bad,
            loss_scale=next_scale,
            **kept,
        )


def _eval_step(
    model: GPT, cross_entropy: CrossEntropy, params: dict, batch: dict, token_bytes_V, subsets: int
) -> dict:
    """Sums over one batch of a single micro-step: "loss", "correct", "count" and "bytes" of the targets.

    Each is float32 (subsets,): one sum for each subset that batch["subsets"] numbers; 1 stands for all. Where
    a batch has no "bytes", those of ids count.
    """
    micro_batch = jax.tree.map(lambda x: x[0], batch)
    inputs_BL, targets_BL, mask_BL, ends_BL = inputs_and_targets(micro_batch)
    x_BLD, head = model.hidden(params, inputs_BL, ends_BL=ends_BL)
    subset_BL = micro_batch["subsets"] if subsets > 1 else jnp.zeros(targets_BL.shape, jnp.int32)
    bytes_BL = micro_batch["bytes"] if "bytes" in micro_batch else token_bytes_V[targets_BL]
    arrays = targets_BL, mask_BL, subset_BL, bytes_BL
    targets_BL, mask_BL, subset_BL, bytes_BL = sequence.arrange(cross_entropy.parallel, arrays)
    tokens = cross_entropy.per_token(head, x_BLD, targets_BL)
    values = {"count": 1.0, "bytes": bytes_BL, "loss": tokens["loss"], "correct": tokens["correct"]}

    def sums(k):
        counts_BL = mask_BL & (subset_BL == k)
        return {name: jnp.sum(jnp.where(counts_BL, value, 0.0)) for name, value in values.items()}

    return jax.lax.map(sums, jnp.arange(subsets))
