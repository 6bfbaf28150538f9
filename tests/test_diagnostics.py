"""Statistics of the trajectory against NumPy's float64, from gradients and updates that are taken apart."""

import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import tiny
from optimizer_cases import by_path, flat

from trainit import config as config_lib
from trainit.checkpoints.store import CheckpointStore
from trainit.config import ConfigError
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.parallel.trees import path_name
from trainit.train import diagnostics, step

SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
LENGTH, ROWS = 32, 16


@functools.cache
def build(mesh=None, arg="diagnostics=full,optimizer=ogd_md", **changes):
    config = tiny.get_config(arg)
    config.model.attn_dropout = 0.0
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    config = config_lib.resolve(config, 257)
    return config, step.build(config, shape_on(config, mesh or make_mesh(SIZES)))


def batches(count: int) -> list[dict]:
    """Of 2 micro-steps: tokens (2, 8, L + 1), all of which count but those behind some rows' ends."""
    draw = np.random.default_rng(7)
    lengths = np.full((2, 8), LENGTH, np.int32)
    return [
        {"tokens": draw.integers(0, 256, (2, 8, LENGTH + 1)).astype(np.uint16), "lengths": lengths}
        for _ in range(count)
    ]


def train(steps, state, data, mesh=None):
    """The state and the metrics after each step."""
    layout, trail = batch_sharding(mesh or make_mesh(SIZES)), []
    for batch in data:
        state, metrics = steps.train(state, jax.device_put(batch, layout))
        trail.append(jax.device_get((state, metrics)))
    return state, trail


@functools.cache
def loss_and_gradient(config):
    model = GPT(config.model)

    def loss(params, tokens):
        logits = model(params, tokens[:, :-1].astype(np.int32))
        targets = tokens[:, 1:].astype(np.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return jax.jit(jax.value_and_grad(loss))


def cosine(a, b) -> float:
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b) if a.any() and b.any() else 0.0


def norms(leaves) -> dict[str, float]:
    x = np.concatenate([np.abs(leaf).ravel() for leaf in leaves])
    return {"l2": np.sqrt((x**2).sum()), "l1": x.sum(), "max": x.max()}


def grouped(tree) -> dict[str, dict[str, float]]:
    """Norms of all, by kind, by layer and by parameter, the kinds given by the paths."""
    groups: dict[str, list] = {}
    for path, leaf in by_path(tree).items():
        head = {"head/kernel": "head", "token_embedding/embedding": "embedding"}
        kind = head.get(path, "embedding" if path.startswith("position") else None)
        kind = kind or ("matrix" if path.endswith("kernel") else "vector")
        names = ["", f"/{kind}"]
        for name in names:
            groups.setdefault(name, []).append(leaf)
        if path.startswith("blocks/"):
            for layer, part in enumerate(leaf):
                groups.setdefault(f"/layer_{layer}", []).append(part)
                groups.setdefault(f"/{path}/{layer}", []).append(part)
        else:
            groups.setdefault(f"/{path}", []).append(leaf)
    return {name: norms(leaves) for name, leaves in groups.items()}


