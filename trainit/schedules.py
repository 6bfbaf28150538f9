"""Learning-rate schedules: functions of the number of updates done before this one."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from trainit.config import duration

Schedule = Callable[[jnp.ndarray | int], jnp.ndarray]


def build(config: Mapping, peak: float, steps: int, tokens_per_step: int) -> Schedule:
    """The schedule of a run, with linear warm-up from 0 in front: the first step has rate 0.

    - constant: `peak`.
    - linear: `peak` for `constant` steps, then a straight line to `final` * peak at `steps`.
    - cosine: `cycles` times, over equal parts of what is left, half a cosine from `peak` to `final` * peak
      (Loshchilov & Hutter 2016, arXiv 1608.03983).
    - inverse_sqrt: `peak` / sqrt(step / warmup) (Vaswani et al. 2017, arXiv 1706.03762).
    - power: `peak` / (step / warmup)^exponent (Shen et al. 2024, arXiv 2408.13359). Both end with `decay`
      steps of a straight line to `final` * peak, if there are any.
    - trapezoid: `peak`, and over the last `decay` steps a straight line to `final` * peak
      (Hägele et al. 2024, arXiv 2405.18392; also called WSD).
    - piecewise_linear: straight lines between `boundaries`, at which the rate is `values` * peak.

    From each step of `rewarm_at` on, as where a run goes on with other data or a new optimizer, the rate
    begins at 0 again and is back on its way `rewarm` steps later (Ibrahim et al. 2024, arXiv 2403.08763).

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

    starts = config["rewarm_at"]
    starts = [length(at) for at in (starts if isinstance(starts, tuple | list) else (starts,))]
    return _rewarm(_shape(config, peak, steps, length), starts, length(config["rewarm"]))


def _shape(config: Mapping, peak: float, steps: int, length: Callable[[int | str], int]) -> Schedule:
    """The rate without what `rewarm_at` does to it; `length` is that of a duration in steps."""
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
            return _warm_up(_cosine(warmup, steps, config["cycles"], config["final"]), warmup, peak)
        case "inverse_sqrt" | "power":
            exponent = config["exponent"] if config["name"] == "power" else 0.5
            shape = _power(exponent, warmup, steps, length(config["decay"]), config["final"])
            return _warm_up(shape, warmup, peak)
    at, values = (jnp.array(column, jnp.float32) for column in zip(*points, strict=True))
    return _warm_up(lambda step: jnp.interp(step, at, values), warmup, peak)


def _cosine(warmup: int, steps: int, cycles: int, final: float) -> Schedule:
    cycle = max((steps - warmup) / cycles, 1)

    def shape(step):
        done = jnp.maximum(step - warmup, 0) / cycle
        done = jnp.where(done < cycles, done - jnp.floor(done), 1.0)
        return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return shape


def _power(exponent: float, warmup: int, steps: int, decay: int, final: float) -> Schedule:
    least = max(warmup, 1)

    def power(step):
        return (jnp.maximum(step, least) / least) ** -exponent

    def shape(step):
        left = jnp.clip((steps - step) / max(decay, 1), 0.0, 1.0)
        cooling = final + (power(steps - decay) - final) * left
        return jnp.where(step > steps - decay, cooling, power(step)) if decay else power(step)

    return shape


def _rewarm(schedule: Schedule, starts: list[int], rise: int) -> Schedule:
    def rewarmed(step):
        rate = schedule(step)
        for start in starts:
            rate *= jnp.where(step >= start, jnp.minimum(1.0, (step - start) / rise), 1.0)
        return rate

    return rewarmed if starts else schedule


def _warm_up(shape: Schedule, warmup: int, peak: float) -> Schedule:
    return lambda step: (
        jnp.float32(peak) * shape(step) * jnp.minimum(1.0, step / max(warmup, 1) + (not warmup))
    )
