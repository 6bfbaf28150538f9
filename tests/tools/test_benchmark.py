"""The benchmark runs and measures what it says; its times are for people, not for tests.

All parts of a run are measured in tests/commands/test_commands.py.
"""

import json
import re

import jax
import numpy as np
import pytest
from corpus import TEXT
from processes import ROOT, start

from trainit import optimizers
from trainit.cluster import devices
from trainit.config import MESH_AXES, defaults, model, resolve
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.tools.benchmark import contender, generating, suite
from trainit.tools.benchmark import profile as where
from trainit.train import step
from trainit.train.automatic import choice
from trainit.train.profiling import parts


def test_unknown_part(random_dataset):
    args = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}", "--only=loder"
    process = start(*args, command="benchmark")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        output.strip()
        == "trainit: error: --only=loder: there are loader, step, save, processes, optimizer, loss, "
        "products, prepare, generate"
    )


def test_preparing_reports(tmp_path):
    words = TEXT.split(" ")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, 400)) for _ in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = "--only=prepare", f"--corpus={tmp_path}/*.jsonl", "--rounds=1"
    process = start(*command, command="benchmark")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    for pattern in ("of the speed of bare encode_ordinary_batch", "of the speed of bare sentencepiece"):
        assert re.search(r"prepare +[\d.]+% " + pattern, output), output
    assert re.search(r"prepare +[1-9]\d+ MB  peak memory", output)


def test_preparing_needs_a_corpus(tmp_path):
    for given, message in (("", "needs --corpus"), (f"--corpus={tmp_path}/none", "there are no documents")):
        process = start("--only=prepare", *[given] * bool(given), command="benchmark")
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 2, output
        assert message in output


PROGRAM = """
HloModule jit_train_step

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/jvp()/while/body/mlp/tanh"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="batch"}
  %while.2 = f32[8]{0} while(%x), body=%body, metadata={op_name="jit(train_step)/jvp()/while"}
  %dot.3 = f32[8]{0} dot(%while.2, %x), metadata={op_name="jit(train_step)/transpose(jvp(head))/dot_general"}
  %all-reduce.4 = f32[8]{0} all-reduce(%dot.3), metadata={op_name="jit(train_step)/transpose(jvp(head))/psum"}
  ROOT %add.5 = f32[8]{0} add(%all-reduce.4, %x), metadata={op_name="jit(train_step)/add"}
}
"""


def test_time_is_shared_out_by_scopes():
    """A loop's own time is that of what it runs; what is no instruction is the host's."""
    spans = {"fusion.1": (0, 30), "while.2": (5, 160), "dot.3": (60, 85), "all-reduce.4": (85, 100)}
    spans |= {"add.5": (90, 100), "ThunkExecutor::Execute": (0, 300), "$profiler.py": (200, 207)}
    events = [(device, name, *span) for device in ("0", "1") for name, span in spans.items()]
    events += [("0", "fusion.1", 40, 60), ("1", "fusion.1", 30, 50)]
    found = parts.shares(events, parts.instructions(PROGRAM))
    # Both devices do nothing for a tenth of the 100 ns from the first instruction to the last.
    expected = {"mlp": 0.45, "head": 0.225, "exchanges": 0.135, "other": 0.09, "idle": 0.1}
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)
    assert parts.shares([("0", "nothing", 0, 1)], parts.instructions(PROGRAM)) == {}


