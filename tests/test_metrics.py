"""FLOPs, peaks and the meter."""

import time

import pytest

from trainit import config as config_lib
from trainit import optimizers
from trainit.cluster import hardware
from trainit.train.reports import metrics


def resolved(**changes):
    config = config_lib.defaults()
    config.model = config_lib.model(**changes)
    config.optimizer = optimizers.choices()["adamw"]()
    return config_lib.resolve(config, 50257).model


def test_flops_of_gpt2_by_hand():
    """6 FLOPs a weight of the layers and of the head, and 12 N L D for the scores."""
    weights = 12 * (4 * 768**2 + 8 * 768**2) + 768 * 50304
    assert metrics.flops_per_token(resolved()) == 6 * weights + 12 * 12 * 1024 * 768


def test_flops_of_the_modern_parts_by_hand():
    model = resolved(num_kv_heads=4, activation="swiglu", mlp_dim=2048, num_blocks=2, context_length=256)
    weights = 2 * (2 * 768**2 + 2 * 768 * 256 + 3 * 768 * 2048) + 768 * 50304
    assert metrics.flops_per_token(model) == 6 * weights + 12 * 2 * 256 * 768
    sizes = {"num_kv_heads": 4, "mlp_dim": 2048, "num_blocks": 2, "context_length": 256, "head_dim": 32}
    model = resolved(**sizes, activation="geglu", window=100, window_layers="0")
    weights = 2 * (2 * 768 * 384 + 2 * 768 * 128 + 3 * 768 * 2048) + 768 * 50304
    assert metrics.flops_per_token(model) == 6 * weights + 12 * (100 + 256) * 12 * 32


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A40", 149.7),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GB200", 2500.0),
        ("TPU v5 lite", 197.0),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    assert hardware.peak_flops(kind) == (tera and tera * 1e12)


def test_meter_measures_between_steps_and_forgets_pauses(monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 24.0])
    meter = metrics.Meter(resolved(context_length=60))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert set(meter.step(600)) == {"memory/peak_gib"}  # the first has compiled
    meter.waited_for_data(0.5)
    second = meter.step(600)
    assert second["time/step_seconds"] == 2.0
    assert second["throughput/tokens_per_second"] == 300.0
    assert second["time/data_fraction"] == 0.25
    assert second["memory/peak_gib"] > 0.05
    meter.pause()
    assert "time/step_seconds" not in meter.step(600)
    assert meter.step(600)["time/step_seconds"] == 4.0