def expected(config, first, trail, data) -> list[dict[str, float]]:
    """The metrics of every step, from the parameters after each and gradients of a plain loss."""
    evaluate, records = loss_and_gradient(config), []
    x, before = first, first
    last_g = past = np.zeros_like(flat(first))
    factor, sums = 1.0, dict.fromkeys(("dot", "unscaled", "last", "loss"), 0.0)
    trace, square = [], []
    for (state, metrics), batch in zip(trail, data, strict=True):
        tokens = batch["tokens"].reshape(ROWS, -1)
        loss, gradient = evaluate(x, tokens)
        parts = [flat(evaluate(x, part)[1]) for part in batch["tokens"]]
        g, moved, update = flat(gradient), flat(x) - flat(before), flat(state.params) - flat(x)
        change = float(loss) - float(evaluate(before, tokens)[0])
        sums["dot"] += g @ moved
        sums["unscaled"] += g @ moved / factor
        sums["last"] += last_g @ moved / factor
        sums["loss"] += change
        small, whole = np.mean([part @ part for part in parts]), g @ g
        # E |mean of n gradients|^2 = |true|^2 + trace / n, solved for both.
        trace.append((small - whole) * ROWS)
        square.append(2 * whole - small)
        weights = 0.99 ** np.arange(len(trace))[::-1]
        record = {
            "grads/dot_last": g @ last_g,
            "grads/cos_last": cosine(g, last_g),
            "grads/dot_past": g @ past,
            "grads/cos_past": cosine(g, past),
            "params/cos_last": cosine(flat(x), flat(before)),
            "moved/l2": np.linalg.norm(moved),
            "moved/dot_grad": g @ moved,
            "moved/dot_grad_sum": sums["dot"],
            "moved/dot_grad_unscaled": g @ moved / factor,
            "moved/dot_grad_unscaled_sum": sums["unscaled"],
            "moved/cos_grad": cosine(g, moved),
            "moved/dot_last_grad": last_g @ moved / factor,
            "moved/dot_last_grad_sum": sums["last"],
            "moved/cos_last_grad": cosine(last_g, moved),
            "moved/cos_update": cosine(update, moved),
            "loss/difference": change,
            "loss/difference_sum": sums["loss"],
            "noise/trace": trace[-1],
            "noise/gradient_square": square[-1],
            "noise/scale": (weights @ trace) / (weights @ square),
        }
        for name, tree in {"params": x, "grads": gradient}.items():
            for group, values in grouped(tree).items():
                record |= {f"{name}/{norm}{group}": value for norm, value in values.items()}
        difference = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, x)
        for group, values in grouped(difference).items():
            record |= {f"updates/{norm}{group}": value for norm, value in values.items()}
            size = record[f"params/l2{group}"]
            record[f"updates/ratio{group}"] = values["l2"] / size if size else 0.0
        for path, leaf in by_path(x).items():
            if path.endswith(("up/kernel", "out/kernel")):
                for layer, matrix in enumerate(leaf):
                    s = np.linalg.svd(matrix.reshape(-1, matrix.shape[-1]), compute_uv=False)
                    p = s / s.sum()
                    record[f"spectral/norm/{path}/{layer}"] = s[0]
                    record[f"spectral/rank/{path}/{layer}"] = np.exp(-(p * np.log(p)).sum())
        records.append(record)
        before, x, last_g, past = x, state.params, g, past + g
        factor = float(metrics["optimizer/random_scaling"])
    return records


EVERYTHING = {
    "diagnostics__noise_scale": True,
    "diagnostics__norms_by": ("kind", "layer", "parameter"),
    "diagnostics__spectra": "blocks/.*/(up|out)/kernel",
    "diagnostics__histograms": "blocks/mlp/up/kernel|token_embedding/embedding",
    "optimizer__learning_rate": 0.3,
    "optimizer__mu": 1.0,
    "schedule__warmup": 0,
}


@pytest.fixture(scope="module")
def whole_run():
    """Five steps on eight devices, with everything measured in each."""
    config, steps = build(**EVERYTHING)
    state, data = steps.init(), batches(5)
    first = jax.device_get(state.params)
    _, trail = train(steps, state, data)
    return config, first, trail, data


@pytest.mark.evidence(
    "statistics of the trajectory, on 8 devices, each against float64 from gradients and updates "
    "computed separately"
)
def test_every_metric_against_numpy(whole_run):
    config, first, trail, data = whole_run
    for number, record in enumerate(expected(config, first, trail, data)):
        measured = trail[number][1]["diagnostics"].items()
        values = {name: float(value) for name, value in measured if not name.startswith("histogram/")}
        assert values.keys() == record.keys()
        for name, value in record.items():
            # Of updates and differences, NumPy sees the rounding of the parameters that it subtracts.
            scale = {"loss": 1.0, "noise": record["noise/trace"], "update": record["updates/max"]}
            atol = 2e-5 * scale.get(name.split("/")[0].rstrip("s"), 1.0)
            atol = max(atol, 2e-5 * np.sqrt(len(flat(first)))) if name == "updates/l1" else atol
            assert values[name] == pytest.approx(value, rel=2e-3, abs=atol), (number, name)
    assert max(abs(float(m["diagnostics"]["loss/difference"])) for _, m in trail) > 0.02


