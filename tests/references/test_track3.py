"""configs/track3.py next to the model of modded-nanoGPT's optimization track, written here with torch alone.

The model is built from the track's description: https://github.com/KellerJordan/modded-nanogpt, folder
records/track_3_optimization, as of June 2026. It is smaller here, and in float32.
"""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from trainit import optimizers
from trainit.config import batch_sizes, resolve
from trainit.model.gpt import GPT
from trainit.transforms import schedules

ROOT = Path(__file__).parents[2]
DIM, HEADS, LAYERS, LENGTH, VOCABULARY, ROWS, STEPS = 64, 2, 3, 48, 128, 4, 20
SIZE = DIM // HEADS


@pytest.fixture(autouse=True)
def float64():
    """Not here: what is compared is float32."""


def config(optimizer="muon"):
    """configs/track3.py, smaller, and with the roundings that belong to as many tokens in a batch."""
    c = runpy.run_path(str(ROOT / "configs/track3.py"))["get_config"]()
    c.model.update(dim=DIM, num_heads=HEADS, num_blocks=LAYERS, context_length=LENGTH, vocab_size=VOCABULARY)
    c.model.rope_theta = 1024 ** (SIZE // 4 / (SIZE // 4 - 1))
    c.update(batch_size=ROWS, steps=STEPS, precision="float32")
    fewer = 512 * 1024 / (ROWS * LENGTH)
    old, new = f"eps={1e-10 / (512 * 1024)}", f"eps={1e-10 / (ROWS * LENGTH)}"
    assert all(old in line for line in c.parameter_groups)
    c.parameter_groups = tuple(line.replace(old, new) for line in c.parameter_groups)
    c.optimizer.update(ns_precision="float32", ns_eps=c.optimizer.ns_eps * fewer)
    if optimizer == "adamw":
        c.optimizer = optimizers.choices()["adamw"]()
        c.optimizer.update(learning_rate=0.0015, beta2=0.95, eps=1e-10 / (ROWS * LENGTH))
    return resolve(c, VOCABULARY)


def initial(model, noise=0.02):
    """Parameters of the config's own kind, with noise, so that those that begin with 0 count, too."""
    rng, params = np.random.default_rng(0), model.init(jax.random.key(0))
    return jax.tree.map(
        lambda x: np.asarray(x) + np.float32(noise) * rng.standard_normal(x.shape, np.float32), params
    )


def rms(x, gain=1.0):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps) * gain


