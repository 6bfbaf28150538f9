"""Optimizer state in bfloat16 and 8 bits: how it is rounded, what it takes, how it trains and is resumed."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny

from trainit import config as config_lib
from trainit import optimizers
from trainit.checkpoints.store import CheckpointStore
from trainit.config import ConfigError
from trainit.optimizers.common import low_bit_state
from trainit.parallel.layout import batch_sharding, parameter_kind
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.parallel.trees import path_name
from trainit.train import step
from trainit.train.reports import metrics

pytestmark = pytest.mark.evidence(
    "optimizer state in bfloat16 and 8 bits: its bytes by formula, its rounding against NumPy, runs "
    "near float32's, the same on 1 and 8 devices, resumed bit for bit"
)

EIGHT, ONE = (2, 2, 2, 1), (1, 1, 1, 1)  # of a mesh
NARROW = ("bfloat16", "int8")
DRAWS = 20_000


def some_numbers() -> np.ndarray:
    """(6, 32): signed, not negative, over 12 decades, with zeros, one alone, and none."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((6, 32)).astype(np.float32)
    x[1] = np.abs(x[1])
    x[2] *= 10.0 ** rng.uniform(-12, 0, 32)
    x[3] = np.square(x[2]) * 1e-9
    x[3, ::5] = 0
    x[4, 1:], x[5] = 0, 0
    return x


def numpy_bfloat16_neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next numbers of bfloat16 towards 0 and away from it, as float64."""
    nearest = x.astype(ml_dtypes.bfloat16)
    magnitude = nearest.view(np.uint16) - (np.abs(nearest.astype(np.float64)) > np.abs(x))
    values = [
        m.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64) for m in (magnitude, magnitude + 1)
    ]
    return values[0], np.where(values[0] == x, values[0], values[1])


def numpy_int8_neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of each row's code: scale * (k / K)^4, K 255 in rows without negative numbers, else 127."""
    low, high = np.zeros_like(x, np.float64), np.zeros_like(x, np.float64)
    for row, numbers in enumerate(x.astype(np.float64)):
        scale, most = np.abs(numbers).max(), 127 if (numbers < 0).any() else 255
        levels = scale * (np.arange(most + 1) / most) ** 4
        k = np.searchsorted(levels, np.abs(numbers) * (1 + 1e-12), side="right") - 1
        low[row] = np.sign(numbers) * levels[k]
        high[row] = np.sign(numbers) * levels[np.minimum(k + 1, most)]
    return low, high


def rounded(name: str, x: np.ndarray) -> np.ndarray:
    """(DRAWS, *x.shape), each with a key of its own."""

    def one(key):
        if name == "bfloat16":
            return low_bit_state.round_to_bfloat16(jnp.asarray(x), key)
        return low_bit_state.decode_blocks(*low_bit_state.encode_blocks(jnp.asarray(x), 1, 32, key))

    keys = jax.random.split(jax.random.key(5), DRAWS)
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.parametrize("name", NARROW)
def test_rounding_is_to_a_neighbour_and_right_in_the_mean(name):
    x = some_numbers()
    neighbours = {"bfloat16": numpy_bfloat16_neighbours, "int8": numpy_int8_neighbours}[name]
    low, high = neighbours(x)
    found = rounded(name, x)
    is_one = np.isclose(found, low, rtol=3e-6, atol=0) | np.isclose(found, high, rtol=3e-6, atol=0)
    assert is_one.all()
    assert ((found == 0) == (x == 0)).all()
    tiny_ones = (low == 0) & (x != 0)  # below the smallest code, to which they are rounded up
    assert tiny_ones.any() == (name == "int8")
    deviation = np.abs(high - low) / 2 / math.sqrt(DRAWS)
    error = np.abs(found.mean(0) - x)
    assert (error <= 5 * deviation + 1e-6 * np.abs(x))[~tiny_ones].all()
    spread = found.std(0)[~tiny_ones & (x != 0)]
    assert (spread > 0).mean() > 0.9  # it does draw


def test_what_bfloat16_can_tell_and_what_no_number_is_stay():
    x = np.array([0.0, -0.0, 1.5, -(2.0**-130), np.inf, -np.inf, np.nan], np.float32)
    found = rounded("bfloat16", x)
    np.testing.assert_array_equal(found, np.broadcast_to(x, found.shape))