def test_a_real_profile_finds_every_part():
    """The named scopes of model and step are in the compiled program, forward and backward."""
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])
    config = defaults()
    config.update(batch_size=2, precision="float32")
    config.model = model(dim=32, num_heads=2, num_blocks=2, context_length=32, vocab_size=128)
    config.optimizer = optimizers.choices()["adamw"]()
    config, _ = choice.settle(resolve(config, 100), dict(mesh.shape), "cpu", 1e9)
    steps = step.build(config, shape_on(config, mesh))
    batch = {"tokens": np.zeros((1, 2, 33), np.uint16), "lengths": np.full((1, 2), 32, np.int32)}
    state, batch = steps.init(), jax.device_put(batch, batch_sharding(mesh))
    compiled = steps.train.lower(state, batch).compile()
    jax.block_until_ready(compiled(state, batch))
    state = steps.init()
    events = where.profile(lambda: compiled(state, batch))
    found = parts.shares(events, parts.instructions(compiled.as_text()))
    assert {*parts.PARTS, "idle"} <= set(found)
    assert abs(sum(found.values()) - 1) < 1e-6


@pytest.mark.parametrize("name", ["trainit", "flax"])
def test_contenders_train_the_same_kind_of_model(name, monkeypatch, tmp_path):
    """Untrained, the loss is that of guessing; on one batch it then falls."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(devices, "configure", lambda *args: None)  # JAX runs already
    shape = contender.SHAPES["S"] | {
        "num_blocks": 2,
        "dim": 32,
        "num_heads": 2,
        "context_length": 32,
        "batch": 2,
    }
    train = contender.CONTENDERS[name](shape | {"vocab_size": 256}, "float32")
    losses = [train() for _ in range(20)]
    assert abs(losses[0] - np.log(256)) < 0.7
    assert losses[-1] < losses[0]


def test_what_is_set_by_hand_has_a_row_where_it_differs(monkeypatch, capsys):
    """A default that is the same is no program of its own: the child prints {}, and no row is shown."""
    monkeypatch.setattr(contender, "_take_devices", lambda: None)
    step_made = lambda config, _: config.model.remat  # noqa: E731
    monkeypatch.setattr(contender, "step_of", step_made)
    assert contender.trainit_by_hand(contender.SHAPES["S"], "float32") is None
    monkeypatch.setattr(contender, "BY_HAND", {"model.remat": "block"})
    assert contender.trainit_by_hand(contender.SHAPES["S"], "float32") == "block"

    result = {"first": 1.0, "seconds": [1.0], "peak": 1}
    monkeypatch.setattr(suite, "WORK", [("S", "float32", 1)])
    for by_hand, rows in (({}, 0), (result, 1)):
        monkeypatch.setattr(suite, "_run", lambda name, *_, r=by_hand: r if "hand" in name else result)
        assert suite.measure(rounds=1) == 0
        assert capsys.readouterr().out.count("trainit_by_hand") == rows


def test_texts_are_compared_with_transformers(monkeypatch):
    """Medians over rounds; the first round compiles, so that its first token does not count."""
    results = {
        "trainit": [{"first": 9.0, "seconds": 4.0}, {"first": 1.0, "seconds": 2.0}],
        "transformers": [{"first": 0.5, "seconds": 6.0}] * 2,
    }
    turns = {name: iter(of * 2) for name, of in results.items()}
    monkeypatch.setattr(generating, "_run", lambda name, *_: next(turns[name]))
    lines = list(generating.measure(length=30, rounds=2))
    # 30 tokens in 4 and in 2 seconds, 11.25 a second; there 5.
    assert lines[0].startswith("11.2 tokens/s  1 at once, 2.25 times transformers (5.0); 1.0 s from loaded")
    assert lines[1].startswith("180.0 tokens/s  16 at once, 2.25 times transformers (80.0)")
    monkeypatch.setattr(generating, "_run", lambda *_: {"error": "transformers: No module named 'torch'"})
    assert next(generating.measure(30, 1)) == "1 at once: transformers: No module named 'torch'"


def test_a_suite_counts_the_flops_of_its_model():
    """By hand for S: 6 layers of 12 * 384**2 weights, a head of 384 * 8192, attention over 256 tokens."""
    weights = 6 * 12 * 384**2 + 384 * 8192
    assert suite.flops("S") == (6 * weights + 12 * 6 * 256 * 384) * 16 * 256