class Track:
    """The track's model and its two optimizers: weights by name, kernels as (outputs, inputs)."""

    def __init__(self, params):
        self.w = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in theirs(params).items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def rotated(self, x):
        """Half of the frequencies fall from 1 to 1/1024, the others are 0; pairs lie half a head apart."""
        frequency = torch.zeros(SIZE // 2)
        frequency[: SIZE // 4] = 1024.0 ** -torch.linspace(0, 1, SIZE // 4)
        angle = torch.arange(x.shape[1])[:, None, None] * frequency
        a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)

    def attention(self, i, x):
        q, k, v = (self.linear(f"{i}.{part}", x).unflatten(-1, (HEADS, SIZE)) for part in "qkv")
        q, k = self.rotated(rms(q)), self.rotated(rms(k))
        scores = 0.12 * torch.einsum("bqhd,bkhd->bhqk", q, k)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.linear(f"{i}.attn.proj", torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))

    def logits(self, tokens):
        x = rms(self.w["embed.weight"][tokens], self.w["norm1.gains"])
        for i in range(LAYERS):
            x = x + self.attention(i, rms(x, self.w[f"{i}.norm1.gains"]))
            h = self.linear(f"{i}.fc", rms(x, self.w[f"{i}.norm2.gains"])).relu().square()
            x = x + self.linear(f"{i}.mlp.proj", h)
        y = self.linear("proj", rms(x, self.w["norm2.gains"]))
        return 15 * y / (y.square() + 225).sqrt()

    def loss(self, batch):
        """The sum over the batch, as the track has it."""
        logits = self.logits(batch[:, :-1]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")


def turned(x):
    """The outputs of a query's or key's kernel (..., H, K) in the track's places.

    Trainit turns the pairs (i, i + K/4) of the first half of a head, the track (i, i + K/2) for i < K/4, in
    the other direction.
    """
    q, h = SIZE // 4, SIZE // 2
    place = np.empty(SIZE, int)  # of each of ours there
    place[:q], place[q:h] = np.arange(h, h + q), np.arange(q)
    place[h : h + q], place[h + q :] = np.arange(q, h), np.arange(h + q, SIZE)
    y = np.empty_like(x)
    y[..., place] = x
    return y


def theirs(params):
    """The track's names and forms of parameters, or of their gradients."""
    p = jax.tree.map(np.asarray, params)
    w = {"embed.weight": p["token_embedding"]["embedding"], "proj.weight": p["head"]["kernel"].T}
    w |= {"proj.bias": p["head"]["bias"]}
    w |= {"norm1.gains": p["embedding_norm"]["scale"], "norm2.gains": p["final_norm"]["scale"]}
    b = p["blocks"]
    for i in range(LAYERS):
        for part in ("query", "key", "value"):
            kernel, bias = (b["attention"][part][name][i] for name in ("kernel", "bias"))
            if part != "value":
                kernel, bias = turned(kernel), turned(bias)
            w |= {f"{i}.{part[0]}.weight": kernel.reshape(DIM, -1).T, f"{i}.{part[0]}.bias": bias.reshape(-1)}
        linears = {"attn.proj": b["attention"]["out"], "fc": b["mlp"]["up"], "mlp.proj": b["mlp"]["down"]}
        for name, linear in linears.items():
            columns = linear["bias"].shape[-1]
            w |= {f"{i}.{name}.weight": linear["kernel"][i].reshape(-1, columns).T}
            w |= {f"{i}.{name}.bias": linear["bias"][i]}
        norms = ("norm1", "attention_norm"), ("norm2", "mlp_norm")
        w |= {f"{i}.{name}.gains": b[ours]["scale"][i] for name, ours in norms}
    return w


def batches(count):
    """Random walks over the vocabulary: there is something to learn."""
    rng = np.random.default_rng(1)
    steps = rng.integers(-2, 3, (count, ROWS, LENGTH + 1))
    return (np.cumsum(steps, -1) + rng.integers(0, VOCABULARY, (count, ROWS, 1))) % VOCABULARY


def loss_of(model):
    def loss(params, batch):
        logits = model(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    return loss


@pytest.mark.evidence("the model of modded-nanoGPT's optimization track equals the track's in torch")
def test_logits_and_gradients_are_the_tracks():
    model = GPT(config().model)
    params, (batch,) = initial(model, 0.2), batches(1)
    track = Track(params)
    expected = track.logits(torch.from_numpy(batch[:, :-1])).detach().numpy()
    found = model(params, jnp.asarray(batch[:, :-1]))
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.std())

    (track.loss(torch.from_numpy(batch)) / (ROWS * LENGTH)).backward()
    gradients = theirs(jax.grad(loss_of(model))(params, jnp.asarray(batch)))
    assert gradients.keys() == track.w.keys()
    for name, gradient in gradients.items():
        wanted = track.w[name].grad.numpy()
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_initial_weights_have_the_tracks_deviations():
    c = config()
    params = GPT(c.model).init(jax.random.key(0))
    weights = theirs(params)
    for name, x in weights.items():
        if name.endswith("gains"):
            assert (x == 1).all()
        elif "proj" in name or name.endswith("bias"):
            assert (x == 0).all(), name
        else:
            std = 1.0 if name.startswith("embed") else np.sqrt(0.33 / x.shape[1])
            np.testing.assert_allclose(x.std(), std, rtol=0.05, err_msg=name)


def muon(g, momentum):
    """Jordan's Muon with twelve steps of the quintic that converges, on a matrix (outputs, inputs)."""
    momentum += 0.05 * (g - momentum)
    x = 0.05 * g + 0.95 * momentum
    x = x / (x.norm() + 1e-7)
    wide = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(12):
        gram = wide @ wide.T
        wide = 2 * wide + (-1.5 * gram + 0.5 * gram @ gram) @ wide
    x = wide.T if x.shape[0] > x.shape[1] else wide
    return x * max(1, g.shape[0] / g.shape[1]) ** 0.5


ADAM = {"betas": (0.8, 0.95), "weight_decay": 0.001}
OF_MATRICES = {"lr": 0.0015, "betas": (0.9, 0.95), "weight_decay": 0.1}  # of AdamW for all parameters


def kind(name):
    return {"embed.weight": "embed", "proj.weight": "head"}.get(
        name, "matrix" if "weight" in name else "vector"
    )


def train_there(params, data, optimizer):
    """Losses of the track's model, its matrices trained by "muon" or "adamw", the rest by AdamW."""
    track, rates = Track(params), {"embed": 0.7, "head": 0.004, "vector": 0.015}
    matrices = {name: w for name, w in track.w.items() if kind(name) == "matrix"}
    groups = [
        {"params": [w], "lr": rates[kind(name)], **ADAM}
        for name, w in track.w.items()
        if name not in matrices
    ]
    if optimizer == "adamw":
        groups.append({"params": list(matrices.values()), **OF_MATRICES})
        matrices = {}
    adam = torch.optim.AdamW(groups, eps=1e-10)
    momenta = {name: torch.zeros_like(w) for name, w in matrices.items()}
    peaks, losses = [group["lr"] for group in adam.param_groups], []
    for step, batch in enumerate(data):
        progress = step / len(data)
        part = 1.0 if progress < 0.3 else (1 - progress) / 0.7
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = part * peak
        for w in track.w.values():
            w.grad = None
        loss = track.loss(torch.from_numpy(batch))
        loss.backward()
        losses.append(loss.item() / (ROWS * LENGTH))
        adam.step()
        with torch.no_grad():
            for name, w in matrices.items():
                w.mul_(1 - part * 0.025 * 0.05)
                w.sub_(part * 0.025 * muon(w.grad, momenta[name]))
    return losses


def train_here(c, model, params, data):
    schedule = schedules.build(c.schedule, c.optimizer.learning_rate, batch_sizes(c))
    key = jax.random.key_data(jax.random.key(0))
    optimizer = optimizers.of_run(c, schedule, jax.eval_shape(model.init, jax.random.key(0)), key)

    @jax.jit
    def do(params, state, batch, step):
        loss, gradient = jax.value_and_grad(loss_of(model))(params, batch)
        updates, state = optimizer.update(gradient, state, params, step=step)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for step, batch in enumerate(data):
        params, state, loss = do(params, state, jnp.asarray(batch), jnp.int32(step))
        losses.append(float(loss))
    return losses


@pytest.mark.evidence("twenty steps of the track's Muon and AdamW from the same weights: losses within 1e-4")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_twenty_steps_are_the_tracks(optimizer):
    c = config(optimizer)
    model = GPT(c.model)
    params, data = initial(model), batches(STEPS)
    expected, found = train_there(params, data, optimizer), train_here(c, model, params, data)
    assert expected[-1] < expected[0] - 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
