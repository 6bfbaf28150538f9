"""Every schedule against its closed form at every step, and durations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT

import trainit.config
from trainit import optimizers
from trainit.config import command_line
from trainit.train.resume import warm_up_again
from trainit.transforms import schedules

PEAK = 0.3
BATCH_SIZE, CONTEXT_LENGTH = 4, 16  # 64 tokens per step
SIZES = trainit.config.BatchSizes((0,), (BATCH_SIZE,), 2000, CONTEXT_LENGTH)


def build(name: str, steps: int, batch_schedule: str = "", **fields) -> schedules.Schedule:
    """By the way of a run: the fields set in a choice of the group, checked and frozen."""
    config = trainit.config.defaults()
    config.update(steps=steps, batch_size=BATCH_SIZE, batch_schedule=batch_schedule)
    config.model = trainit.config.model(dim=32, num_heads=4, context_length=CONTEXT_LENGTH)
    config.optimizer = optimizers.choices()["adamw"]()
    config.schedule = trainit.config.SCHEDULES[name]()
    config.schedule.update(fields)
    resolved = trainit.config.resolve(config, 100)
    return schedules.build(resolved.schedule, PEAK, trainit.config.batch_sizes(resolved))


def rates(schedule, steps: int) -> np.ndarray:
    values = jax.jit(jax.vmap(schedule))(jnp.arange(steps + 6))
    assert values.dtype == jnp.float32
    return np.asarray(values)


def warm_up(k, w):
    return np.where(k < w, k / max(w, 1), 1.0)


def constant(k, T, w):
    return warm_up(k, w)


def cosine(k, T, w, final=0.0):
    half = 0.5 * (1 + np.cos(np.pi * np.clip(k - w, 0, T - w) / (T - w)))
    return warm_up(k, w) * (final + (1 - final) * half)


def linear(k, T, w, c, final=0.0):
    down = final + (1 - final) * (T - k) / (T - w - c)
    return np.select([k < w, k < w + c, k <= T], [k / max(w, 1), 1.0, down], final)


def trapezoid(k, T, w, d, final=0.0):
    down = final + (1 - final) * (T - k) / d
    return np.select([k < w, k < T - d, k <= T], [k / max(w, 1), 1.0, down], final)


def piecewise_linear(k, T, w, boundaries, values):
    """A sum of ramps: each segment adds its rise while it lasts."""
    rate = np.full(k.shape, float(values[0]))
    for start, end, first, last in zip(boundaries, boundaries[1:], values, values[1:], strict=False):
        rate += (last - first) * np.clip(k - start, 0, end - start) / (end - start)
    return warm_up(k, w) * rate


def cosine_cycles(k, T, w, cycles, final=0.0):
    """Each cycle written out."""
    rate, length = np.full(k.shape, float(final)), (T - w) / cycles
    for number in range(cycles):
        start = w + number * length
        inside = (k >= start) & (k < start + length)
        rate[inside] = final + (1 - final) * np.cos(np.pi / 2 * (k[inside] - start) / length) ** 2
    return np.where(k < w, k / max(w, 1), rate)


def power(k, T, w, exponent, d=0, final=0.0):
    ages = np.maximum(k, max(w, 1)) / max(w, 1)
    rate = np.exp(-exponent * np.log(ages))
    if d:
        before = ((T - d) / max(w, 1)) ** -exponent
        rate = np.where(k > T - d, np.maximum(final + (before - final) * (T - k) / d, final), rate)
    return warm_up(k, w) * rate


def inverse_sqrt(k, T, w, d=0, final=0.0):
    return power(k, T, w, 0.5, d, final)


CASES = {
    "inverse_sqrt": (inverse_sqrt, 50, {"warmup": 4}, {"w": 4}),
    "inverse_sqrt_default": (inverse_sqrt, 50, {}, {"w": 5}),
    "inverse_sqrt_without_warmup": (inverse_sqrt, 50, {"warmup": 0}, {"w": 0}),
    "inverse_sqrt_cooled": (
        inverse_sqrt,
        50,
        {"warmup": 4, "decay": "20%", "final": 0.1},
        {"w": 4, "d": 10, "final": 0.1},
    ),
    "power": (power, 50, {"warmup": 3, "exponent": 0.8}, {"w": 3, "exponent": 0.8}),
    "power_cooled": (
        power,
        50,
        {"warmup": 0, "exponent": 0.2, "decay": 7},
        {"w": 0, "exponent": 0.2, "d": 7},
    ),
    "constant": (constant, 50, {"warmup": 0}, {"w": 0}),
    "constant_warm": (constant, 50, {"warmup": 7}, {"w": 7}),
    "constant_default": (constant, 50, {}, {"w": 5}),
    "constant_always_warming": (constant, 50, {"warmup": 50}, {"w": 50}),
    "cosine": (cosine, 50, {"warmup": 0}, {"w": 0}),
    "cosine_warm": (cosine, 50, {"warmup": 9}, {"w": 9}),
    "cosine_one_step_of_warmup": (cosine, 50, {"warmup": 1}, {"w": 1}),
    "cosine_final": (cosine, 50, {"warmup": "20%", "final": 0.1}, {"w": 10, "final": 0.1}),
    "cosine_in_one_cycle": (cosine, 50, {"warmup": 5, "cycles": 1}, {"w": 5}),
    "linear": (linear, 50, {"warmup": 0}, {"w": 0, "c": 0}),
    "linear_default": (linear, 50, {}, {"w": 5, "c": 0}),
    "linear_constant": (linear, 50, {"warmup": 0, "constant": 20}, {"w": 0, "c": 20}),
    "linear_warm_constant": (linear, 50, {"warmup": 8, "constant": "30%"}, {"w": 8, "c": 15}),
    "linear_final": (
        linear,
        50,
        {"warmup": "640 tokens", "constant": "6.4e2 tokens", "final": 0.25},
        {"w": 10, "c": 10, "final": 0.25},
    ),
    "linear_rounded": (linear, 37, {"warmup": "10%", "constant": "50%"}, {"w": 4, "c": 18}),  # 3.7, 18.5
    "linear_upwards": (linear, 50, {"warmup": 5, "final": 2.0}, {"w": 5, "c": 0, "final": 2.0}),
    "linear_one_step": (linear, 1, {"warmup": 0}, {"w": 0, "c": 0}),
    "trapezoid": (trapezoid, 50, {"warmup": 0, "decay": 10}, {"w": 0, "d": 10}),
    "trapezoid_default": (trapezoid, 50, {}, {"w": 5, "d": 10}),
    "trapezoid_no_plateau": (trapezoid, 50, {"warmup": 20, "decay": 30}, {"w": 20, "d": 30}),
    "trapezoid_final": (
        trapezoid,
        50,
        {"warmup": 4, "decay": "768 tokens", "final": 0.5},
        {"w": 4, "d": 12, "final": 0.5},
    ),
    "piecewise_default": (
        piecewise_linear,
        50,
        {},
        {"w": 0, "boundaries": (0, 25, 50), "values": (0, 1, 0)},
    ),
    # The original's: from lr1 to lr2 over a segment of T steps behind start_steps.
    "piecewise_segment": (
        piecewise_linear,
        50,
        {"boundaries": (10, 40), "values": (0.2, 0.8)},
        {"w": 0, "boundaries": (10, 40), "values": (0.2, 0.8)},
    ),
    "piecewise_mixed": (
        piecewise_linear,
        50,
        {"warmup": 3, "boundaries": (0, "20%", "1600 tokens", 45), "values": (0.5, 1.0, 0.1, 0.3)},
        {"w": 3, "boundaries": (0, 10, 25, 45), "values": (0.5, 1.0, 0.1, 0.3)},
    ),
}


@pytest.mark.parametrize("form, steps, fields, lengths", CASES.values(), ids=CASES)
def test_closed_form(form, steps, fields, lengths):
    schedule = build(form.__name__, steps, **fields)
    expected = PEAK * form(np.arange(steps + 6, dtype=np.float64), steps, **lengths)
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("steps", "w", "cycles", "final"), [(50, 5, 3, 0.1), (40, 0, 4, 0.0), (10, 9, 4, 0.0)]
)
def test_cycles_of_a_cosine(steps, w, cycles, final):
    schedule = build("cosine", steps, warmup=w, cycles=cycles, final=final)
    expected = cosine_cycles(np.arange(steps + 6, dtype=np.float64), steps, w, cycles, final)
    if (steps - w) / cycles >= 1:
        np.testing.assert_allclose(rates(schedule, steps), PEAK * expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(rates(schedule, steps)).all()


@pytest.mark.parametrize(
    "name, fields, warmup",
    [
        ("linear", {"warmup": 10, "constant": 40}, 10),
        ("linear", {"warmup": 0, "constant": "100%"}, 0),
        ("linear", {"warmup": 50}, 50),
        ("cosine", {"warmup": 50}, 50),
        ("trapezoid", {"warmup": 10, "decay": 0}, 10),
        ("trapezoid", {"warmup": 50, "decay": 0}, 50),
    ],
)
def test_nothing_left_to_decay(name, fields, warmup):
    """The rate is as usual in all of the run's steps, and a number after them."""
    values = rates(build(name, 50, **fields), 50)
    np.testing.assert_allclose(values[:50], PEAK * warm_up(np.arange(50), warmup), rtol=2e-6)
    assert np.isfinite(values).all()


