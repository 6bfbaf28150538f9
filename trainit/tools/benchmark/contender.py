"""Runs one GPT-2 training step as different programs do it, each in a process of its own.

    python -m trainit.tools.benchmark.contender NAME SHAPE PRECISION STEPS STARTED

prints one line of JSON: seconds from STARTED (a value of time.time()) to the end of the first step, seconds
of each later step, and the process's peak memory in bytes. The model is GPT-2 with an untied head, without
dropout; the step is forward, backward, clipping by global norm and AdamW, in place, on ids drawn at random.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainit.cluster.tuning import collect_garbage_rarely, tune_process

_NAMES = ("num_blocks", "dim", "num_heads", "context_length", "vocab_size", "batch")
_SIZES = {
    "S": (6, 384, 6, 256, 8192, 16),
    "M": (12, 768, 12, 1024, 50304, 4),
    "124M": (12, 768, 12, 1024, 50304, 32),
    "350M": (24, 1024, 16, 1024, 50304, 16),
    "1.3B": (24, 2048, 16, 1024, 50304, 8),
    "tiny": (2, 64, 2, 64, 256, 4),  # only shows that everything runs
}
SHAPES = {name: dict(zip(_NAMES, sizes, strict=True)) for name, sizes in _SIZES.items()}
MATMUL = 4096  # rows and columns of the square product whose rate is the yardstick
# What this suite set for Trainit before a run chose these by itself.
BY_HAND = {"model.remat": "dots", "model.scan_layers": True, "logits_mib": 64.0}
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.1, 1.0


def ids(shape: dict) -> np.ndarray:
    """Returns random token ids (batch, context + 1)."""
    draw = np.random.default_rng(0)
    return draw.integers(0, shape["vocab_size"], (shape["batch"], shape["context_length"] + 1), np.int32)


def config_of(shape: dict, precision: str) -> Any:
    """Returns the config of a run that trains this model by default; with float8, in attention and MLP."""
    from trainit import config as config_lib
    from trainit import optimizers

    config = config_lib.defaults()
    config.update(batch_size=shape["batch"], clip_norm=CLIP_NORM, steps=1000)
    if precision == "float8":
        config.precision_of.update(attention=precision, mlp=precision)
    else:
        config.precision = precision
    config.model = config_lib.model(**{name: size for name, size in shape.items() if name != "batch"})
    config.optimizer = optimizers.choices()["adamw"]()
    return config


def trainit(shape: dict, precision: str) -> Callable[[], float]:
    """Returns Trainit's own step as a run makes it by default, except for the data."""
    _take_devices()
    return step_of(config_of(shape, precision), shape)


def trainit_by_hand(shape: dict, precision: str) -> Callable[[], float] | None:
    """Returns Trainit's step with BY_HAND, or None if a run chooses just that by itself."""
    _take_devices()
    config = config_of(shape, precision)
    by_default = settled(config, shape)
    config.update_from_flattened_dict(BY_HAND)
    return None if settled(config, shape) == by_default else step_of(config, shape)


def _take_devices():
    from trainit.cluster import devices
    from trainit.cluster.place import Place

    devices.configure("", 1, Path())  # JAX_COMPILATION_CACHE_DIR names the cache
    devices.initialize(os.environ.get("JAX_PLATFORMS", ""), Place("alone"))


def settled(config: Any, shape: dict) -> Any:
    """Returns the config of a run on one device, with all that it chooses by itself."""
    import jax

    from trainit import config as config_lib
    from trainit.cluster import devices
    from trainit.train.automatic import choice

    config = config_lib.resolve(config, shape["vocab_size"])
    sizes = dict.fromkeys(config_lib.MESH_AXES, 1)
    return choice.settle(config, sizes, jax.devices()[0].platform, devices.memory())[0]


