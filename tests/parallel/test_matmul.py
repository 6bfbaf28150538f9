"""Products and embedding on a mesh, with their gradients, against NumPy in float64 on whole arrays."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from trainit.config import MESH_AXES
from trainit.parallel.collectives import ONE_DEVICE, Parallel
from trainit.parallel.cpu_workarounds import keep, product
from trainit.parallel.embedding import vocab_parallel_embedding
from trainit.parallel.float8 import Factor
from trainit.parallel.matmul import column_parallel, row_parallel
from trainit.parallel.mesh import describe_devices, make_mesh

pytestmark = pytest.mark.evidence(
    "products and embedding on five meshes against float64, with their gradients, which nothing rounds "
    "to bfloat16"
)

B, L, D, F, V = 8, 16, 24, 32, 40
MESHES = ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8})
SPLIT = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(map(str, sizes.items())) or "one")
TYPED = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def parallel(sizes) -> Parallel:
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes
    return Parallel(make_mesh(sizes)) if any(n > 1 for n in sizes.values()) else ONE_DEVICE


def draw(dtype, *shapes):
    """Arrays in `dtype`, whose values float64 has too."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(found, expected, dtype, steps):
    """Within that many roundings to the type, of the largest value."""
    tolerance = steps * (2**-8 if dtype == jnp.bfloat16 else 2**-22)
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max()
    )


class Device:
    """What a mesh asks of one."""

    platform = device_kind = "fake"

    def __init__(self, number: int, process: int):
        self.id, self.process_index = number, process