def test_every_schedule_has_a_closed_form_here():
    assert {form.__name__ for form, *_ in CASES.values()} == set(trainit.config.SCHEDULES)


@pytest.mark.parametrize("name", trainit.config.SCHEDULES)
def test_a_step_alone(name):
    """A Python number, and an array without axes as a train state has it."""
    schedule = build(name, 50, warmup=5)
    values = rates(schedule, 50)
    for step in (0, 3, 31):
        for form in (step, jnp.int32(step)):
            assert schedule(form).shape == ()
            np.testing.assert_allclose(schedule(form), values[step], rtol=1e-6)


def test_long_runs_keep_their_precision():
    """float32 holds the step numbers: the last steps of a million are still told apart."""
    schedule = build("linear", 1_000_000, warmup=0)
    values = np.array([schedule(step) for step in (0, 1, 999_998, 999_999, 1_000_000)])
    np.testing.assert_allclose(values[:2], [PEAK, PEAK * (1 - 1e-6)], rtol=1e-7)
    np.testing.assert_allclose(values[2:], PEAK * np.array([2e-6, 1e-6, 0]), rtol=0.05)


@pytest.mark.parametrize(
    "value, expected",
    [
        (0, 0),
        (500, 500),
        (12.0, 12),
        ("500", 500),
        ("1e3", 1000),
        ("10%", 200),
        ("0.5%", 10),
        (" 100 % ", 2000),
        ("33.33%", 667),
        ("0 tokens", 0),
        ("6400 tokens", 100),
        ("6.4e3 tokens", 100),
        ("6400tokens", 100),
        ("6440 tokens", 101),
    ],
)
def test_duration(value, expected):
    length = SIZES.duration(value)
    assert isinstance(length, int)
    assert length == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "ten",
        -5,
        "-5",
        "-10%",
        "10 steps",
        "10%%",
        "1..5%",
        ".",
        "%",
        "tokens",
        "1,000",
        "nan",
        "inf",
    ],
)
def test_not_a_duration(value):
    with pytest.raises(trainit.config.ConfigError, match="is not a duration") as error:
        SIZES.duration(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0.5, "1.5", 99.9])
