"""A model that continues token ids, with a cache of keys and values, on a mesh of devices.

Names of arrays carry their dimensions as in `model/gpt.py`; P counts a prompt's tokens, padding included, and
S the slots of the cache. A row keeps key and value of its token at position p in slot p, and sees the slots
up to its own position. Padding therefore has no effect, and rows do not depend on each other.

In each step all rows have one token. The rows of a device's share of the batch stand where a sequence's
tokens stand in training (s counts shares, b rows of one), so that all is split over the mesh as it is there.
"""

import functools
import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from trainit.checkpoints.finished_run import FinishedRun, PretrainedModel
from trainit.checkpoints.state import named_key
from trainit.config import Config
from trainit.generate import parameters
from trainit.generate.sampling import Sampling
from trainit.model import attention
from trainit.model.gpt import GPT
from trainit.model.kernels import kernel_on
from trainit.model.layers import Documents
from trainit.model.precision import PARTS, PartPrecision
from trainit.parallel.collectives import Parallel
from trainit.parallel.cpu_workarounds import computed_after
from trainit.parallel.layout import replicated_sharding
from trainit.parallel.mesh import choose_attention, compute_type
from trainit.train.compiled import CompiledFunction

SLOTS = 128  # the cache has a multiple of it, and prompts a power of two times it, so that programs are few
CACHE = ("batch", None, "kv_heads", None, None)  # logical axes of a layer's keys and values (s, b, J, S, K)
Rows = tuple[jax.Array, ...]  # a layer's keys or values, in parts of b rows each (`parts_of_rows`)
Cache = list[tuple[Rows, Rows]]  # keys and values of each layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stands between two steps of B rows."""

    cache: Any  # of the tokens before the newest
    token_B: jax.Array  # the newest; -1 if the row has ended before it
    position_B: jax.Array  # of the newest
    left_B: jax.Array  # how many tokens may follow it; 0: the row has ended
    key_B: jax.Array  # of the row's random numbers
    seen_BV: Any  # which tokens the row has, or None if nobody asks