def test_histograms_against_numpy(whole_run):
    """Each value is in one bin. Gradients come from a plain loss, and updates from rounded parameters."""
    config, x, trail, data = whole_run
    sizes = [0.0, *(2.0**k for k in range(-32, 8)), np.inf]

    def histogram(leaf) -> np.ndarray:
        below, above = (np.histogram(np.abs(leaf[chosen]), sizes)[0] for chosen in (leaf < 0, leaf >= 0))
        return np.concatenate([below[::-1], above])

    for (state, metrics), batch in zip(trail, data, strict=True):
        gradient = loss_and_gradient(config)(x, batch["tokens"].reshape(ROWS, -1))[1]
        update = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, x)
        found = {k: v for k, v in metrics["diagnostics"].items() if k.startswith("histogram/")}
        for name, tree, tolerance in (("params", x, 0), ("grads", gradient, 0.01), ("updates", update, 0.03)):
            for path, leaf in by_path(tree).items():
                if path in ("token_embedding/embedding", "blocks/mlp/up/kernel"):
                    counts = found.pop(f"histogram/{name}/{path}")
                    assert counts.sum() == leaf.size
                    # As many as are in another bin are lacking in theirs.
                    others = np.abs(np.int64(counts) - histogram(np.float64(leaf))).sum() / 2
                    assert others <= tolerance * leaf.size, (name, path)
        assert not found
        x = state.params


def test_values_beyond_the_edges_are_in_the_outermost_bins(monkeypatch):
    """Also as they are counted on GPUs."""
    values = [-np.inf, -300, -256, -200, -128, -0.0, 0, 2**-33, 2**-32, 100, 128, 1e30, np.nan, -np.nan]
    edges = diagnostics.histogram_edges()
    for one_by_one in (diagnostics._count_one_by_one, diagnostics._count_bin_by_bin):
        monkeypatch.setattr(diagnostics, "_count_one_by_one", one_by_one)
        count = jax.jit(functools.partial(diagnostics._histogram))  # another object is traced again
        counts = np.asarray(count(np.float32(values)))
        assert len(edges) == len(counts) + 1 == 83
        found = {edges[k]: count for k, count in enumerate(counts) if count}
        assert found == {-256: 5, 0: 3, 2**-32: 1, 64: 1, 128: 2}


def test_between_measurements_only_what_is_kept_goes_on(whole_run):
    """Every second step: the same values of it as if all were measured, sums over the measured ones."""
    _, _, trail, data = whole_run
    _, steps = build(**EVERYTHING | {"diagnostics__every_steps": 2})
    _, rare = train(steps, steps.init(), data)
    total = 0.0
    for number in (1, 3):
        often, seldom = trail[number][1]["diagnostics"], rare[number][1]["diagnostics"]
        total += float(often["moved/dot_grad"])
        for name in often:
            if name.startswith("histogram/"):
                assert seldom[name].sum() == often[name].sum()
            elif not name.endswith("_sum") and name != "noise/scale":
                assert float(seldom[name]) == pytest.approx(float(often[name]), rel=1e-4, abs=1e-6), name
        assert float(seldom["moved/dot_grad_sum"]) == pytest.approx(total, rel=1e-4)
    assert not any(value.any() for value in rare[2][1]["diagnostics"].values())


