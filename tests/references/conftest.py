"""Float64 for both sides of every comparison."""

import jax
import jax.numpy as jnp
import pytest
import torch

from trainit.transforms import newton_schulz


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Everything is float64, what names a narrower type included."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    for narrower in ("float", "bfloat16"):
        monkeypatch.setattr(torch.Tensor, narrower, torch.Tensor.double)
    plain = newton_schulz.newton_schulz
    monkeypatch.setattr(
        newton_schulz, "newton_schulz", lambda x, dtype, **rest: plain(x, dtype="float64", **rest)
    )
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float)
