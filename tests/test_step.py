"""The train step: the same on every mesh, under accumulation, with something not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from trainit import config as config_lib
from trainit.checkpoints.state import TrainState
from trainit.config import MESH_AXES
from trainit.data import loader
from trainit.data.dataset import open_dataset
from trainit.data.rows.order import Ordered, Shuffled
from trainit.data.training_data import abstract_batch
from trainit.model.gpt import GPT
from trainit.parallel import cpu_workarounds
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import abstract_mesh, make_mesh, shape_on
from trainit.parallel.trees import path_name
from trainit.train import step

SPLITS = [
    {"data": d, "fsdp": f, "tensor": t, "context": 1}
    for n in (1, 2, 4, 8)
    for d in (1, 2, 4, 8)
    for f in (1, 2, 4, 8)
    for t in (1, 2, 4, 8)
    if d * f * t == n
]

# Each of the others with `context`, and both ways to exchange keys and values.
CONTEXT_SPLITS = [
    {"data": 2, "fsdp": 1, "tensor": 1, "context": 2, "attention": "ring"},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2, "attention": "ring"},
    {"data": 2, "fsdp": 2, "tensor": 1, "context": 2, "attention": "gather"},
    {"data": 1, "fsdp": 1, "tensor": 2, "context": 4, "attention": "gather"},
    {"data": 1, "fsdp": 1, "tensor": 1, "context": 8, "attention": "ring"},
]

LENGTH = 16


def make_config(path, arg="", **changes):
    config = tiny.get_config(arg)
    config.dataset.path = str(path)
    # Dropout follows rows, not devices. Its random numbers, of length squared, take most of a step's time.
    config.model.update(attn_dropout=0.2, gpt_dropout=0.1, num_heads=8, context_length=LENGTH)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config_lib.resolve(config, 257)


@functools.cache
def build(config, mesh) -> step.CompiledSteps:  # what several tests need is compiled once
    return step.build(config, shape_on(config, mesh))


NAMES = ("train/loss", "train/grad_norm", "train/accuracy")


def train(config, sizes, path, count, names=NAMES):
    """Runs `count` steps; their metrics of these names, and the state after them."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    steps = build(config, mesh)
    split = open_dataset(path).splits["train"]
    batches = loader.batches(
        Ordered(split, Shuffled(split.sequences(config.model.context_length), config.seed)),
        shape_on(config, mesh).batch_at(0),
        batch_sharding(mesh),
    )
    state, curve = steps.init(), []
    for _ in range(count):
        state, metrics = steps.train(state, next(batches))
        curve.append([metrics[name] for name in names])
    return np.array(jax.device_get(curve)), state


def in_two(path, data, fsdp, **changes):
    """The config whose batch of 16 is two micro-steps on a mesh of these sizes."""
    return make_config(path, device_batch_size=8 // (data * fsdp), **changes)


@pytest.fixture(scope="module")
def one_device(random_dataset):
    return train(in_two(random_dataset, 1, 1), {}, random_dataset, 20)


@pytest.mark.evidence(
    "20 steps on 1, 2, 4 and 8 devices, in all 20 splits of data, fsdp and tensor, and in five with context: "
    "the same losses"
)
@pytest.mark.parametrize(
    "sizes", SPLITS[1:] + CONTEXT_SPLITS, ids=lambda s: " ".join(f"{k} {v}" for k, v in s.items())
)
def test_every_split_of_the_mesh_gives_the_same_run(sizes, random_dataset, one_device):
    """20 steps of two micro-steps on 2, 4 and 8 devices against one device, in float32."""
    attention = {"attention": "auto", **sizes}["attention"]
    sizes = {axis: sizes[axis] for axis in MESH_AXES}
    config = in_two(random_dataset, sizes["data"], sizes["fsdp"], model__attention=attention)
    assert shape_on(config, abstract_mesh(sizes)).batch_at(0).micro_steps == 2
    curve, state = train(config, sizes, random_dataset, 20)
    np.testing.assert_allclose(curve, one_device[0], rtol=5e-4)
    assert (
        one_device[0][-1, 0] < one_device[0][0, 0] - 1
    )  # it has learnt: the comparison is of more than noise
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-3), state.params, one_device[1].params
    )


@pytest.mark.evidence("eight times the sequence on eight devices: at most 1.15 times the memory, as compiled")
def test_memory_of_a_device_does_not_grow_with_sequences_that_are_split(random_dataset):
    def memory(context):
        model = {"context_length": 2048 * context, "positions": "rope", "num_heads": 2, "remat": "dots"}
        model |= {"attention": "ring", "attn_dropout": 0.0, "gpt_dropout": 0.0, "num_blocks": 1}
        fields = {f"model__{name}": value for name, value in model.items()}
        fields |= {f"mesh__{axis}": 1 for axis in ("data", "fsdp", "tensor")}
        config = make_config(random_dataset, batch_size=1, logits_mib=1.0, **fields)
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": context}, jax.devices()[:context])
        steps, shape = step.build(config, shape_on(config, mesh)), shape_on(config, mesh)
        batch = abstract_batch(np.dtype(np.uint16), shape.batch_at(0), batch_sharding(mesh))
        found = steps.train.lower(steps.abstract_state, batch).compile().memory_analysis()
        return found.temp_size_in_bytes + found.argument_size_in_bytes

    assert memory(8) < 1.15 * memory(1)


