"""How a step is computed where its config says auto: what is kept, layers in a loop or not, logits at once.

There is one table, in the order of speed, and the first row that fits into a device's memory counts. What the
config names stays. No choice changes a result, except by rounding. It depends on the config, the kind of
devices, their memory and the mesh: a job that is resumed on the same devices computes in the same way, bit
for bit, and on others perhaps in another one, which the log then says.
"""

import contextlib
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from trainit.cluster import devices, sync
from trainit.config import GATED, Config, ConfigError
from trainit.parallel.mesh import RunShape, make_mesh, mesh_sizes, shape_on

ROOM = 0.9  # of a device's memory is planned with

# What layers keep for the backward pass, in multiples of the results of their matrix products: everything, in
# a loop or unrolled; these results and little else.
IN_LOOP, UNROLLED, RESULTS = 4.3, 2.4, 1.15


@dataclass(frozen=True)
class Choice:
    """A way to compute a step, and why it is the one."""

    remat: str
    scan_layers: bool
    logits_mib: float
    because: str
    layers: float = math.inf  # the most for which it counts


CPU = (
    Choice("dots", True, 64, "measured: a tenth faster than to keep everything, in half of the memory"),
    Choice("block", True, 64, "it needs the least memory"),
)
# Times of a roofline over the step as compiled for H100s, in bfloat16, in the order of the rows: GPT-2 124M,
# 16 × 1024 tokens on one, 37, 43 and 45 ms; 350M likewise, 92 and 110; 1.3B on eight (fsdp), 8 × 2048 tokens
# on each, 266, 299 and 322. None of them has been timed. Unrolled, 24 layers compile in half a minute.
GPU = (
    Choice("none", False, 256, "as compiled for H100s, a loop with remat=dots takes a sixth longer", 24),
    Choice("dots", True, 1024, "as compiled for H100s, remat=block takes longer"),
    Choice("block", True, 256, "it needs the least memory"),
)


def choose(config: Config, sizes: Mapping[str, int], platform: str, memory: float) -> Choice:
    """The way to compute a resolved config's step on a mesh of these sizes, with all that the config names.

    `memory` is what a device has, in bytes. If nothing fits, it is the way that needs the least.
    """
    named = {name: value for name, value in _fields(config).items() if value != "auto"}
    rows = [row for row in (CPU if platform == "cpu" else GPU) if config.model.num_blocks <= row.layers]
    # Rows that agree with what is named about layers; without one, all of them, changed.
    layers = {name: value for name, value in named.items() if name != "logits_mib"}
    agreeing = [row for row in rows if replace(row, **layers) == row]
    ways = [replace(row, **named) for row in agreeing or rows]
    return next((way for way in ways if needed(config, sizes, platform, way) <= ROOM * memory), ways[-1])


def needed(config: Config, sizes: Mapping[str, int], platform: str, way: Choice) -> float:
    """The bytes that a device needs, roughly, for a step that is computed in this way."""
    m, tensor = config.model, sizes["tensor"]
    heads = (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim  # widths of queries, results, keys, values
    maps = 2 if m.activation in GATED else 1  # of the MLP, from the model's width

    # Parameters, their gradients and AdamW's two moments, in float32.
    parameters = m.num_blocks * m.dim * (heads + (maps + 1) * m.mlp_dim) + 2 * m.dim * m.vocab_size
    state = 16 * parameters / (sizes["fsdp"] * tensor)
    if way.remat == "none" and not way.scan_layers and platform != "cpu":
        state += 2 * parameters / tensor  # kernels in the compute type, from the forward to the backward pass

    # A layer's input and results of products, in a micro-step. CPUs compute bfloat16 in float32.
    share = config.batch_size // (sizes["data"] * sizes["fsdp"])
    positions = min(share, config.device_batch_size or share) * m.context_length // sizes["context"]
    width = 4 if platform == "cpu" or config.precision == "float32" else 2
    products = width * positions * (m.dim + heads + maps * m.mlp_dim) / tensor

    # What is kept of each layer, and all of the one at work; logits, and their gradients.
    inputs = m.dim / (m.dim + heads + maps * m.mlp_dim)
    otherwise = IN_LOOP if way.scan_layers else UNROLLED
    kept = {"none": RESULTS, "dots": RESULTS, "block": inputs, "offload": inputs}.get(way.remat, otherwise)
    logits = 4 * positions * m.vocab_size / tensor
    logits = min(logits, way.logits_mib * 2**20) if way.logits_mib else logits
    return state + products * (m.num_blocks * kept + IN_LOOP) + 2 * logits


def settle(config: Config, sizes: Mapping[str, int], platform: str, memory: float) -> tuple[Config, str]:
    """A resolved config in which nothing is left to be chosen, and a line that says what was, and why."""
    way, fields = choose(config, sizes, platform, memory), _fields(config)
    texts = [f"{name}={getattr(way, name)}{' (auto)' * (fields[name] == 'auto')}" for name in fields]
    gib = needed(config, sizes, platform, way) / 2**30
    sizes_text = f"some {gib:.1f} of {memory / 2**30:.1f} GiB of a device"
    reason = f"; {way.because}" if fields["remat"] == "auto" else ""
    layers = {"remat": way.remat, "scan_layers": way.scan_layers}
    model = {**config.model.to_dict(), **layers}
    settled = Config({**config.to_dict(), "logits_mib": way.logits_mib, "model": model})
    return settled, f"{', '.join(texts)}: {sizes_text}{reason}"


def _fields(config: Config) -> dict:
    model = config.model
    return {"remat": model.remat, "scan_layers": model.scan_layers, "logits_mib": config.logits_mib}


def fewer_processes(config: Config) -> list[int]:
    """With restart.shrink, the numbers of processes below the job's on which its mesh fits, too."""
    count, found = jax.process_count(), []
    for fewer in range(1, count if config.restart.shrink else 1):
        with contextlib.suppress(ConfigError):
            mesh_sizes(config, fewer * jax.device_count() // count)
            found.append(fewer)
    return found


def on_devices(config: Config, shrink_to_fit: bool = False) -> tuple[Config, RunShape, str]:
    """The settled config of a run on all of the job's devices, its shape, and the line about what was chosen.

    All processes call it together, since they take the memory of the device that has the least. Errors as of
    `mesh_sizes`.
    """
    sizes = mesh_sizes(config, jax.device_count(), shrink_to_fit)
    host = socket.gethostname()
    neighbours = sync.gather_text(host).count(host) if jax.process_count() > 1 else 1
    memory = min(sync.gather(devices.memory(neighbours) // 2**20)) * 2.0**20
    settled, text = settle(config, sizes, jax.devices()[0].platform, memory)
    return settled, shape_on(settled, make_mesh(sizes)), text
