"""The blocks' matrix products and the embedding on the mesh, and all that devices exchange for them.

Kernels are split over fsdp, and over tensor by heads or MLP width. Between the blocks' halves the residual
stream is split by length over tensor, so that norms, dropout and sums are computed once (Korthikanti et al.
2022, arXiv 2205.05198). A half of a block gathers the length in front of its first product and sums and
splits it again (reduce-scatter) behind its last; the gradient does the same in the other direction. Each
product gathers its kernel in the compute type, in the backward pass once more, so that no device keeps it
whole. A kernel's gradient is computed, reduce-scattered over fsdp and summed over data in float32.

The exchanges are written out, not left to XLA's partitioner, which reduces gradients in the compute type, by
all-reduce, and where it likes. b is a device's part of B; l of L, split over tensor too.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainit.model.attention import PRODUCT
from trainit.parallel.float8 import BACKWARD, FORWARD, Factor, dot, factor
from trainit.parallel.layout import mesh_axes

Weights = tuple[jax.Array, jax.Array | None]  # a kernel and its bias


def gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """A dimension whole again, which is split over mesh axes. Within shard_map, as the next two."""
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def scatter_sum(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The sum over mesh axes, of which each device keeps its part along a dimension."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x


def exchange(x: jax.Array, axes: tuple[str, ...], split: int, join: int) -> jax.Array:
    """A dimension that was whole is split over mesh axes, and another one joined (all-to-all)."""
    return jax.lax.all_to_all(x, axes, split, join, tiled=True) if axes else x


@dataclass(frozen=True)
class Parallel:
    """What a model needs to run on a mesh.

    Args:
        mesh: with axes `config.MESH_AXES`; None: one device.
        apart: it is used within `of_replicas`.
    """

    mesh: Mesh | None = None
    apart: bool = False

    def of_replicas(self, function: Callable, batch, *shared):
        """function(batch, *shared) of each of the data axis's replicas for itself, summed over them.

        Args:
            function: gives a tree of arrays.
            batch: a tree of arrays whose second axis is split over data.
            *shared: are the same for all.
        """
        return jax.shard_map(
            lambda *arguments: jax.lax.psum(function(*arguments), "data"),
            mesh=self.mesh,
            in_specs=(PartitionSpec(None, "data"), *[PartitionSpec()] * len(shared)),
            out_specs=PartitionSpec(),
            axis_names={"data"},
            check_vma=False,
        )(batch, *shared)

    def first_row(self, number: jax.Array | int, rows: int) -> jax.Array | int:
        """Where the rows of micro-step `number` begin in the global batch; apart, a replica's."""
        if not self.apart:
            return number * rows
        return (number * self.mesh.shape["data"] + jax.lax.axis_index("data")) * rows

    def constrain(self, array: jax.Array, *axes: str | None) -> jax.Array:
        """Fixes the layout of an intermediate array: constrain(array, "batch", "length", None)."""
        return array if self.mesh is None else self.lay_out(array, self.spec(*axes))

    def lay_out(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The same, by a spec."""
        where = spec if self.apart else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(array, where)

    def widen(self, x_BLD: jax.Array, *weights: Weights, float8: bool = False) -> tuple[jax.Array, ...]:
        """x @ kernel + bias for kernels (D, F, ...) of which F is split over tensor.

        Args:
            x_BLD: its length is split as the residual stream's.
            *weights: all are used in the type of x.
            float8: the products' factors are, and what kernels travel in; their sums are float32.

        Returns:
            For each kernel (B, L, F, ...), with L whole.
        """
        return checkpoint_name(_widen(self, float8, x_BLD, weights), PRODUCT)

    def narrow(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, float8: bool = False
    ) -> jax.Array:
        """x (B, L, F, ...) @ kernel (F, ..., D) + bias, F split over tensor: (B, L, D), its length split.

        Remat keeps it where it takes an exchange, and else makes it once more: of all products, attention's
        output is the cheapest for its size, and the MLP's is not needed again.
        """
        y_BLD = _narrow(self, float8, x, kernel, bias)
        return checkpoint_name(y_BLD, PRODUCT) if self.tensor else y_BLD

    def look_up(self, dtype, tokens_BL, table_VD, position_LD=None, position_BL=None) -> jax.Array:
        """Rows of the token embedding, and of learned positions, added: (B, L, D) of the residual stream.

        Tokens travel to the parts of the table, and rows back, not the table to the tokens: a device's
        tokens are fewer than the vocabulary has ids.

        Args:
            dtype: of the result, in which rows travel.
            tokens_BL: ids.
            table_VD: float32, as the gradient, in which frequent tokens' many terms add up.
            position_LD: None: there are no learned positions.
            position_BL: None: each token's index in its row.
        """
        return _look_up(self, dtype, table_VD, position_LD, tokens_BL, position_BL)

    def axes(self, *logical: str | None) -> tuple[str, ...]:
        """The mesh axes over which logical axes are split, but for those of one device."""
        if self.mesh is None:
            return ()
        used = (axis for axis in mesh_axes(*logical) if not (self.apart and axis == "data"))
        return tuple(axis for axis in used if self.mesh.shape[axis] > 1)

    def spec(self, *logical: str | None) -> PartitionSpec:
        return PartitionSpec(*(self.axes(axis) for axis in logical))

    def on_devices(self, function: Callable, inputs, outputs) -> Callable:
        """The function of each device's parts, laid out as the specs say."""
        if self.mesh is None or self.mesh.size == 1:
            return function
        return self.mapped(function, inputs, outputs)

    def mapped(self, function: Callable, inputs, outputs) -> Callable:
        """The same, on one device too within shard_map."""
        if self.apart:
            # Within the other one, whose mesh it takes. With the check, JAX 0.10 and 0.11 split what is kept
            # for a gradient over data once more.
            rest = {axis for axis in self.mesh.axis_names if axis != "data"}
            return jax.shard_map(
                function, in_specs=inputs, out_specs=outputs, axis_names=rest, check_vma=False
            )
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs)

    def varying(self, tree, *logical: str | None):
        """A tree of arrays as one of each device's own, over these axes, within shard_map."""
        return tree if self.apart else jax.lax.pcast(tree, self.axes(*logical), to="varying")

    def sum_gradient(self, gradient: jax.Array, dimension: int) -> jax.Array:
        """A kernel's gradient of a device's positions -> of all, split along its dimension over fsdp."""
        fsdp = self.axes("embed")
        rest = tuple(axis for axis in self.axes("batch", "length") if axis not in fsdp)
        return self.sum(scatter_sum(gradient, fsdp, dimension), rest)

    def behind(self, x: jax.Array, others) -> jax.Array:
        """x, on CPUs not to be used before the others, a tree of arrays, are there.

        XLA would leave gradients to the end of a layer, such as a bias's, and keep in memory what they are
        sums of: GPT-2's step takes 5 % more. On CPUs it drops barriers, but no product with 0, which may be
        NaN. Where it is, the others are not finite, and the step is none. On GPUs, what comes next hides the
        others' exchanges.
        """
        if self.mesh is None or self.mesh.devices.flat[0].platform != "cpu":
            return x
        return x + sum(0 * other.ravel()[0] for other in jax.tree.leaves(others)).astype(x.dtype)

    @staticmethod
    def sum(tree, axes: tuple[str, ...]):
        return jax.lax.psum(tree, axes) if axes else tree

    @property
    def tensor(self) -> tuple[str, ...]:
        """The axes by which the residual stream's length is split beyond the rest's."""
        return tuple(axis for axis in self.axes("residual_length") if axis not in self.axes("length"))

    @property
    def residual(self) -> PartitionSpec:
        return self.spec("batch", "residual_length", None)

    def wide(self, ndim: int) -> PartitionSpec:
        return self.spec("batch", "length", "mlp", *[None] * (ndim - 3))

    def kernel(self, ndim: int, embed_first: bool) -> PartitionSpec:
        rest = ["mlp"] + [None] * (ndim - 2)
        return self.spec(*(["embed", *rest] if embed_first else [*rest, "embed"]))

    def widening(self, weights: Sequence[Weights]) -> tuple:
        """The specs of kernels and biases that `widen` takes."""
        return tuple(
            (self.kernel(k.ndim, True), None if b is None else self.spec("mlp", *[None] * (b.ndim - 1)))
            for k, b in weights
        )