@pytest.mark.evidence("micro-steps give the gradient of one large batch")
def test_accumulation_is_one_large_batch(random_dataset, one_device):
    """One to sixteen micro-steps; the sums are the same. In the first, four chunks of logits."""
    for bound, micro_steps in ((0, 1), (8, 2), (5, 4), (1, 16)):
        config = make_config(random_dataset, device_batch_size=bound, logits_mib=0.2)
        one = abstract_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
        assert shape_on(config, one).batch_at(0).micro_steps == micro_steps
        curve, _ = train(config, {}, random_dataset, 5)
        np.testing.assert_allclose(curve, one_device[0][:5], rtol=5e-5)


def test_gradient_is_of_the_mean_over_tokens(random_dataset):
    """The step against value_and_grad, clipping and AdamW of optax on the plain mean loss and z-loss."""
    off = {"model__attn_dropout": 0.0, "model__gpt_dropout": 0.0}
    config = make_config(random_dataset, clip_norm=0.5, z_loss=0.01, **off)
    names = ("train/loss", "train/z_loss", "train/grad_norm")
    curve, state = train(config, {"data": 2, "fsdp": 2, "tensor": 2}, random_dataset, 3, names)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    steps = build(config, mesh)
    model = GPT(config.model)
    split = open_dataset(random_dataset).splits["train"]
    order = Shuffled(split.sequences(LENGTH), config.seed)
    mask = jax.tree.map_with_path(
        lambda path, _: path_name(path).endswith(("kernel", "embedding")),
        steps.abstract_state.params,
    )
    # Cosine with 10 % of 40 steps of warm-up, written out.
    rates = [0.01 * min(k / 4, 0.5 * (1 + np.cos(np.pi * max(k - 4, 0) / 36))) for k in range(3)]

    @jax.jit
    def gradient(params, ids):
        def mean_loss(p):
            logits = model(p, ids[:, :-1])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
            z_loss = 0.01 * (jax.nn.logsumexp(logits, axis=-1) ** 2).mean()
            return loss + z_loss, (loss, z_loss)

        return jax.grad(mean_loss, has_aux=True)(params)

    params, moments = steps.init().params, None
    for k in range(3):
        ids, lengths = split.read(order(np.arange(16 * k, 16 * k + 16)), LENGTH)
        assert (lengths == LENGTH).all()
        grads, parts = gradient(params, ids.astype(np.int32))
        np.testing.assert_allclose(curve[k], [*parts, optax.tree.norm(grads)], rtol=2e-4)
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.5), optax.adamw(rates[k], weight_decay=0.1, mask=mask)
        )
        updates, moments = optimizer.update(grads, moments or optimizer.init(params), params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, params)


@pytest.mark.evidence("parameters and optimizer state are created in their split form and stay so")
@pytest.mark.parametrize("optimizer", ["adamw", "sgdm", "muon"])
def test_everything_is_born_and_stays_sharded(optimizer, random_dataset):
    """Every leaf of the state before and after a step: how much of it lies on each device."""
    config = make_config(random_dataset, f"optimizer={optimizer}")
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    steps = build(config, make_mesh(sizes))
    _, after = train(config, sizes, random_dataset, 1)
    for state in (steps.abstract_state, steps.init(), after):
        for path, leaf in jax.tree.leaves_with_path(state):
            name = path_name(path)
            parts = leaf.size / np.prod(leaf.sharding.shard_shape(leaf.shape))
            if name.endswith(("kernel", "token_embedding/embedding")):
                assert parts == 4, name  # fsdp * tensor
            elif name.endswith("position_embedding/embedding"):
                assert parts == 2, name  # fsdp
            elif name.endswith(("query/bias", "key/bias", "value/bias", "up/bias")):
                assert parts == 2, name  # tensor
            else:
                assert parts == 1, name
    moments = {"adamw": 2, "sgdm": 1, "muon": 1}[optimizer]
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(after)]
    assert sum(name.endswith("query/kernel") for name in names) == 1 + moments


def test_no_whole_parameter_is_made_when_the_state_is_born(random_dataset):
    """The compiled init holds shards alone: its largest buffer is smaller than the embedding."""
    config = make_config(random_dataset, model__vocab_size=4096)
    steps = step.build(config, shape_on(config, make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})))
    memory = steps.init.lower().compile().memory_analysis()
    embedding = 4 * 4096 * config.model.dim
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 3 * 2 * embedding / 4