@pytest.mark.parametrize("per_process", [1, 8])
def test_inner_axes_stay_inside_a_machine(per_process):
    """On 4 machines of 8, of one process a device or a machine: fsdp × tensor on one, data across."""
    devices = [Device(number, number // per_process) for number in range(32)]
    mesh = make_mesh({"data": 4, "fsdp": 4, "tensor": 2, "context": 1}, devices)
    machines = np.vectorize(lambda device: device.id // 8)(mesh.devices)
    assert [set(machines[at].ravel()) for at in range(4)] == [{0}, {1}, {2}, {3}]
    expected = "8 devices, data 2, fsdp 0-3, tensor 0-1, context 0"
    if per_process == 1:
        expected = "1 devices, data 0, fsdp 1, tensor 0, context 0"
    assert describe_devices(mesh, 2) == expected


def test_forms_for_cpus_are_for_cpus_only():
    """On another platform, products and what is kept are as they are written, in JAX's own terms."""
    cpu, gpu = (
        SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        for platform in ("cpu", "cuda")
    )
    x, k = draw(jnp.bfloat16, (B, D), (D, F))

    def program(mesh):
        def function(x, k):
            y = product(Factor(x, None), Factor(k, None), ((1,), (0,)), x.dtype, mesh)
            return keep(y, "name", mesh)

        return str(jax.make_jaxpr(function)(x, k))

    plain = str(jax.make_jaxpr(lambda x, k: checkpoint_name(x @ k, "name"))(x, k))
    assert program(gpu) == program(None)
    assert program(gpu).count("convert_element_type") == plain.count("convert_element_type") == 0
    assert program(gpu).count("preferred_element_type=bfloat16") == 1
    assert program(cpu).count("preferred_element_type=float32") == 1
    assert "name[name=name]" in program(cpu) and "bf16" in program(cpu).split("name[")[1]


@SPLIT
@TYPED
def test_widen(sizes, dtype):
    x, dy1, dy2 = draw(dtype, (B, L, D), (B, L, 8, 4), (B, L, F))
    k1, k2, bias = (k.astype(jnp.float32) for k in draw(dtype, (D, 8, 4), (D, F), (8, 4)))

    @jax.jit
    def run(x, weights, dys):
        outputs, back = jax.vjp(lambda x, weights: column_parallel(parallel(sizes), x, *weights), x, weights)
        return outputs, back(dys)

    weights = ((k1, bias), (k2, None))
    (y1, y2), (dx, ((d1, d_bias), (d2, none))) = run(x, weights, (dy1, dy2))
    assert none is None and {y1.dtype, y2.dtype, dx.dtype} == {jnp.dtype(dtype)}
    assert {d.dtype for d in (d1, d2, d_bias)} == {jnp.dtype("float32")}
    x, dy1, dy2, k1, k2, bias = exact((x, dy1, dy2, k1, k2, bias))
    close(y1, np.einsum("bld,dhk->blhk", x, k1) + bias, dtype, 3)
    close(y2, x @ k2, dtype, 2)
    close(dx, np.einsum("blhk,dhk->bld", dy1, k1) + dy2 @ k2.T, dtype, 4)
    # Gradients of weights are exact products, added up in float32: nothing is rounded to bfloat16.
    close(d1, np.einsum("bld,blhk->dhk", x, dy1), jnp.float32, 8)
    close(d2, np.einsum("bld,blf->df", x, dy2), jnp.float32, 8)
    close(d_bias, dy1.sum((0, 1)), jnp.float32, 8)


@SPLIT
@TYPED
def test_narrow(sizes, dtype):
    x, dy = draw(dtype, (B, L, 8, 4), (B, L, D))
    kernel, bias = (k.astype(jnp.float32) for k in draw(dtype, (8, 4, D), (D,)))

    @jax.jit
    def run(x, kernel, bias, dy):
        y, back = jax.vjp(functools.partial(row_parallel, parallel(sizes)), x, kernel, bias)
        return y, back(dy)

    y, (dx, d_kernel, d_bias) = run(x, kernel, bias, dy)
    assert (y.dtype, dx.dtype, d_kernel.dtype, d_bias.dtype) == (dtype, dtype, jnp.float32, jnp.float32)
    x, dy, kernel, bias = exact((x, dy, kernel, bias))
    close(y, np.einsum("blhk,hkd->bld", x, kernel) + bias, dtype, 4)
    close(dx, np.einsum("bld,hkd->blhk", dy, kernel), dtype, 2)
    close(d_kernel, np.einsum("blhk,bld->hkd", x, dy), jnp.float32, 8)
    close(d_bias, dy.sum((0, 1)), jnp.float32, 8)


@SPLIT
@TYPED
@pytest.mark.parametrize("positions", ["none", "index", "documents"])
def test_look_up(sizes, dtype, positions):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (B, L))
    position = {"none": None, "index": None, "documents": rng.integers(0, L, (B, L))}[positions]
    table, positional = draw(jnp.float32, (V, D), (L + 8, D))
    positional = None if positions == "none" else positional
    (dx,) = draw(dtype, (B, L, D))

    @jax.jit
    def run(table, positional, dx):
        def look_up(table, positional):
            return vocab_parallel_embedding(parallel(sizes), dtype, tokens, table, positional, position)

        x, back = jax.vjp(look_up, table, positional)
        return x, back(dx)

    x, (d_table, d_positional) = run(table, positional, dx)
    assert x.dtype == dtype and d_table.dtype == jnp.float32
    at = np.broadcast_to(np.arange(L), (B, L)) if position is None else position
    expected, d_expected = exact(table)[tokens], np.zeros((V, D))
    np.add.at(d_expected, tokens, exact(dx))
    close(d_table, d_expected, jnp.float32, 8)
    if positional is not None:
        expected = expected + exact(positional)[at]
        d_expected = np.zeros((L + 8, D))
        np.add.at(d_expected, at, exact(dx))
        close(d_positional, d_expected, jnp.float32, 8)
    close(x, expected, dtype, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [(6, 4), (257,)])
@pytest.mark.parametrize("inputs", [(32,), (4, 8)])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_products_of_kernels_in_parts_are_the_usual_ones(rows, inputs, outputs, dtype):
    """Next to NumPy in float64; the kernel's numbers of outputs have parts, or none."""
    draw = np.random.default_rng(rows)
    x = jnp.array(draw.standard_normal((1, rows, *inputs)), dtype)
    kernel = jnp.array(draw.standard_normal((*inputs, *outputs)), dtype)
    axes = tuple(range(2, x.ndim)), tuple(range(len(inputs)))
    y = product(Factor(x, None), Factor(kernel, None), axes, dtype, None, parts=4)
    expected = np.tensordot(np.asarray(x, np.float64), np.asarray(kernel, np.float64), axes)
    assert (y.dtype, y.shape) == (jnp.dtype(dtype), expected.shape)
    error = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=error)


def test_a_kernel_in_parts_is_read_as_it_lies():
    """One with its inputs last, from which the model gets its usual axes, is not copied for the product."""

    def multiply(x_BLD, kernel_HKD):
        kernel_DHK = jnp.moveaxis(kernel_HKD, -1, 0)
        factors = Factor(x_BLD, None), Factor(kernel_DHK, None)
        return product(*factors, ((2,), (0,)), jnp.float32, None, parts=2)

    kernel = np.zeros((8, 64, 256), np.float32)
    compiled = jax.jit(multiply).lower(np.zeros((1, 1, 256), np.float32), kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 10
