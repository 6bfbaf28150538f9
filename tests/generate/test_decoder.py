"""Texts from a model, next to its whole forward pass and to NumPy."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from finished import make_run
from ml_collections import ConfigDict

from trainit.checkpoints.finished_run import open_run
from trainit.generate import parameters
from trainit.generate.decoder import Decoder, cache_bytes
from trainit.generate.parameters import mesh_for
from trainit.generate.sampling import Sampling
from trainit.model.gpt import GPT

MODERN = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False}
MODELS = {
    "GPT-2": {},
    "Llama": {**MODERN, "num_kv_heads": 2},
    "Qwen3, tied": {**MODERN, "qk_norm": True, "num_kv_heads": 2, "tied_embeddings": True},
    "windows": {**MODERN, "window": 9, "window_layers": "::2", "attention_softcap": 2.0, "head_dim": 12},
    "documents": {**MODERN, "document_mask": True, "logit_softcap": 30.0, "activation": "relu2"},
}
GREEDY, END, IDS = Sampling(), 256, 257
LENGTHS = (5, 1, 12, 31, 16)


def prompts(count: int = 5) -> list[np.ndarray]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, 256, size).astype(np.int32) for size in LENGTHS[:count]]


@pytest.fixture(scope="module")
def run_of(random_dataset, tmp_path_factory):
    """A function that makes a run of a model: its parameters and the run."""
    made = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            params, _ = make_run(folder, random_dataset, IDS, END, **MODELS[name])
            made[name] = params, open_run(folder, None)
        return made[name]

    return make


@functools.cache
def decoder(run, devices: int = 1) -> Decoder:
    mesh = mesh_for(run.config.model, jax.devices()[:devices])
    return Decoder(run.config, mesh, "float32", END, IDS).restore(run)


def texts(
    decoder: Decoder, rows, length: int = 40, sampling: Sampling = GREEDY, seed: int = 0, steps: int = 7
):
    parts = decoder.generate([(prompt, 0) for prompt in rows], length, sampling, seed, steps)
    tokens = np.concatenate(list(parts)).T
    return [row[row >= 0].tolist() for row in tokens]


def begin(decoder: Decoder, rows: int, ids: np.ndarray | None = None):
    """The state after prompts of one length, by default of 4 tokens, with a cache of 32 slots."""
    ids = np.ones((rows, 4), np.int32) if ids is None else ids
    lengths, left = np.full(rows, ids.shape[1], np.int32), np.full(rows, 9, np.int32)
    entropy = np.zeros((rows, 2), np.uint32)
    made = jax.jit(decoder.begin, static_argnums=(7,))
    return made(decoder.parameters, ids, lengths, left, entropy, np.uint32(0), GREEDY.arguments(), 32)[0]


def greedy(model: GPT, params: dict, prompt: np.ndarray, length: int) -> list[int]:
    """What a whole forward pass after each token gives."""
    forward, text = jax.jit(model), []
    row = np.zeros(32, np.int32)
    row[: len(prompt)] = prompt
    for at in range(len(prompt), min(32, len(prompt) + length)):
        text.append(int(np.argmax(np.asarray(forward(params, row[None]))[0, at - 1, :IDS])))
        row[at] = text[-1]
        if text[-1] == END:
            break
    return text


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_whole_forward_passes(name, run_of):
    params, run = run_of(name)
    actual = texts(decoder(run), prompts())
    expected = [greedy(GPT(run.config.model), params, prompt, 40) for prompt in prompts()]
    assert actual == expected
    assert [len(text) for text in actual][3] == 1  # the context is full


@pytest.mark.evidence("the cached path gives the logits of whole forward passes, to 1e-5 of their spread")
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_whole_forward_pass(name, run_of):
    """Token by token along a given row, which begins as a prompt of 9."""
    params, run = run_of(name)
    made, ids = decoder(run), np.random.default_rng(4).integers(0, 256, (3, 32)).astype(np.int32)
    expected = np.asarray(GPT(run.config.model)(params, ids))
    begun = begin(made, 3, ids[:, :9])
    step, cache = jax.jit(made.logits), begun.cache
    for at in range(9, 32):
        position = np.full(3, at, np.int32)
        state = dataclasses.replace(begun, cache=cache, token_B=ids[:, at], position_B=position)
        logits, cache = step(made.parameters, state)
        assert np.abs(logits - expected[:, at]).max() <= 1e-5 * np.ptp(expected)


def test_cached_logits_in_bfloat16_are_those_of_the_whole_forward_pass(run_of):
    params, run = run_of("Llama")
    mesh = mesh_for(run.config.model, jax.devices()[:1])
    made, ids = Decoder(run.config, mesh, "bfloat16", END, IDS).restore(run), prompts()[2][None]
    expected = np.asarray(GPT(run.config.model, "bfloat16")(params, ids))
    begun = begin(made, 1, ids[:, :11])
    position = np.full(1, 11, np.int32)
    logits, _ = jax.jit(made.logits)(
        made.parameters, dataclasses.replace(begun, token_B=ids[:, 11], position_B=position)
    )
    assert np.abs(logits - expected[:, 11]).max() <= 2e-2 * np.ptp(expected)


@pytest.mark.evidence("a text does not depend on the other prompts of its batch, nor on the mesh")
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_text_depends_on_its_prompt_alone(devices, run_of):
    _, run = run_of("Llama")
    drawn = Sampling(temperature=1.0, top_p=0.95)
    alone = [texts(decoder(run), [prompt], sampling=drawn, seed=5)[0] for prompt in prompts()]
    made = decoder(run, devices)
    assert texts(made, prompts(), sampling=drawn, seed=5) == alone
    assert texts(made, prompts()[::-1], sampling=drawn, seed=5) == alone[::-1]
    assert dict(made.mesh.shape)["tensor"] == min(devices, 2)  # as many as there are key heads
    [keys] = begin(made, 8).cache[0][0]
    assert keys.addressable_shards[0].data.size * devices == keys.size


@pytest.mark.parametrize("rows", [11, 19])  # on more than one core: 11 parts of a row, 9 of two and one
def test_rows_of_a_cache_in_parts_are_those_in_one(rows, run_of):
    _, run = run_of("Llama")
    given = (prompts() * 4)[:rows]
    alone = [texts(decoder(run), [prompt])[0] for prompt in prompts()]
    assert texts(decoder(run), given) == (alone * 4)[:rows]


def test_other_seeds_and_samples_are_others(run_of):
    _, run = run_of("Llama")
    made, drawn, [prompt] = decoder(run), Sampling(temperature=1.0), prompts(1)

    def sample(seed: int, number: int) -> list:
        return np.concatenate(list(made.generate([(prompt, number)], 20, drawn, seed, 8))).tolist()

    assert sample(0, 0) == sample(0, 0)
    assert len({str(sample(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4

    # Another temperature is an argument of the programs that are there.
    programs = len(made._go_on._compiled)
    first, drawn = sample(0, 0), Sampling(temperature=0.01)
    assert sample(0, 0) != first
    assert len(made._go_on._compiled) == programs


def test_size_of_the_cache(run_of):
    """The formula of the page; rows of a share and slots are rounded up."""
    _, run = run_of("Llama")
    cache = begin(decoder(run), 3).cache
    assert cache_bytes(run.config.model, 3, 32, 4) == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert cache_bytes(run.config.model, 3, 32, 4) == 2 * 2 * 2 * (32 // 4) * 32 * 3 * 4


@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_copies_no_cache(rows, run_of):
    """Its temporaries are smaller than the keys of one layer; a copy of the cache is four of these."""
    _, run = run_of("Llama")
    made = decoder(run)
    state = begin(made, rows)
    long = tuple(np.zeros((*part.shape[:3], 2**14 // rows, 8), np.float32) for part in state.cache[0][0])
    state = dataclasses.replace(state, cache=[(long, long)] * 2)
    step = jax.jit(made.go_on, static_argnums=(3,), donate_argnums=(1,))
    memory = step.lower(made.parameters, state, GREEDY.arguments(), 8).compile().memory_analysis()
    assert memory.temp_size_in_bytes < sum(part.nbytes for part in long)


def test_a_step_copies_no_kernels(run_of, monkeypatch):
    """Its temporaries are smaller than the keys' kernel, though kernels with the same input are one array."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})  # on one core nothing is in parts
    config = ConfigDict(run_of("Llama")[1].config.to_dict())
    config.model.update(dim=512, head_dim=128)
    made = Decoder(config, mesh_for(config.model, jax.devices()[:1]), "float32", END, IDS)
    shapes, keep = made._model.shapes, True
    params = jax.eval_shape(
        lambda params: parameters.apart(params, made._parallel, made._types, keep), shapes
    )
    arrays = np.zeros((1, 8), np.int32), *np.ones((2, 1), np.int32), np.zeros((1, 2), np.uint32)
    more = np.uint32(0), GREEDY.arguments()
    state, _ = jax.eval_shape(functools.partial(made.begin, slots=64), params, *arrays, *more)
    step = jax.jit(made.go_on, static_argnums=(3,), donate_argnums=(1,))
    memory = step.lower(params, state, GREEDY.arguments(), 8).compile().memory_analysis()
    assert memory.temp_size_in_bytes < math.prod(shapes["blocks"]["attention"]["key"]["kernel"].shape[1:]) * 4