def test_a_step_that_is_not_finite_changes_nothing_but_counts(random_dataset):
    config = make_config(random_dataset)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    mesh = make_mesh(sizes)
    steps = build(config, mesh)
    _, state = train(config, sizes, random_dataset, 2)
    before = jax.device_get(state)
    good = state.params["final_norm"]["scale"]

    def with_scale(state, scale):
        params = state.params | {"final_norm": state.params["final_norm"] | {"scale": scale}}
        return TrainState(**vars(state) | {"params": params})

    tokens = np.zeros((2, 8, LENGTH + 1), np.uint16)
    batch = jax.device_put(
        {"tokens": tokens, "lengths": np.full((2, 8), LENGTH, np.int32)}, batch_sharding(mesh)
    )
    for count in (1, 2):
        state, metrics = steps.train(with_scale(state, good.at[3].set(jnp.nan)), batch)
        assert not np.isfinite(metrics["train/loss"])
        assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (count, count, 2 + count)
        good = jnp.array(before.params["final_norm"]["scale"])
        state = with_scale(state, good)
        jax.tree.map(
            np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state)
        )
    state, metrics = steps.train(state, batch)
    assert np.isfinite(metrics["train/loss"])
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (2, 0, 5)


@pytest.mark.evidence("the step on GPUs has no branch, for which their host would wait; results are the same")
def test_only_steps_on_cpus_have_a_branch(random_dataset, monkeypatch):
    """The step as GPUs have it, computed by this CPU: as traced, and its metrics and state after a step."""
    config, sizes = make_config(random_dataset), {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    mesh = make_mesh(sizes, jax.devices()[:1])
    tokens = np.random.default_rng(0).integers(0, 256, (2, 8, LENGTH + 1)).astype(np.uint16)
    batch = {"tokens": tokens, "lengths": np.full((2, 8), LENGTH, np.int32)}

    def run(steps, scale=1.0):
        state = steps.init()
        state.params["final_norm"]["scale"] *= scale
        return steps.train(state, batch)

    on_cpu = build(config, mesh)
    branch = "stablehlo.case"
    assert branch in on_cpu.train.lower(on_cpu.abstract_state, batch).as_text()
    monkeypatch.setattr(cpu_workarounds, "on_cpu", lambda mesh: False)
    on_gpu = step.build(config, shape_on(config, mesh))
    program = on_gpu.train.lower(on_gpu.abstract_state, batch).as_text()
    assert branch not in program and "callback" not in program  # no value for which the host is asked either
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, run(on_gpu), run(on_cpu))
    for steps in (on_cpu, on_gpu):
        state, metrics = run(steps, np.inf)
        assert np.isnan(metrics["train/update_norm"]) and int(state.skipped) == 1


def test_lengths_mask_the_loss(random_dataset):
    """Rows without targets and tokens after a row's length count for nothing."""
    config = make_config(random_dataset)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    steps = build(config, mesh)
    params, bytes_per_token = steps.init().params, np.arange(257, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 4, LENGTH + 1)).astype(np.uint16)
    lengths = np.array([[LENGTH, 7, 0, LENGTH]], np.int32)
    whole = steps.evaluate(params, {"tokens": tokens, "lengths": lengths}, bytes_per_token, 1)
    tokens[0, 1, 8:], tokens[0, 2] = 0, 0
    masked = steps.evaluate(params, {"tokens": tokens, "lengths": lengths}, bytes_per_token, 1)
    assert float(whole["count"][0]) == 2 * LENGTH + 7
    assert int(whole["bytes"][0]) == tokens[0, 0, 1:].sum() + tokens[0, 1, 1:8].sum() + tokens[0, 3, 1:].sum()
    for name in whole:
        np.testing.assert_allclose(whole[name], masked[name], rtol=1e-6)


def test_dropout_follows_seed_and_step(random_dataset):
    """The same seed and step give the same masks; another step or seed gives others."""

    def first_losses(seed):
        config = make_config(random_dataset, model__gpt_dropout=0.5, optimizer__learning_rate=0.0, seed=seed)
        mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:2])
        steps = build(config, mesh)
        batch = {
            "tokens": np.ones((2, 8, LENGTH + 1), np.uint16),
            "lengths": np.full((2, 8), LENGTH, np.int32),
        }
        batch = jax.device_put(batch, batch_sharding(mesh))
        state, losses = steps.init(), []
        for _ in range(2):
            state, metrics = steps.train(state, batch)
            losses.append(float(metrics["train/loss"]))
        return losses

    first, again, other = first_losses(1), first_losses(1), first_losses(2)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_batch_sharding_splits_rows_alone():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    assert batch_sharding(mesh).spec == PartitionSpec(None, ("data", "fsdp"))