def step_of(config: Any, shape: dict) -> Callable[[], float]:
    """Returns the step of a run with this config on one device, except for the data."""
    import jax

    from trainit import config as config_lib
    from trainit.parallel.layout import batch_sharding
    from trainit.parallel.mesh import make_mesh, shape_on
    from trainit.train import step

    config = settled(config, shape)
    mesh = make_mesh(dict.fromkeys(config_lib.MESH_AXES, 1), jax.devices()[:1])
    steps, (micro_steps, rows, length) = step.build(config, own := shape_on(config, mesh)), own.batch_at(0)
    batch = {
        "tokens": ids(shape).reshape(micro_steps, rows, -1),
        "lengths": np.full((micro_steps, rows), length),
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    steps.train.compile_ahead(steps.abstract_state, batch)
    state = [steps.init()]

    def train() -> float:
        state[0], result = steps.train(state[0], batch)
        return float(result["train/loss"])

    return train


def matmul(shape: dict, precision: str) -> Callable[[], float]:
    """Returns no step, but a square product."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), jnp.dtype(precision))
    product = jax.jit(lambda a, b: a @ b)
    return lambda: float(product(x, x)[0, 0])


def flax(shape: dict, precision: str) -> Callable[[], float]:
    """Returns a step that is written with Flax's own layers and optax, without further thought."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    D, H, V, L = (shape[name] for name in ("dim", "num_heads", "vocab_size", "context_length"))
    dtype = jnp.dtype(precision)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
            self.qkv = nnx.Linear(D, 3 * D, dtype=dtype, rngs=rngs)
            self.out = nnx.Linear(D, D, dtype=dtype, rngs=rngs)
            self.up = nnx.Linear(D, 4 * D, dtype=dtype, rngs=rngs)
            self.down = nnx.Linear(4 * D, D, dtype=dtype, rngs=rngs)

        def __call__(self, x):
            B, L, _ = x.shape
            q, k, v = (part.reshape(B, L, H, D // H) for part in jnp.split(self.qkv(self.norm1(x)), 3, -1))
            x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, L, D))
            return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens, self.positions = nnx.Embed(V, D, rngs=rngs), nnx.Embed(L, D, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(shape["num_blocks"])])
            self.norm = nnx.LayerNorm(D, rngs=rngs)
            self.head = nnx.Linear(D, V, use_bias=False, dtype=dtype, rngs=rngs)

        def __call__(self, tokens):
            x = (self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))).astype(dtype)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)
    state = [params, optimizer.init(params)]
    tokens = jnp.asarray(ids(shape))

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def update(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def train() -> float:
        *state[:], value = jitted(*state)
        return float(value)

    return train


def torch(shape: dict, precision: str, compiled: bool = False) -> Callable[[], float]:
    """Returns a step of PyTorch with transformers' GPT-2 and scaled dot product attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    D, H, V, L = (shape[name] for name in ("dim", "num_heads", "vocab_size", "context_length"))
    sizes = {"vocab_size": V, "n_positions": L, "n_embd": D, "n_layer": shape["num_blocks"], "n_head": H}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    options = {"tie_word_embeddings": False, "use_cache": False, "attn_implementation": "sdpa"}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **options)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    run = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(ids(shape).astype(np.int64)).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def train() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = run(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return train


CONTENDERS = {function.__name__: function for function in (matmul, trainit, trainit_by_hand, flax, torch)}
CONTENDERS["torch_compile"] = partial(torch, compiled=True)


def main(name: str, shape: str, precision: str, steps: str, started: str):
    """Runs a program's first step and that many more, and prints the line of JSON; {} if there is none."""
    run = CONTENDERS[name](SHAPES[shape], precision)
    if run is None:
        print("{}")
        return
    loss = run()
    first, seconds = time.time() - float(started), []
    for _ in range(int(steps)):
        start = time.perf_counter()
        loss = run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"first": first, "seconds": seconds, "peak": _peak(), "loss": loss}), flush=True)


def _peak() -> int:
    """Returns the most bytes used so far on the GPU, or by this process if there is none."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    if "jax" in sys.modules and (stats := sys.modules["jax"].devices()[0].memory_stats()):
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1].startswith("trainit"):  # as its own command does
        tune_process()
        collect_garbage_rarely()
    main(*sys.argv[1:])