def test_a_part_of_a_step(value):
    with pytest.raises(trainit.config.ConfigError, match="not a whole number of steps") as error:
        SIZES.duration(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("at", [(20, 60), ("20%", "3840 tokens")])
def test_warm_up_begins_again(at):
    """At each of the steps a straight line from 0 to where the schedule would be; elsewhere, itself."""
    plain = rates(build("cosine", 100, warmup=5), 100)
    factor = np.ones(106)
    for start in (20, 60):
        factor[start : start + 10] = np.arange(10) / 10
    again = rates(build("cosine", 100, warmup=5, rewarm_at=at, rewarm=10), 100)
    np.testing.assert_allclose(again, factor * plain, rtol=1e-6, atol=1e-9)
    assert again[20] == again[60] == 0 < again[19]


GROWING = "20: 8; 60: 16"  # of 100 steps: 20 of 64 tokens, 40 of 128, 40 of 256


@pytest.mark.parametrize(
    ("name", "tokens", "steps"),
    [
        ("cosine", {"warmup": "3840 tokens"}, {"warmup": 40}),  # 20 * 64 + 20 * 128
        ("linear", {"warmup": "640 tokens", "constant": "3200 tokens"}, {"warmup": 10, "constant": 30}),
        ("trapezoid", {"decay": "5120 tokens"}, {"decay": 20}),  # the last ones
        ("trapezoid", {"decay": "12800 tokens"}, {"decay": 60}),
        (
            "piecewise_linear",
            {"boundaries": (0, "1280 tokens", "6400 tokens", "11520 tokens"), "values": (0.0, 1.0, 0.5, 0.1)},
            {"boundaries": (0, 20, 60, 80), "values": (0.0, 1.0, 0.5, 0.1)},
        ),
    ],
)
def test_tokens_of_batches_that_grow(name, tokens, steps):
    """A duration in tokens is as many steps as it takes to see them where it lies."""
    got = rates(build(name, 100, GROWING, **{"warmup": 0} | tokens), 100)
    want = rates(build(name, 100, **{"warmup": 0} | steps), 100)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_tokens_of_batches_that_grow_in_a_new_warm_up():
    """1280 tokens are 15 steps from step 10 on, and 5 from step 60 on."""
    fields = {"rewarm_at": ("640 tokens", "6400 tokens"), "rewarm": "1280 tokens"}
    k, want = np.arange(106), np.full(106, PEAK)
    for start, rise in ((10, 15), (60, 5)):
        want = np.where((k >= start) & (k < start + rise), PEAK * (k - start) / rise, want)
    got = rates(build("constant", 100, GROWING, warmup=0, **fields), 100)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewarm_at": (0,)}, r"schedule.rewarm_at=\(0,\) must be above 0"),
        ({"rewarm_at": (20, 25), "rewarm": 10}, r"rise by at least rewarm=10, that is 10 steps"),
        ({"rewarm_at": (20,), "rewarm": 0}, r"rewarm=0, that is 0 steps, which must be above 0"),
    ],
)
def test_warm_ups_that_cannot_be(fields, message):
    with pytest.raises(trainit.config.ConfigError, match=message):
        build("linear", 100, **fields)


@pytest.mark.parametrize("steps", [10, 49, 60, 1000])
def test_flags_that_are_offered_are_taken(steps):
    """Those that warm up again, also after a run of which 1 % is no step."""
    file = f"--config={ROOT}/tests/tiny.py"
    before = trainit.config.resolve(
        command_line.load_config(command_line.train_parser("").parse([file])), 257
    ).to_dict()
    flags = warm_up_again({**before, "steps": steps}, steps).split()
    given = command_line.train_parser("").parse([file, f"--config.steps={2 * steps}", *flags])
    after = trainit.config.resolve(command_line.load_config(given), 257)
    schedule = schedules.build(after.schedule, PEAK, trainit.config.batch_sizes(after))
    assert schedule(steps) == 0 < schedule(steps + 1)
