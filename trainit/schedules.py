"""Learning-rate schedules: functions of the number of updates done before this one."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax

from trainit.config import duration

Schedule = Callable[[jnp.ndarray | int], jnp.ndarray]


def build(config: Mapping, peak: float, steps: int, tokens_per_step: int) -> Schedule:
    """The schedule of a run, with linear warm-up from 0 in front: the first step has rate 0.

    - constant: `peak`.
    - linear: `peak` for `constant` steps, then a straight line to `final` * peak at `steps`.
    - cosine: half a cosine from `peak` to `final` * peak at `steps`
      (Loshchilov & Hutter 2016, arXiv 1608.03983).
    - trapezoid: `peak`, and over the last `decay` steps a straight line to `final` * peak
      (Hägele et al. 2024, arXiv 2405.18392; also called WSD).
    - piecewise_linear: straight lines between `boundaries`, at which the rate is `values` * peak.

    Args:
        config: the sub-config `schedule`, checked by `config.resolve`.
        peak: `optimizer.learning_rate`.
        steps: of the whole run; behind them the last value stays.
        tokens_per_step: to turn durations in tokens into steps.

    Returns:
        step (0-based, integer scalar) -> float32 scalar.
    """

    def length(value) -> int:
        return duration(value, steps, tokens_per_step)

    warmup = length(config["warmup"])
    match config["name"]:
        case "constant":
            points = [(warmup, 1.0)]
        case "linear":
            points = [(warmup, 1.0), (warmup + length(config["constant"]), 1.0), (steps, config["final"])]
        case "trapezoid":
            points = [(warmup, 1.0), (steps - length(config["decay"]), 1.0), (steps, config["final"])]
        case "piecewise_linear":
            points = list(zip(map(length, config["boundaries"]), config["values"], strict=True))
        case "cosine":
            cosine = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), alpha=config["final"])
            return _warm_up(lambda step: cosine(jnp.maximum(step - warmup, 0)), warmup, peak)
    at, values = (jnp.array(column, jnp.float32) for column in zip(*points, strict=True))
    return _warm_up(lambda step: jnp.interp(step, at, values), warmup, peak)


def _warm_up(shape: Schedule, warmup: int, peak: float) -> Schedule:
    return lambda step: (
        jnp.float32(peak) * shape(step) * jnp.minimum(1.0, step / max(warmup, 1) + (not warmup))
    )