class Decoder:
    """The model of a config on a mesh. `take` or `restore` gives it parameters."""

    def __init__(self, config: Config, mesh: Mesh, precision: str, end: int, ids: int):
        """Takes a run's resolved config. The id `end` ends a text; ids from `ids` on are of no token."""
        # Training settings that change no result, except how often a layer calls attention, are left out.
        plain = {"remat": "none", "attention": "auto"}
        self.config = model = Config({**config.model.to_dict(), **plain})
        self.mesh = mesh = _with_whole_sequences(mesh)
        self._end, self._ids = end, ids
        self.parameters: dict = {}
        own = config.precision_of if precision == config.precision else dict.fromkeys(PARTS, "")
        self._types = {part: jnp.dtype(compute_type(own[part], precision)) for part in PARTS}
        parts = {part: PartPrecision(dtype) for part, dtype in self._types.items()}

        # The model, whose attention is another one in each program.
        platform = mesh.devices.flat[0].platform
        on_one_cpu = platform == "cpu" and mesh.size == 1
        self._parallel = Parallel(mesh, kernel_parts=len(os.sched_getaffinity(0)) if on_one_cpu else 1)
        kernel = choose_attention(model, platform, precision)
        self._attend = self._whole = kernel_on(kernel, platform, self._parallel)
        self._model = GPT(model, precision, self._attention, self._parallel, parts)

        # The programs.
        small: Any = replicated_sharding(mesh)
        cache = NamedSharding(mesh, self._parallel.spec(*CACHE))
        layout = State(cache, small, small, small, small, small), small
        self._begin = CompiledFunction("prompt", self.begin, layout, static_argnums=(7,))
        options: dict = {"static_argnums": (3,), "donate_argnums": (1,)}
        self._go_on = CompiledFunction("decode", self.go_on, layout, **options)

    def restore(self, run: FinishedRun | PretrainedModel) -> "Decoder":
        """Takes the parameters of a run or of another program; returns this decoder."""
        self.take(parameters.restore(run, self._model, self.mesh), keep=False)
        return self

    def take(self, params: dict, keep: bool = True) -> None:
        """Takes parameters as they are in training, of which it makes its own."""
        self.parameters = parameters.apart(params, self._parallel, self._types, keep)

    @property
    def shares(self) -> int:
        """Into how many parts the rows are split."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _attention(self, *arrays, **settings) -> jax.Array:
        """What a layer calls; each program sets `_attend` while it is traced."""
        return self._attend(*arrays, **settings)

    def generate(
        self, rows: Sequence[tuple[np.ndarray, int]], length: int, sampling: Sampling, seed: int, steps: int
    ) -> Iterator[np.ndarray]:
        """Yields arrays (n, B) of new tokens as they come, -1 after a row's end; first n = 1, then `steps`.

        A row is a prompt of at least one token, and which of this prompt's samples it is. It ends after
        end_of_text, after `length` tokens, or when prompt and text fill the model's context.
        """
        sizes = np.array([len(prompt) for prompt, _ in rows])
        context, multiple = self.config.context_length, self.mesh.size
        slots = min(context, -(-min(sizes.max() + length, context) // SLOTS) * SLOTS)
        width = SLOTS * 2 ** int(np.ceil(np.log2(max(1, sizes.max() / SLOTS))))
        width = min(context, -(-width // self.mesh.shape["tensor"]) * self.mesh.shape["tensor"])

        # Rows that the devices lack for equal shares are of one token, and end at once.
        count = -(-len(rows) // multiple) * multiple
        tokens_BP, length_B = np.zeros((count, width), np.int32), np.ones(count, np.int32)
        left_B, entropy_B2 = np.zeros(count, np.int32), np.zeros((count, 2), np.uint32)
        for row, (prompt, number) in enumerate(rows):
            tokens_BP[row, : len(prompt)], length_B[row] = prompt, len(prompt)
            left_B[row] = min(length, context - len(prompt))
            entropy_B2[row] = zlib.crc32(prompt.astype("<i4").tobytes()), number
        arrays = tokens_BP, length_B, left_B, entropy_B2, np.uint32(seed), sampling.arguments()
        *arrays, arguments = jax.device_put(arrays, replicated_sharding(self.mesh))
        state, token_B = self._begin(self.parameters, *arrays, arguments, slots)
        yield np.asarray(token_B)[None, : len(rows)]
        while (np.asarray(state.left_B) > 0).any():
            state, tokens = self._go_on(self.parameters, state, arguments, steps)
            yield np.asarray(tokens)[:, : len(rows)]

    def begin(self, params, tokens_BP, length_B, left_B, entropy_B2, seed, sampling: Sampling, slots: int):
        """The state after the prompts, and the first new token of each row. `sampling` is of `arguments`.

        `entropy_B2` are a row's two numbers that make its random key, with the seed.
        """
        cache: Cache = []

        def attend(q_BPHK, k_BPJK, v_BPJK, *rest, **settings) -> jax.Array:
            cache.append((self._stored(k_BPJK, slots), self._stored(v_BPJK, slots)))
            return self._whole(q_BPHK, k_BPJK, v_BPJK, *rest, **settings)

        self._attend = attend
        params = parameters.in_model(params, self._parallel, self._model.shapes)
        x_BPD, head = self._model.hidden_of_layers(params, tokens_BP)
        x_BD = jnp.take_along_axis(x_BPD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        logits_BV = self._parallel.constrain(head(x_BD), None, None)
        # A text that begins with the end of another, where attention stays within one, has not begun yet.
        last_B = jnp.take_along_axis(tokens_BP, (length_B - 1)[:, None], axis=1)[:, 0]
        is_new_B = (last_B == self.config.end_of_text) & self.config.document_mask
        position_B = jnp.where(is_new_B, -1, length_B - 1)
        seen_BV = None
        if sampling.repetition_penalty is not None:
            is_token_BP = jnp.arange(tokens_BP.shape[1]) < length_B[:, None]
            rows_B1 = jnp.arange(len(tokens_BP))[:, None]
            seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BP].max(is_token_BP)
        root = named_key(seed, "generate")
        key_B = jax.vmap(lambda e: jax.random.fold_in(jax.random.fold_in(root, e[0]), e[1]))(entropy_B2)
        state = State(cache, last_B, position_B, left_B, key_B, seen_BV)
        state = self._choose(logits_BV, state, sampling)
        return state, state.token_B

    def _stored(self, x_BPJK: jax.Array, slots: int) -> Rows:
        """The cache of a layer's keys or values: those of the prompt, and free slots."""
        x_sbPJK = x_BPJK.reshape(self.shares, -1, *x_BPJK.shape[1:])[:, :, :slots]
        free = [(0, 0)] * 3 + [(0, slots - x_sbPJK.shape[2]), (0, 0)]
        parts = parts_of_rows(x_sbPJK.shape[1], self._parallel.kernel_parts)
        stored = (jnp.pad(jnp.swapaxes(x_sbPJK[:, part], 2, 3), free) for part in parts)
        return tuple(self._parallel.constrain(part, *CACHE) for part in stored)

    def go_on(self, params, state: State, sampling: Sampling, steps: int):
        """The state after at most `steps` more tokens, and these (steps, B); -1 where a row has ended."""

        def is_unfinished(carry) -> jax.Array:
            index, state, _ = carry
            return (index < steps) & jnp.any(state.left_B > 0)

        def step(carry):
            index, state, tokens = carry
            logits_BV, cache = self.logits(params, state)
            state = self._choose(logits_BV, replace(state, cache=cache), sampling)
            return index + 1, state, tokens.at[index].set(state.token_B)

        tokens = jnp.full((steps, len(state.token_B)), -1, jnp.int32)
        _, state, tokens = jax.lax.while_loop(is_unfinished, step, (0, state, tokens))
        return state, tokens

    def logits(self, params, state: State) -> tuple[jax.Array, Cache]:
        """The float32 logits (B, V) after the newest tokens, and the cache with these."""
        slots = state.cache[0][0][0].shape[3]
        token_sb = jnp.maximum(state.token_B, 0).reshape(self.shares, -1)
        position_sb = jnp.minimum(state.position_B, slots - 1).reshape(self.shares, -1)
        layers, cache = iter(state.cache), []

        def attend(q_sbHK, k_sbJK, v_sbJK, *_, form: attention.Form, **__) -> jax.Array:
            p = self._parallel
            heads, kv_heads = p.spec("batch", None, "heads", None), p.spec("batch", None, "kv_heads", None)
            inputs = (heads, kv_heads, kv_heads, p.spec(*CACHE), p.spec(*CACHE), p.spec("batch", None))
            outputs = heads, (p.spec(*CACHE), p.spec(*CACHE))

            kernel = functools.partial(attend_to_cache, mesh=p.mesh, form=form)
            mapped = p.shard_map_if_needed(kernel, inputs, outputs)
            y_sbHK, layer = mapped(q_sbHK, k_sbJK, v_sbJK, *next(layers), position_sb)
            cache.append(layer)
            return y_sbHK

        self._attend = attend
        params = parameters.in_model(params, self._parallel, self._model.shapes)
        documents = Documents(jnp.zeros_like(position_sb), position_sb)
        x_sbD, head = self._model.hidden_of_layers(params, token_sb, documents)
        logits = self._parallel.constrain(head(x_sbD), None, None, None)
        return logits.reshape(len(state.token_B), -1), cache

    def _choose(self, logits_BV: jax.Array, state: State, sampling: Sampling) -> State:
        """The state with the next token of each row that has not ended."""
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < self._ids, logits_BV, -jnp.inf)
        position_B, goes_on_B = state.position_B + 1, state.left_B > 0
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, position_B)
        token_B = jnp.where(goes_on_B, sampling.choose(logits_BV, state.seen_BV, key_B), -1)
        left_B = jnp.where(token_B == self._end, 0, jnp.maximum(state.left_B - 1, 0))
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        return replace(state, token_B=token_B, position_B=position_B, left_B=left_B, seen_BV=seen_BV)