ONE_DEVICE = Parallel()


def _gathered(p: Parallel, kernel: jax.Array, dtype, dimension: int) -> Factor:
    """A device's part of a kernel -> what it multiplies with: its width whole. It travels in the new type."""
    narrow = factor(kernel, dtype, p.axes("embed", "mlp"))
    return Factor(gather(narrow.values, p.axes("embed"), dimension), narrow.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widen(p: Parallel, float8: bool, x_BLD, weights):
    def local(x_blD, weights):
        dtype = FORWARD if float8 else x_blD.dtype
        x_bLD = factor(gather(x_blD, p.tensor, 1), dtype, p.axes("batch", "length"))

        def product(kernel, bias):
            y = dot(x_bLD, _gathered(p, kernel, dtype, 0), ((2,), (0,)), x_blD.dtype)
            return y if bias is None else y + bias.astype(y.dtype)

        return tuple(product(*one) for one in weights)

    outputs = tuple(p.wide(kernel.ndim + 1) for kernel, _ in weights)
    return p.on_devices(local, (p.residual, p.widening(weights)), outputs)(x_BLD, weights)


def _widen_backward(p: Parallel, float8: bool, saved, dys):
    def local(x_blD, weights, dys):
        dtype, backward = (FORWARD, BACKWARD) if float8 else (x_blD.dtype,) * 2
        x_bLD = factor(gather(x_blD, p.tensor, 1), dtype, p.axes("batch", "length"))

        def back(kernel, d):
            axes = tuple(range(2, d.values.ndim)), tuple(range(1, kernel.ndim))
            return dot(d, _gathered(p, kernel, dtype, 0), axes, x_blD.dtype)

        def gradient(bias, dy, d):
            product = dot(x_bLD, d, ((0, 1), (0, 1)), jnp.float32)
            d_bias = None if bias is None else jnp.sum(dy, (0, 1), dtype=jnp.float32)
            return p.sum_gradient(product, 0), p.sum(d_bias, p.axes("batch", "length"))

        ds = tuple(factor(dy, backward, p.axes("batch", "length", "mlp")) for dy in dys)
        dx_bLD = sum(back(kernel, d) for (kernel, _), d in zip(weights, ds, strict=True))
        d_weights = tuple(gradient(bias, dy, d) for (_, bias), dy, d in zip(weights, dys, ds, strict=True))
        return scatter_sum(p.behind(dx_bLD, d_weights), p.tensor, 1), d_weights

    x_BLD, weights = saved
    specs = p.widening(weights)
    inputs = (p.residual, specs, tuple(p.wide(dy.ndim) for dy in dys))
    return p.on_devices(local, inputs, (p.residual, specs))(x_BLD, weights, dys)


# The forward passes are the plain functions, which can be differentiated forwards, as for Hessian products.
_widen.defvjp(
    lambda p, f, x_BLD, weights: (_widen.fun(p, f, x_BLD, weights), (x_BLD, weights)), _widen_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow(p: Parallel, float8: bool, x, kernel, bias):
    def local(x, kernel, bias):
        dtype, inputs = FORWARD if float8 else x.dtype, kernel.ndim - 1
        narrow = factor(x, dtype, p.axes("batch", "length", "mlp"))
        axes = tuple(range(2, x.ndim)), tuple(range(inputs))
        y_bLD = dot(narrow, _gathered(p, kernel, dtype, inputs), axes, x.dtype)
        y_blD = scatter_sum(y_bLD, p.tensor, 1)
        return y_blD if bias is None else y_blD + bias.astype(y_blD.dtype)

    inputs = (p.wide(x.ndim), p.kernel(kernel.ndim, False), None if bias is None else PartitionSpec())
    return p.on_devices(local, inputs, p.residual)(x, kernel, bias)


def _narrow_backward(p: Parallel, float8: bool, saved, dy_BLD):
    def local(x, kernel, bias, dy_blD):
        dtype, backward = (FORWARD, BACKWARD) if float8 else (x.dtype,) * 2
        d_bias = None if bias is None else jnp.sum(dy_blD, (0, 1), dtype=jnp.float32)
        dy_bLD = factor(gather(dy_blD, p.tensor, 1), backward, p.axes("batch", "length"))
        last = kernel.ndim - 1
        dx = dot(dy_bLD, _gathered(p, kernel, dtype, last), ((2,), (last,)), x.dtype)
        wide = factor(x, dtype, p.axes("batch", "length", "mlp"))
        if x.dtype == jnp.float32 and not float8:
            # XLA's CPU transposes the first factor in memory, the narrow one in less time; it cannot do so
            # with bfloat16.
            d_kernel = jnp.moveaxis(dot(dy_bLD, wide, ((0, 1), (0, 1)), jnp.float32), 0, -1)
        else:
            d_kernel = dot(wide, dy_bLD, ((0, 1), (0, 1)), jnp.float32)
        d_kernel, d_bias = p.sum_gradient(d_kernel, last), p.sum(d_bias, p.axes("batch", "residual_length"))
        return p.behind(dx, (d_kernel, d_bias)), d_kernel, d_bias

    x, kernel, bias = saved
    specs = (p.wide(x.ndim), p.kernel(kernel.ndim, False), None if bias is None else PartitionSpec())
    return p.on_devices(local, (*specs, p.residual), specs)(x, kernel, bias, dy_BLD)


_narrow.defvjp(
    lambda p, f, x, kernel, bias: (_narrow.fun(p, f, x, kernel, bias), (x, kernel, bias)), _narrow_backward
)


def _column(p: Parallel, tokens, rows: int) -> tuple[jax.Array, jax.Array]:
    """Where tokens of the whole vocabulary are in this device's rows of the table, and whether they are."""
    split = p.axes("vocab")
    column = tokens - (rows * jax.lax.axis_index(split) if split else 0)
    return jnp.clip(column, 0, rows - 1), (column >= 0) & (column < rows)


def _positions(p: Parallel, position_BL, shape: tuple[int, int]) -> jax.Array:
    """The position of each token of this device's part (rows of all fsdp, l) of the residual stream.

    Args:
        p: the mesh.
        position_BL: this device's rows; None: positions are the same in all rows, and so (l,).
        shape: of that part.
    """
    split = p.axes("residual_length")
    if position_BL is None:
        return jnp.arange(shape[1]) + (shape[1] * jax.lax.axis_index(split) if split else 0)
    position = gather(position_BL, p.axes("embed"), 0)
    start = shape[1] * jax.lax.axis_index(p.tensor) if p.tensor else 0
    return jax.lax.dynamic_slice_in_dim(position, start, shape[1], 1)


def _look_up_specs(p: Parallel, position_LD, position_BL) -> tuple:
    whole_length = p.spec("batch", "length")
    return (
        p.spec("vocab", "embed"),
        None if position_LD is None else p.spec(None, "embed"),
        whole_length,
        None if position_BL is None else whole_length,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(p: Parallel, dtype, table_VD, position_LD, tokens_BL, position_BL):
    def local(table, position_table, tokens, position):
        column, there = _column(p, gather(tokens, p.axes("embed"), 0), len(table))
        rows = jnp.where(there[..., None], table[column].astype(dtype), 0)
        rows = scatter_sum(rows, p.tensor, 1)  # all but one are 0
        if position_table is not None:
            added = position_table[_positions(p, position, rows.shape[:2])]
            rows = (rows.astype(added.dtype) + added).astype(dtype)
        return exchange(rows, p.axes("embed"), 0, 2)

    specs = _look_up_specs(p, position_LD, position_BL)
    return p.on_devices(local, specs, p.residual)(table_VD, position_LD, tokens_BL, position_BL)


def _look_up_backward(p: Parallel, dtype, saved, dx_BLD):
    _, position_LD, _, position_BL = saved

    def local(table, position_table, tokens, position, dx_blD):
        dx = exchange(dx_blD, p.axes("embed"), 2, 0)  # (rows of all fsdp, l, part of D)
        d_position = None
        if position_table is not None:
            at = _positions(p, position, dx.shape[:2])
            terms = jnp.sum(dx, 0, dtype=jnp.float32) if at.ndim == 1 else dx.astype(jnp.float32)
            d_position = jnp.zeros(position_table.shape, jnp.float32).at[at].add(terms)
            others = tuple(a for a in p.axes("batch", "residual_length") if a not in p.axes("embed"))
            d_position = p.sum(d_position, others)
        dx = gather(dx, p.tensor, 1)
        column, there = _column(p, gather(tokens, p.axes("embed"), 0), len(table))
        terms = jnp.where(there[..., None], dx.astype(jnp.float32), 0)
        d_table = jnp.zeros(table.shape, jnp.float32).at[column].add(terms)
        others = tuple(axis for axis in p.axes("batch", "length") if axis not in p.axes("embed"))
        return p.sum(d_table, others), d_position

    specs = _look_up_specs(p, position_LD, position_BL)
    d_table, d_position = p.on_devices(local, (*specs, p.residual), specs[:2])(*saved, dx_BLD)
    return d_table, d_position, None, None


_look_up.defvjp(lambda p, dtype, *arrays: (_look_up.fun(p, dtype, *arrays), arrays), _look_up_backward)
