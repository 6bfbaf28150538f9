"""Cross-entropy of the head's logits, which are never in memory for all positions.

Positions pass through the head in chunks. Where the gradient is needed, a chunk's is computed at once, while
its logits are in memory, as in Liger's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989): there
are three products with the head, no more than with all logits in memory. Each device works on its own rows
and its own part of the vocabulary. R counts a chunk's positions, n the chunks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trainit.model.layers import Head
from trainit.parallel.collectives import MaybeArray, Parallel, gather, scatter_sum, sum_over
from trainit.parallel.cpu_workarounds import on_cpu
from trainit.parallel.mesh import chunk_size

Sums = tuple[jax.Array, dict[str, jax.Array]]  # what is minimized, and its parts


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of a head on a mesh.

    The z-loss is the squared logarithm of the softmax's denominator (PaLM, arXiv 2204.02311, section 5).
    """

    parallel: Parallel
    logits_mib: float = 0.0  # of logits that a device has in memory at once; 0: all
    z_loss: float = 0.0  # its weight in what is minimized

    def per_token(self, head: Head, x_BLD: jax.Array, targets_BL: jax.Array) -> dict[str, jax.Array]:
        """The loss of each position. To differentiate, take `sums`, which needs less memory.

        Arrays (B, L): "loss" -log p(target) in nats; "correct" whether the target has the highest logit;
        "log_total" the logarithm of the softmax's denominator. The head is used in the type of x.
        """

        def on_device(head, x_BLD, _, targets_BL):
            chunks, join = self._chunks(head, x_BLD, targets_BL)
            return join(jax.lax.map(lambda chunk: self._chunk_losses(head, *chunk)[0], chunks))

        outputs = self.parallel.spec("batch", "length")
        return self._shard_map(on_device, outputs, head, x_BLD, None, targets_BL)

    def sums(self, head: Head, x_BLD, targets_BL, mask_BL, scale: MaybeArray = None) -> Sums:
        """The sum to minimize, to be differentiated by head and x, and the parts that it consists of.

        These are sums over the mask's positions: "loss", "correct", "count" and, with a z-loss, "z_loss". The
        scale multiplies the sum to minimize, and its gradients before they are rounded to the compute type:
        afterwards, small ones would already be lost.
        """
        objective, sums = _sums(self, head, x_BLD, targets_BL, mask_BL, scale)
        return objective, jax.lax.stop_gradient(sums)

    def with_gradient(self, head: Head, x_BLD, targets_BL, mask_BL, scale) -> tuple[dict, Head, jax.Array]:
        """What `per_token` gives, and the float32 gradients, by head and by x, of what `sums` minimizes."""

        def on_device(head, x_BLD, scale, targets_BL, mask_BL):
            # The head's gradient is added up over the chunks; each chunk's losses and dx are put together.
            chunks, join = self._chunks(head, x_BLD, targets_BL, mask_BL)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
            zeros = self.parallel.varying(zeros, "batch", "length", "vocab")
            step = functools.partial(self._add_gradient, head, scale)
            d_head, (tokens, dx_nRD) = jax.lax.scan(step, zeros, chunks)

            # Then they are summed: the head's over positions, dx over the parts of the vocabulary.
            d_bias = sum_over(d_head.bias_V, self.parallel.axes("batch", "length"))
            d_head = Head(self.parallel.sum_gradient(d_head.kernel_DV, 0), d_bias, head.softcap)
            dx_BLD = scatter_sum(join(dx_nRD), self.parallel.sequence_axes, 1)
            return join(tokens), d_head, dx_BLD

        residual = self.parallel.spec("batch", "residual_length")
        outputs = (self.parallel.spec("batch", "length"), self._head_spec(head), residual)
        return self._shard_map(on_device, outputs, head, x_BLD, scale, targets_BL, mask_BL)

    def add_up(self, tokens: dict[str, jax.Array], mask_BL: jax.Array, scale) -> Sums:
        """What `sums` returns, from what `per_token` returns."""

        def over(value_BL) -> jax.Array:
            return jnp.sum(jnp.where(mask_BL, value_BL, 0.0))

        sums = {"loss": over(tokens["loss"]), "correct": over(tokens["correct"]), "count": over(1.0)}
        objective = sums["loss"]
        if self.z_loss:
            sums["z_loss"] = self.z_loss * over(tokens["log_total"] ** 2)
            objective = objective + sums["z_loss"]
        return objective if scale is None else objective * scale, sums

    def _head_spec(self, head: Head) -> Head:
        p: Any = self.parallel  # specs stand in the place of arrays
        return Head(p.spec("embed", "vocab"), p.spec("vocab"), head.softcap)

    def _shard_map(self, function: Callable, outputs, head: Head, x_BLD, scale, *arrays_BL):
        """function(head, x, scale, arrays (B, L)) on each device's parts, but with D and L whole."""

        def on_device(head, x_BLD, scale, *arrays_BL):
            # The kernel is gathered here, once for all chunks and in the compute type.
            kernel_DV = gather(head.kernel_DV.astype(x_BLD.dtype), self.parallel.axes("embed"), 0)
            x_BLD = gather(x_BLD, self.parallel.sequence_axes, 1)
            return function(Head(kernel_DV, head.bias_V, head.softcap), x_BLD, scale, *arrays_BL)

        p, tokens = self.parallel, self.parallel.spec("batch", "length")
        specs = (p.spec("batch", "residual_length"), PartitionSpec(), *[tokens] * len(arrays_BL))
        mapped = p.shard_map(on_device, (self._head_spec(head), *specs), outputs)
        return mapped(head, x_BLD, scale, *arrays_BL)

    def _chunks(self, head: Head, *arrays) -> tuple[tuple, Callable]:
        """Arrays (B, L, ...) as chunks (n, R, ...), padded with zeros; and the way back, for any tree."""
        B, L = arrays[0].shape[:2]
        # `lax.map` and `scan` need chunks of one size, so that the last one is padded.
        size = chunk_size(B * L, head.kernel_DV.shape[1], self.logits_mib)
        count = -(-B * L // size)

        def cut(array):
            rest = array.shape[2:]
            padding = [(0, count * size - B * L)] + [(0, 0)] * len(rest)
            return jnp.pad(array.reshape(B * L, *rest), padding).reshape(count, size, *rest)

        def join(chunks):
            rest = chunks.shape[2:]
            return chunks.reshape(count * size, *rest)[: B * L].reshape(B, L, *rest)

        return tuple(map(cut, arrays)), functools.partial(jax.tree.map, join)

    def _chunk_losses(self, head: Head, x_RD, targets_R) -> tuple[dict[str, jax.Array], tuple]:
        """What `per_token` gives, for a chunk; and what its gradient needs of this device.

        That is logits and probabilities (R, V), and targets as columns (R,) of its part of the vocabulary, in
        which they may not be.
        """
        # The largest logit is subtracted, so that exp does not overflow.
        logits_RV, split = head(x_RD), self.parallel.axes("vocab")
        V = logits_RV.shape[1]
        if on_cpu(self.parallel.mesh):  # which would compute `_top_and_total` number by number
            own_R, total_R = jnp.max(jax.lax.stop_gradient(logits_RV), axis=1), None
        else:
            own_R, total_R = _top_and_total(logits_RV)
        top_R = jax.lax.pmax(own_R, split) if split else own_R
        terms_RV = jnp.exp(logits_RV - top_R[:, None])
        total_R = jnp.sum(terms_RV, axis=1) if total_R is None else total_R * jnp.exp(own_R - top_R)

        # One of the vocabulary's devices has the target's logit, and the others add 0.
        column_R = targets_R.astype(jnp.int32) - V * jax.lax.axis_index(split)
        target_R = jnp.take_along_axis(logits_RV, jnp.clip(column_R, 0, V - 1)[:, None], axis=1)[:, 0] - top_R
        target_R = jnp.where((column_R >= 0) & (column_R < V), target_R, 0.0)
        total_R, target_R = jax.lax.psum((total_R, target_R), split)
        log_R = jnp.log(total_R)
        tokens = {"loss": log_R - target_R, "correct": target_R >= 0, "log_total": log_R + top_R}
        return tokens, (logits_RV, terms_RV / total_R[:, None], column_R)

    def _add_gradient(self, head: Head, scale, total: Head, chunk: tuple) -> tuple[Head, tuple]:
        """Adds a chunk's gradient of the head to `total`; gives its losses and this device's dx, too."""
        x_RD, targets_R, mask_R = chunk
        tokens, (logits_RV, d_RV, column_R) = self._chunk_losses(head, x_RD, targets_R)

        # By logits, from the probabilities (cross-entropy and z-loss), through the soft cap.
        if self.z_loss:
            d_RV = d_RV * (1 + 2 * self.z_loss * tokens["log_total"])[:, None]
        d_RV = d_RV - (jnp.arange(d_RV.shape[1]) == column_R[:, None])
        d_RV = head.softcap.times_slope(d_RV, logits_RV)
        d_RV = jnp.where(mask_R[:, None], d_RV, 0.0)
        d_RV = d_RV if scale is None else d_RV * scale

        # By bias, kernel and x.
        bias_V = None if total.bias_V is None else total.bias_V + jnp.sum(d_RV, axis=0)
        d_RV = d_RV.astype(x_RD.dtype)
        product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        total = Head(total.kernel_DV + product(x_RD.T, d_RV), bias_V, head.softcap)
        return total, (tokens, product(d_RV, head.kernel_DV.T))


@jax.custom_jvp
def _top_and_total(logits_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each row, and the sum of exp(logit - largest), read from memory once (R,).

    The sum of a part is scaled to the larger of two parts' largest (Milakov & Gimelshein 2018, arXiv
    1805.02867). The largest counts as a constant when differentiated: it cancels out.
    """

    def join(one, other):
        top = jnp.maximum(one[0], other[0])
        return top, one[1] * jnp.exp(one[0] - top) + other[1] * jnp.exp(other[0] - top)

    nothing = jnp.finfo(jnp.float32).min, 0.0
    return tuple(jax.lax.reduce((logits_RV, jnp.ones_like(logits_RV)), nothing, join, (1,)))


@_top_and_total.defjvp
def _top_and_total_jvp(primals: tuple, tangents: tuple) -> tuple:
    top_R, total_R = _top_and_total(*primals)
    d_total_R = jnp.sum(jnp.exp(primals[0] - top_R[:, None]) * tangents[0], axis=1)
    return (top_R, total_R), (jnp.zeros_like(top_R), d_total_R)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(loss: CrossEntropy, head, x_BLD, targets_BL, mask_BL, scale):
    return loss.add_up(loss.per_token(head, x_BLD, targets_BL), mask_BL, scale)


def _forward(loss: CrossEntropy, head, x_BLD, targets_BL, mask_BL, scale):
    """The sums, and the gradients, which are computed here already: the backward pass has no logits."""
    tokens, d_head, dx_BLD = loss.with_gradient(head, x_BLD, targets_BL, mask_BL, scale)
    return loss.add_up(tokens, mask_BL, scale), (d_head, dx_BLD.astype(x_BLD.dtype))


def _backward(loss: CrossEntropy, gradients, cotangents):
    # Cotangents of the parts are 0. With a scale, which the gradients already have, the first one is 1.
    (d_head, dx_BLD), (cotangent, _) = gradients, cotangents
    d_head = jax.tree.map(lambda d: d * cotangent, d_head)
    return d_head, (dx_BLD * cotangent).astype(dx_BLD.dtype), None, None, None


_sums.defvjp(_forward, _backward)