def _with_whole_sequences(mesh: Mesh) -> Mesh:
    """The mesh with nothing along `context`: the devices that it has there compute the same texts."""
    if mesh.shape["context"] == 1:
        return mesh
    # The devices keep their order, so that parameters need not move.
    return Mesh(mesh.devices[..., None], (*mesh.axis_names[:-1], "copies", "context"))


def parts_of_rows(rows: int, cores: int) -> list[slice]:
    """In which parts a decoder's cache keeps its rows: in all at once, or in at most 16 of like size.

    XLA:CPU computes the products of a batch one after the other, each on one core if its matrices have less
    than 65,536 numbers. If more than nine products are ready, it gives half to another core: a third of a
    step of 16 texts. May go when a batch is computed on all cores.
    """
    count = min(rows, 16) if cores > 1 and rows > 9 else 1
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def attend_to_cache(
    q_sbHK, k_sbJK, v_sbJK, keys: Rows, values: Rows, position_sb, mesh: Mesh | None, form: attention.Form
) -> tuple[jax.Array, tuple[Rows, Rows]]:
    """Attends to the cache and to the new keys and values: (s, b, H, K), and the cache with these.

    The new ones are put into their slots afterwards. If they were read from there, XLA:CPU would compute the
    update twice, and copy the cache of each layer in each step.
    """
    position_B = position_sb.reshape(-1)
    k_BJK, v_BJK = (new.reshape(-1, *new.shape[2:]).astype(keys[0].dtype) for new in (k_sbJK, v_sbJK))
    (B, J, K), S, R = k_BJK.shape, keys[0].shape[3], q_sbHK.shape[2] // k_sbJK.shape[2]
    q_BJRK = q_sbHK.reshape(B, J, R, K)
    ends = itertools.accumulate(math.prod(part.shape[:2]) for part in keys[:-1])
    in_parts = functools.partial(jnp.split, indices_or_sections=list(ends))  # of rows, as the cache lies

    # Scores are float32, and -inf where a slot is free or not to be seen. The new key comes last.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def product_in_parts(form: str, x_BJRI: jax.Array, cache: Rows) -> jax.Array:
        parts = zip(in_parts(x_BJRI), cache, strict=True)
        return jnp.concatenate([product(form, x, y.reshape(-1, J, S, K)) for x, y in parts])

    old_BJRS = product_in_parts("bjrk,bjsk->bjrs", q_BJRK, keys)
    new_BJR = product("bjrk,bjk->bjr", q_BJRK, k_BJK)
    query_B1, slot_S = position_B[:, None], jnp.arange(S)
    visible_BS = form.visible(query_B1, slot_S) & (slot_S < query_B1)
    old_BJRS = jnp.where(visible_BS[:, None, None], form.scores(old_BJRS, K), -jnp.inf)
    scores = jnp.concatenate([old_BJRS, form.scores(new_BJR, K)[..., None]], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(values[0].dtype)
    y_BJRK = product_in_parts("bjrs,bjsk->bjrk", weights[..., :-1], values)
    y_BJRK = (y_BJRK + weights[..., -1:] * v_BJK[:, :, None]).astype(q_BJRK.dtype)

    def put(cache: jax.Array, new_BJK: jax.Array, position_B: jax.Array) -> jax.Array:
        of_rows = cache.reshape(-1, J, S, K)
        return of_rows.at[jnp.arange(len(new_BJK)), :, position_B].set(new_BJK).reshape(cache.shape)

    def put_all(cache: Rows, new_BJK: jax.Array) -> Rows:
        new_BJK = computed_after(new_BJK, y_BJRK, mesh)
        return tuple(map(put, cache, in_parts(new_BJK), in_parts(position_B)))

    return y_BJRK.reshape(q_sbHK.shape), (put_all(keys, k_BJK), put_all(values, v_BJK))


def cache_bytes(model: Config, rows: int, slots: int, bytes_of_a_number: int) -> int:
    """The size of the cache: keys and values of each layer, key head, row and slot."""
    return 2 * model.num_blocks * rows * model.num_kv_heads * slots * model.head_dim * bytes_of_a_number
