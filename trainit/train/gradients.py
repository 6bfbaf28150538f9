"""The loss of a global batch and its gradient, summed over micro-steps and devices."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from trainit.checkpoints.state import named_key
from trainit.config import DROPOUTS, Config
from trainit.model.cross_entropy import CrossEntropy
from trainit.model.gpt import GPT
from trainit.parallel import sequence
from trainit.parallel.collectives import Parallel
from trainit.parallel.mesh import RunShape, wants_squares
from trainit.parallel.trees import inner_product
from trainit.tokenizers.chat.on_device import counting, inputs_and_targets


@dataclass
class LossAndGradient:
    """Loss and gradient of a batch (G micro-steps, rows, L + 1), for one train step.

    Dropout depends on the seed, the step and the row, so that all methods, and all layouts of the batch, see
    the same masks. Reductions are sums divided once by the number of targets in the whole batch: neither the
    number of micro-steps nor that of devices changes the result, except for rounding. Gradients are summed
    over the mesh axis `data` within each micro-step; or, where `RunShape.accumulates_locally` allows, each
    replica accumulates its own and one sum follows at the end.
    """

    config: Config
    shape: RunShape
    model_for: Callable[[Parallel], tuple[GPT, CrossEntropy]]  # for a way to compute on the mesh
    layout: Any  # the shardings of the parameters, which the gradient gets too

    def __post_init__(self):
        mesh = self.shape.device_mesh
        self._global, self._replica = Parallel(mesh), Parallel(mesh, accumulate_locally=True)
        self._uses_dropout = any(self.config.model[field] for field in DROPOUTS)
        names = "loss", "correct", "count", *(("z_loss",) if self.config.z_loss else ())
        self._no_sums = dict.fromkeys(names, jnp.float32(0))

    def gradient(
        self,
        params: dict,
        batch: dict,
        step: jax.Array,
        sampling_key: jax.Array | None = None,
        scale: jax.Array | None = None,
    ) -> tuple[dict, dict]:
        """The gradient of the batch's mean loss (z-loss included) at `params`, and sums over all targets.

        With a `sampling_key`, targets are drawn from the model's own distribution. The loss is multiplied by
        `scale` during the backward pass (see `loss_scale`). The gradient is float32 and laid out as the
        parameters. The sums are "loss", "correct", "count" and, where the config asks for them, "z_loss" and
        "square", that of the squared norms of the gradients of the micro-steps' mean losses.
        """
        # Rows at the end of the data may have fewer targets: the mean is over targets, not over rows.
        count = jnp.maximum(jnp.sum(counting(batch).astype(jnp.float32)), 1)
        arguments = batch, params, step, sampling_key, scale, count
        if self.shape.accumulates_locally(len(batch["lengths"])):
            replica = functools.partial(self._accumulate, self._replica)
            return self._replica.sum_over_replicas(replica, *arguments)
        return self._accumulate(self._global, *arguments)

    def loss_sums(self, params: dict, batch: dict, step: jax.Array) -> dict:
        """The sums that `gradient` gives, without a gradient."""

        def micro_step(index, micro_batch):
            return self._micro_loss(self._global, params, step, index, micro_batch)[1]

        return _sum_over_micro_steps(micro_step, batch, self._no_sums)

    def _accumulate(self, p: Parallel, batch, params, step, sampling_key, scale, count):
        """What `gradient` returns, from these rows, with `count` targets in the whole batch."""
        # Each sequence's mean loss is scaled, not the batch's: a scale that fits then fits any batch size.
        factor = None if scale is None else scale / self.config.model.context_length
        with_square = wants_squares(self.config)

        def lay_out(grads):
            return jax.tree.map(lambda g, s: p.constrain_to(g, s.spec), grads, self.layout)

        def micro_step(index, micro_batch):
            def share_of_loss(params):
                total, sums = self._micro_loss(p, params, step, index, micro_batch, sampling_key, factor)
                return total / count if factor is None else total, sums

            grads, sums = jax.grad(share_of_loss, has_aux=True)(params)
            grads = lay_out(grads)
            if factor is not None:  # the gradient is float32 by now, and needs its scale no more
                grads = jax.tree.map(lambda g: g / (factor * count), grads)
            if with_square:
                sums["square"] = inner_product(grads, grads) * (count / jnp.maximum(sums["count"], 1)) ** 2
            return grads, sums

        zeros = lay_out(jax.tree.map(jnp.zeros_like, params))
        no_sums = self._no_sums | ({"square": jnp.float32(0)} if with_square else {})
        return _sum_over_micro_steps(micro_step, batch, (zeros, no_sums))

    def _micro_loss(
        self, parallel: Parallel, params, step, index, micro_batch, sampling_key=None, scale=None
    ) -> tuple[jax.Array, dict]:
        """The sum of the losses of a micro-step's targets, to differentiate, and its parts."""
        dropout_key = None
        if self._uses_dropout:
            dropout_key = jax.random.fold_in(named_key(self.config.seed, "dropout"), step)
        inputs_BL, targets_BL, mask_BL, ends_BL = inputs_and_targets(micro_batch)
        first_row = parallel.first_row(index, len(inputs_BL))
        model, cross_entropy = self.model_for(parallel)
        x_BLD, head = model.hidden(params, inputs_BL, dropout_key, first_row, ends_BL)
        if sampling_key is not None:
            targets_BL = _sample(head(sequence.restore(parallel, x_BLD)), sampling_key, first_row)
        targets_BL, mask_BL = sequence.arrange(parallel, (targets_BL, mask_BL))
        with jax.named_scope("head"):
            return cross_entropy.sums(head, x_BLD, targets_BL, mask_BL, scale)


def _sample(logits_BLV: jax.Array, key: jax.Array, first_row: jax.Array | int) -> jax.Array:
    """Targets (B, L) drawn from the model's distribution; each row has its own key."""
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(first_row + jnp.arange(len(logits_BLV)))
    return jax.vmap(jax.random.categorical)(keys_B, jax.lax.stop_gradient(logits_BLV).astype(jnp.float32))


def _sum_over_micro_steps(function: Callable[[Any, dict], Any], batch: dict, zeros):
    """The sum of function(index, micro-batch) over the batch's leading axis; `zeros` is the empty sum."""
    micro_steps = batch["lengths"].shape[0]
    if micro_steps == 1:
        return function(0, jax.tree.map(lambda x: x[0], batch))

    def add(total, indexed):
        return jax.tree.map(jnp.add, total, function(*indexed)), None

    return jax.lax.scan(add, zeros, (jnp.arange(micro_steps), batch))[0]
