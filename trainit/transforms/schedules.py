"""Learning-rate schedules: functions of the number of updates done before this one."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from trainit.config import BatchSizes

Schedule = Callable[[jnp.ndarray | int], jnp.ndarray]


def build(config: Mapping, peak: float, sizes: BatchSizes) -> Schedule:
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

    From each step of `rewarm_at` on, as where a run continues with other data or a new optimizer, the rate
    begins at 0 again and is back on its way `rewarm` steps later (Ibrahim et al. 2024, arXiv 2403.08763).

    The config is the sub-config `schedule`, checked by `config.resolve`; `sizes` say how many steps durations
    are. Steps count from 0, and after the run's last one its rate stays.
    """
    shape, warmup, starts = _shape(config, sizes), sizes.duration(config["warmup"]), config["rewarm_at"]
    starts = [sizes.duration(at) for at in (starts if isinstance(starts, tuple | list) else (starts,))]
    rises = [sizes.duration(config["rewarm"], begin=at) for at in starts]

    def schedule(step):
        rate = jnp.float32(peak) * shape(step) * jnp.minimum(1.0, step / max(warmup, 1) + (not warmup))
        for start, rise in zip(starts, rises, strict=True):
            rate *= jnp.where(step >= start, jnp.minimum(1.0, (step - start) / rise), 1.0)
        return rate

    return schedule


def _shape(config: Mapping, sizes: BatchSizes) -> Schedule:
    """The rate after the warm-up, as a part of its peak."""
    steps, warmup = sizes.run_steps, sizes.duration(config["warmup"])
    decay = sizes.duration(config["decay"], last=True) if "decay" in config else 0
    match config["name"]:
        case "constant":
            points = [(warmup, 1.0)]
        case "linear":
            down = warmup + sizes.duration(config["constant"], begin=warmup)
            points = [(warmup, 1.0), (down, 1.0), (steps, config["final"])]
        case "trapezoid":
            points = [(warmup, 1.0), (steps - decay, 1.0), (steps, config["final"])]
        case "piecewise_linear":
            points = list(zip(map(sizes.duration, config["boundaries"]), config["values"], strict=True))
        case "cosine":
            return _cosine(warmup, steps, config["cycles"], config["final"])
        case "inverse_sqrt" | "power":
            exponent = config["exponent"] if config["name"] == "power" else 0.5
            return _power(exponent, warmup, steps, decay, config["final"])
    at, values = (jnp.array(column, jnp.float32) for column in zip(*points, strict=True))
    return lambda step: jnp.interp(step, at, values)


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