@pytest.mark.parametrize("axis, size", [(0, 4), (1, 3), (2, 5), (1, 1)])
def test_blocks_lie_along_any_axis(axis, size):
    """The largest number of each block is exact, whatever is in others."""
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((4, 6, 5)) * 10.0 ** rng.integers(-9, 9, (4, 6, 5))).astype(np.float32)
    codes, scales = low_bit_state.encode_blocks(jnp.asarray(x), axis, size, jax.random.key(0))
    assert codes.dtype == jnp.int8 and codes.shape == x.shape
    blocks = np.stack(np.split(x, x.shape[axis] // size, axis), axis)
    found = np.stack(
        np.split(np.asarray(low_bit_state.decode_blocks(codes, scales)), x.shape[axis] // size, axis), axis
    )
    largest = np.abs(blocks).max(axis + 1)
    np.testing.assert_array_equal(np.abs(scales), largest)
    np.testing.assert_allclose(np.abs(found).max(axis + 1), largest, rtol=1e-6)


@functools.cache
def build(state: str, sizes, arg="", **changes):
    config = tiny.get_config(arg)
    config.optimizer_state = state
    config.model.update(attn_dropout=0.0, dim=64, num_heads=2, num_blocks=1)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    config = config_lib.resolve(config, 257)
    sizes = dict(zip(config_lib.MESH_AXES, sizes, strict=True))
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    return config, mesh, step.build(config, shape_on(config, mesh))


def train(built, state, first: int, last: int):
    """The losses of steps first to last, and the state after them."""
    config, mesh, steps = built
    shape, losses = shape_on(config, mesh).batch_at(0), []
    for number in range(first, last):
        rng = np.random.default_rng(number)
        tokens = (rng.integers(0, 4, (*shape[:2], 33)).cumsum(-1) % 16).astype(np.uint16)
        batch = {"tokens": tokens, "lengths": np.full(shape[:2], 32, np.int32)}
        state, told = steps.train(state, jax.device_put(batch, batch_sharding(mesh)))
        losses.append(float(told["train/loss"]))
    return np.array(losses), state


@pytest.mark.parametrize("state, share", [("bfloat16", 1 / 2), ("int8", 9 / 32)])
def test_its_size_by_formula(state, share):
    """AdamW's two moments: vectors as they are, all else smaller as the type is; split as the parameters."""
    config, mesh, steps = build(state, EIGHT)
    shapes = steps.abstract_state.params
    vectors = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(shapes)
        if parameter_kind(path_name(path)) == "vector"
    )
    rest = metrics.parameter_count(shapes) - vectors
    expected = 4 + 2 * 4 * (vectors + share * rest)  # the count of updates before all
    facts = metrics.facts(config.model, steps.abstract_state, shape_on(config, mesh))
    assert facts["optimizer_bytes"] == expected
    layout = {path_name(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(shapes)}
    found = 0
    for path, leaf in jax.tree.leaves_with_path(steps.abstract_state.opt_state):
        if owner := next((name for name in layout if path_name(path).endswith(name)), None):
            assert leaf.sharding.spec == layout[owner], path
            found += 1
    vectors = sum(parameter_kind(name) == "vector" for name in layout)
    assert found == 2 * (vectors + (len(layout) - vectors) * (2 if state == "int8" else 1))


@functools.cache
def run(state: str, sizes=EIGHT):
    built = build(state, sizes)
    return train(built, built[2].init(), 0, 24)


@pytest.mark.parametrize("state", NARROW)
def test_a_run_is_near_that_in_float32(state):
    """And the same on one device as on eight, but where rounding falls otherwise."""
    (wide, _), (losses, after), (alone, _) = run("float32"), run(state), run(state, ONE)
    assert wide[-1] < wide[0] - 2
    np.testing.assert_allclose(losses, wide, atol={"bfloat16": 0.02, "int8": 0.1}[state])
    assert np.abs(losses - wide).max() > 1e-4  # it did round
    np.testing.assert_allclose(alone, losses, rtol={"bfloat16": 1e-3, "int8": 1e-2}[state])
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(after.opt_state.codes)}
    assert types == {state}


@pytest.mark.parametrize("state", NARROW)
def test_a_resume_is_exact(state, tmp_path):
    built = build(state, EIGHT)
    _, _, steps = built
    _, before = train(built, steps.init(), 0, 3)
    checkpoints = CheckpointStore(tmp_path)
    checkpoints.save(3, before, {})
    checkpoints.wait()
    restored = checkpoints.restore(3, steps.abstract_state)
    losses, after = train(built, restored, 3, 6)
    checkpoints.close()
    whole, end = train(built, steps.init(), 0, 6)
    np.testing.assert_array_equal(losses, whole[3:])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(end))


def test_random_bits_are_even_and_independent():
    """Each bit, and each with the same bit of neighbours in the array, of the next key, of another array."""
    shape = (512, 512)
    bound = 5 / math.sqrt(math.prod(shape))

    def signs(key):
        """(32, 512, 512), -1 or 1."""
        bits = np.asarray(low_bit_state.random_bits(key, shape))
        return np.stack([2.0 * ((bits >> i) & 1) - 1 for i in range(32)])

    keys = [jax.random.fold_in(jax.random.key(0), at) for at in (5, 6)]
    a, b = map(signs, keys)
    assert np.abs(a.mean((1, 2))).max() < bound
    for other in (b, np.roll(a, 1, 1), np.roll(a, 1, 2), np.roll(a, 1, 0), np.roll(a, 7, 0)):
        assert np.abs((a * other).mean((1, 2))).max() < bound


def test_the_rounding_is_drawn_anew_for_each_step_array_and_seed():
    """Sums over a state that continues unchanged, that is of the same numbers in two arrays."""
    shapes = {"head": {"kernel": jax.ShapeDtypeStruct((32, 64), jnp.float32)}}
    numbers = {"head": {"kernel": jnp.full((32, 64), 1 + 2**-9)}}

    def drawn(seed, at):
        def init(params):
            return dict.fromkeys("ab", jax.tree.map(jnp.zeros_like, params))

        def update(gradients, state, params=None, **extra_args):
            return gradients, dict.fromkeys(state, gradients)

        base = optax.GradientTransformationExtraArgs(init, update)
        key = jax.random.key_data(jax.random.key(seed))
        optimizer = low_bit_state.narrow(base, "bfloat16", shapes, key)
        codes = optimizer.update(numbers, optimizer.init(numbers), numbers, step=at)[1].codes
        return [np.asarray(codes[name]["head"]["kernel"], np.float32) for name in ("a", "b")]

    (a, b), (again, _), (later, _), (other, _) = drawn(1, 5), drawn(1, 5), drawn(1, 6), drawn(2, 5)
    np.testing.assert_array_equal(a, again)
    for different in (b, later, other):
        assert 0.3 < (a != different).mean() < 0.7


def test_copies_of_parameters_stay_and_averages_are_found():
    """Mechanic's start is a copy of the parameters; Schedule-Free says where gradients are taken."""
    _, _, steps = build("int8", EIGHT, arg="optimizer=mechanic+adamw")
    head = {
        (path_name(path).split("/")[0], str(leaf.dtype))
        for path, leaf in jax.tree.leaves_with_path(steps.abstract_state.opt_state)
        if leaf.shape == (64, 384)
    }
    assert head == {("wide", "float32"), ("codes", "int8")}
    params = {"head": {"kernel": jnp.ones((32, 64))}}
    config = optimizers.choices()["schedule_free+adamw"]()
    context = optimizers.Context(
        schedule=lambda at: 0.1, steps=9, parameters=params, weight_decay=0.0, clip_norm=0.0,
        key=jax.random.key_data(jax.random.key(0)),
    )  # fmt: skip
    points = []
    for state in ("float32", "int8"):
        optimizer = optimizers.build(config_lib.Config(config), context, state=state)
        there = optimizer.init(params)
        for at in range(3):
            _, there = optimizer.update(params, there, params, step=jnp.int32(at))
        points.append(optimizers.training_point(there, params)["head"]["kernel"])
    assert np.abs(points[0] - 1).min() > 0.005
    np.testing.assert_allclose(points[1] - 1, points[0] - 1, rtol=0.05)


def test_every_optimizer_can_be_narrowed():
    """Whatever its state is: it is taken apart and put together again."""
    params = {
        "head": {"kernel": jnp.full((32, 64), 0.5)},
        "blocks": {"mlp": {"up": {"kernel": jnp.full((2, 32, 32), 0.5), "bias": jnp.zeros((2, 32))}}},
    }
    described, narrowed = lambda leaf: (leaf.shape, str(leaf.dtype)), 0
    for name in optimizers.choices():
        config = optimizers.choices()[name]()
        context = optimizers.Context(
            schedule=lambda at: 0.1, steps=9, parameters=params, weight_decay=0.0, clip_norm=0.0,
            key=jax.random.key_data(jax.random.key(0)),
        )  # fmt: skip
        wide = jax.eval_shape(optimizers.build(config_lib.Config(config), context).init, params)
        for state in NARROW:
            optimizer = optimizers.build(config_lib.Config(config), context, state=state)
            born = jax.eval_shape(optimizer.init, params)
            again = jax.eval_shape(low_bit_state.decode, born)
            assert jax.tree.map(described, again) == jax.tree.map(described, wide), name
        narrowed += bool(jax.tree.leaves(born.codes))
    assert narrowed > 20


def test_blocks_do_not_cross_devices():
    build("int8", (1, 2, 1, 1))
    message = (
        "int8: head/kernel has 2 blocks of 32 numbers along its axis 'embed', which mesh.fsdp=8 does not"
    )
    with pytest.raises(ConfigError, match=message) as error:
        build("int8", (1, 8, 1, 1))
    assert "\n" not in str(error.value)
