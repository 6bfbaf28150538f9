"""Measures how fast texts are written: GPT-2 124M in float32, next to `transformers`.

Both programs take turns, each in a process of its own that writes the same number of tokens twice, after
prompts of PROMPT tokens. The second time counts. In the first round, programs are compiled and kept.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from trainit.tools.benchmark import children

PROMPT, VOCABULARY = 256, 50_257
ROWS = (1, 16)  # texts at once


def measure(length: int, rounds: int) -> Iterator[str]:
    """Yields a line for each number of texts at once: tokens a second of both, and the time to the first."""
    with tempfile.TemporaryDirectory() as cache:
        for rows in ROWS:
            turns = [[_run(name, rows, length, cache) for name in PROGRAMS] for _ in range(rounds)]
            own, other = ([turn[index] for turn in turns] for index in range(2))
            if failed := [result["error"] for result in (*own, *other) if "error" in result]:
                yield f"{rows} at once: {failed[0]}"
                continue
            rates = [median(rows * length / result["seconds"] for result in of) for of in (own, other)]
            first = median(result["first"] for result in own[1:] or own)
            yield (
                f"{rates[0]:.1f} tokens/s  {rows} at once, {rates[0] / rates[1]:.2f} times transformers "
                f"({rates[1]:.1f}); {first:.1f} s from loaded parameters to the first token"
            )


def _run(name: str, rows: int, length: int, cache: str) -> dict:
    """What a program prints in a new process; or {"error": its last line}."""
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    arguments = name, str(rows), str(length)
    try:
        return json.loads(children.run("trainit.tools.benchmark.generating", *arguments, settings=settings))
    except ChildProcessError as error:
        return {"error": f"{name}: {error}"}


def prompts(rows: int) -> np.ndarray:
    """Token ids (rows, PROMPT), drawn at random."""
    return np.random.default_rng(0).integers(0, VOCABULARY - 1, (rows, PROMPT), np.int32)


def trainit(rows: int, length: int) -> dict:
    """Seconds from loaded parameters to the first token, and of all tokens of a second time."""
    import jax

    from trainit import config as config_lib
    from trainit import optimizers
    from trainit.cluster import devices
    from trainit.generate.decoder import Decoder
    from trainit.generate.parameters import mesh_for
    from trainit.generate.sampling import Sampling
    from trainit.model.gpt import GPT

    devices.configure("", 1, Path(), trains=False)  # JAX_COMPILATION_CACHE_DIR names the cache
    config = config_lib.defaults()
    config.precision = "float32"
    config.optimizer = optimizers.choices()["adamw"]()  # which is not used
    config.model.tied_embeddings = True
    config = config_lib.resolve(config, VOCABULARY)
    # No id ends a text: all have their length.
    decoder = Decoder(config, mesh_for(config.model, jax.devices()), "float32", -2, VOCABULARY)
    decoder.take(jax.jit(GPT(config.model).init)(jax.random.key(0)))
    jax.block_until_ready(decoder.parameters)
    given, begin, times = [(ids, 0) for ids in prompts(rows)], time.perf_counter(), []
    for _ in range(2):
        for _ in decoder.generate(given, length, Sampling(), 0, 32):
            times.append(time.perf_counter())
    return {"first": times[0] - begin, "seconds": times[-1] - times[len(times) // 2 - 1]}


def transformers(rows: int, length: int) -> dict:
    """The same of its `generate`, eager, with its usual cache."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.from_numpy(prompts(rows).astype(np.int64)).to(device)
    model = model.to(device)
    about = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    seconds = []
    with torch.no_grad():
        for count in (1, length, length):
            begin = time.perf_counter()
            model.generate(ids, min_new_tokens=count, max_new_tokens=count, **about).cpu()
            seconds.append(time.perf_counter() - begin)
    return {"first": seconds[0], "seconds": seconds[-1]}


PROGRAMS = {function.__name__: function for function in (trainit, transformers)}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*map(int, sys.argv[2:]))))
