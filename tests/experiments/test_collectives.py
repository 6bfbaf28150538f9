"""Collectives read from compiled programs, against small programs that are made of known ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainit.experiments.plan import hlo
from trainit.experiments.plan.hlo import Collective
from trainit.parallel.layout import replicated_sharding
from trainit.parallel.mesh import make_mesh

pytestmark = pytest.mark.evidence(
    "exchanged bytes are read from compiled programs, against small programs whose exchanges are known"
)

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
F = jnp.float32


def found(function, shape, spec, outputs, dtype=F, sizes=SIZES) -> list[tuple]:
    """(kind, dtype, axes, devices, size, times) of a function under shard_map."""
    mesh = make_mesh(sizes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=outputs, check_vma=False)
    argument = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    _, text = hlo.compile_with_text(jax.jit(mapped).lower(argument))
    return [(c.kind, c.dtype, c.axes, c.devices, c.size, c.times) for c in hlo.read(text, sizes)]


P = PartitionSpec
CASES = {
    "gather": (
        lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        *((16, 8), P("fsdp"), P(), jnp.bfloat16, [("all-gather", "bf16", ("fsdp",), 2, 256, 1)]),
    ),
    "gather over two axes": (
        lambda x: jax.lax.all_gather(x, ("data", "tensor"), tiled=True),
        *((16, 8), P(("data", "tensor")), P(), F, [("all-gather", "f32", ("data", "tensor"), 4, 512, 1)]),
    ),
    "sum": (
        lambda x: jax.lax.psum(x, ("data", "fsdp", "tensor")),
        *((16, 8), P("fsdp"), P(), F, [("all-reduce", "f32", ("data", "fsdp", "tensor"), 8, 256, 1)]),
    ),
    "scatter": (
        lambda x: jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True),
        *((16, 8), P("fsdp"), P("fsdp", "tensor"), F, [("reduce-scatter", "f32", ("tensor",), 2, 256, 1)]),
    ),
    "exchange": (
        lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True),
        *((16, 8), P("data"), P(None, "data"), F, [("all-to-all", "f32", ("data",), 2, 256, 1)]),
    ),
    "ring": (
        lambda x: jax.lax.ppermute(x, ("data", "tensor"), [(0, 1), (1, 2), (2, 3), (3, 0)]),
        *((16, 8), P("tensor"), P("tensor"), F),
        [("collective-permute", "f32", ("data", "tensor"), 4, 256, 1)],
    ),
    "shift": (
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
        *((16, 8), P("tensor"), P("tensor"), F, [("collective-permute", "f32", ("tensor",), 2, 256, 1)]),
    ),
}


@pytest.mark.parametrize("function, shape, spec, outputs, dtype, expected", CASES.values(), ids=CASES)
def test_each_kind(function, shape, spec, outputs, dtype, expected):
    assert found(function, shape, spec, outputs, dtype) == expected


def test_loops_in_loops():
    """Five times three sums, and one gather in the outer loop."""

    def inner(x, _):
        return jax.lax.psum(x, "data") / 2, None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, length=3)
        return x + jax.lax.all_gather(x, "fsdp").sum(0), None

    expected = [("all-reduce", "f32", ("data",), 2, 512, 15), ("all-gather", "f32", ("fsdp",), 2, 1024, 5)]
    assert sorted(found(lambda x: jax.lax.scan(outer, x, length=5)[0], (16, 8), P(), P())) == sorted(expected)


def test_the_text_does_not_come_from_the_cache(keep_compiled, tmp_path):
    """Compiled before, and so in the cache of programs, which is still used afterwards."""
    hits = []
    keep_compiled(tmp_path)
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))

    def lowered():
        layout = replicated_sharding(make_mesh(SIZES))
        return jax.jit(lambda x: jnp.sin(x) * 41.5, out_shardings=layout).lower(jnp.ones(3))

    for _ in range(2):
        lowered().compile()
        assert "sine" in hlo.compile_with_text(lowered())[1]
    assert hits.count("/jax/compilation_cache/cache_hits") == 1


def test_one_device_exchanges_nothing():
    _, text = hlo.compile_with_text(jax.jit(jnp.sin).lower(jnp.ones(3)))
    assert hlo.read(text, dict.fromkeys(SIZES, 1)) == []


def test_equal_ones_count_once():
    """Two gathers of the same converted array, and one of another: two gathers of each type."""

    def gathers(x):
        def gather(y):
            return jax.lax.all_gather(y.astype(jnp.bfloat16), "fsdp")

        return gather(2 * x).sum() + gather(2 * x)[0].max() + gather(3 * x).sum()

    expected = ("all-gather", "bf16", ("fsdp",), 2, 512, 1)
    assert found(gathers, (16, 8), P(), P()) == [expected, expected]


def test_what_the_partitioner_adds():
    """A product over a split dimension is a sum over its axis, written in another form than shard_map's."""
    mesh = make_mesh(SIZES)
    a, b = (
        jax.ShapeDtypeStruct(shape, F, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((8, 16), P(None, ("data", "tensor"))), ((16, 4), P(("data", "tensor"))))
    )
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P()))
    read = hlo.read(hlo.compile_with_text(product.lower(a, b))[1], SIZES)
    assert hlo.total(read).keys() <= {("all-reduce", (axes)) for axes in _subsets()}
    assert {axis for one in read for axis in one.axes} == {"data", "tensor"}
    assert all((one.dtype, one.size, one.times) == ("f32", 8 * 4 * 4, 1) for one in read)


def _subsets():
    return (("data",), ("tensor",), ("data", "tensor"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), use_global_device_ids=true", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("{}, dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(text, expected):
    assert hlo.device_groups(f"replica_groups={text}", 4).tolist() == expected


def test_groups_that_are_no_axes():
    axes = functools.partial(hlo.axes_of, sizes=SIZES)
    assert axes(hlo.device_groups("replica_groups={{0,1},{2,3},{4,6},{5,7}}", 8)) == ("?",)


def test_a_loop_without_a_known_length_is_refused():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jax.lax.psum(x, "data"), x)

    with pytest.raises(ValueError, match="does not count up to a constant"):
        found(until, (16, 8), P(), P())


def test_bytes_of_rings():
    """On 4 devices: the other three quarters of a gathered array, and twice as many bytes for a sum."""

    def sent(kind):
        return Collective(kind, "f32", ("fsdp",), 4, 400, 3).bytes

    assert [sent(kind) for kind in hlo.KINDS] == [900, 1800, 900, 900, 1200]