def test_the_run_is_the_same_with_and_without(whole_run):
    """Off, nothing is kept, and no other field of the group changes the compiled step."""
    _, _, trail, data = whole_run
    fields = {name: value for name, value in EVERYTHING.items() if not name.startswith("diagnostics")}
    texts = []
    for more in ({}, {name: value for name, value in EVERYTHING.items() if name not in fields}):
        _, steps = build(**fields | more, diagnostics__every_steps=0)
        batch = jax.device_put(data[0], batch_sharding(make_mesh(SIZES)))
        texts.append(steps.train.lower(steps.abstract_state, batch).as_text())
        assert steps.abstract_state.diagnostics == {}
    assert texts[0] == texts[1]
    _, plain = train(steps, steps.init(), data)
    for (state, metrics), (other, others) in zip(trail, plain, strict=True):
        assert others["diagnostics"] == {}
        assert float(metrics["train/loss"]) == pytest.approx(float(others["train/loss"]), rel=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, other.params)


def test_what_is_kept_is_split_as_the_parameters_are():
    _, steps = build()
    state = steps.abstract_state
    layout = {path_name(p): leaf.sharding for p, leaf in jax.tree.leaves_with_path(state.params)}
    for name in ("last_gradient", "past_gradients", "last_parameters"):
        for path, leaf in jax.tree.leaves_with_path(state.diagnostics[name]):
            assert leaf.sharding == layout[path_name(path)]


def test_a_step_that_is_not_finite_leaves_no_trace(whole_run):
    _, _, _, data = whole_run
    _, steps = build(**EVERYTHING)
    state, _ = train(steps, steps.init(), data[:2])
    before = jax.device_get(state.diagnostics)
    scale = state.params["final_norm"]["scale"]

    def with_scale(state, scale):
        return replace(
            state, params=state.params | {"final_norm": state.params["final_norm"] | {"scale": scale}}
        )

    good = np.asarray(scale)
    state, _ = train(steps, with_scale(state, scale.at[3].set(np.nan)), data[2:3])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.diagnostics), before)
    _, trail = train(steps, with_scale(state, jax.device_put(good, scale.sharding)), data[2:3])
    assert all(np.isfinite(value).all() for value in trail[0][1]["diagnostics"].values())


def test_a_resume_with_others_begins_them_anew(tmp_path, whole_run):
    """The same ones continue bit for bit; others, or none, are no reason to refuse a checkpoint."""
    _, _, _, data = whole_run
    _, steps = build(**EVERYTHING)
    checkpoints = CheckpointStore(tmp_path)
    state, _ = train(steps, steps.init(), data[:2])
    checkpoints.save(2, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(2, steps.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    for arg in ("optimizer=ogd_md", "optimizer=ogd_md,diagnostics=norms"):
        _, other = build(arg=arg)
        restored = checkpoints.restore(2, other.abstract_state)
        assert restored.diagnostics == {}
        jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    begun = other.begin_separate["diagnostics"](restored.params)
    assert jax.tree.map(np.shape, begun) == jax.tree.map(np.shape, other.abstract_state.diagnostics)
    checkpoints.save(3, replace(restored, diagnostics={}), {})  # and from none to all
    checkpoints.wait()
    assert checkpoints.restore(3, steps.abstract_state).diagnostics == {}
    begun = steps.begin_separate["diagnostics"](restored.params)
    jax.tree.map(np.testing.assert_array_equal, begun["last_parameters"], restored.params)
    checkpoints.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"diagnostics__noise_scale": True, "device_batch_size": 0},
            "diagnostics.noise_scale=True compares the gradients of several micro-steps, but a step has 1",
        ),
        ({"diagnostics__spectra": "blocks/query"}, "diagnostics.spectra='blocks/query' is no matrix's path"),
        ({"diagnostics__spectra": "("}, r"diagnostics.spectra='\(' is no regular expression"),
        ({"diagnostics__histograms": "blocks"}, "diagnostics.histograms='blocks' is no parameter's path"),
        ({"diagnostics__norms_by": ("kinds",)}, r"diagnostics.norms_by=.*'kinds' is none of kind, layer"),
        ({"diagnostics__last_parameters": False}, "last_loss=True needs diagnostics.last_parameters=True"),
        ({"diagnostics__every_steps": -1}, "diagnostics.every_steps=-1 must not be below 0"),
    ],
)
def test_what_cannot_be_measured(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)
