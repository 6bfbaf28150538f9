"""Data that a config leaves out, and a run that goes back to a checkpoint before them."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest
import tiny
from processes import FAST, ROOT, TWO, exact, metrics

from trainit import config as config_lib
from trainit.config import ConfigError, jsonl, resolve
from trainit.data import training_data
from trainit.data.loader import START
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train.feed import BatchFeed

STEPS, RANGES = 12, "3:5, 6:7, 9:11"


def make_config(path, **changes):
    config = tiny.get_config()
    config.steps, config.dataset.path = STEPS, str(path)
    config.model.update(context_length=16)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def index_of(step: int) -> int:
    """Which batch of a run without gaps step number `step` gets: counted one by one."""
    left_out = {3: 2, 6: 1, 9: 2}
    batch = -1
    for number in range(step + 1):
        batch += 1 + left_out.get(number, 0)
    return batch


@pytest.mark.parametrize("text", ["3", "3:3", "5:3", "3:5,3:7", "6:7, 3:5", "3:5;6:7", "-1:2", "1:12"])
def test_what_is_no_range_is_refused(text):
    config = make_config("", spikes__skip_data=text, batch_schedule="10: 32")
    with pytest.raises(ConfigError, match=r"spikes.skip_data=.* must be rising ranges of steps"):
        resolve(config, 257)


def test_rows_count_what_is_left_out():
    """Stages of a mixture begin at rows; those of a step are at its batch."""
    config = resolve(make_config("", spikes__skip_data=RANGES, batch_schedule="8: 32"), 257)
    sizes = config_lib.batch_sizes(config)
    rows = [0]
    for step in range(STEPS):
        size = 16 if step < 8 else 32
        rows.append(rows[-1] + size * (1 + {3: 2, 6: 1, 9: 2}.get(step, 0)))
    assert [sizes.rows(step) for step in range(STEPS + 1)] == rows


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """JSON lines of random words."""
    folder, draw = tmp_path_factory.mktemp("lines"), np.random.default_rng(3)
    for name, count in (("train", 300), ("validation", 10)):
        texts = ["".join(map(chr, draw.integers(97, 123, draw.integers(20, 90)))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.mark.evidence("data that are left out: batches are those of a run without gaps, from any resume on")
@pytest.mark.parametrize("kind", ["prepared", "mixture", "streamed"])
def test_batches_are_those_of_a_run_without_gaps(kind, random_dataset, lines, tmp_path):
    def open_data(ranges):
        config = make_config(random_dataset, spikes__skip_data=ranges)
        if kind == "mixture":
            config.dataset.mixture = f"{random_dataset} 1; 12: {random_dataset} 1"
        if kind == "streamed":
            config.dataset = jsonl(str(lines / "train.jsonl"), str(lines / "validation.jsonl"))
            config.dataset.update(tokenizer="bytes", streams=4, window=8, workers=0)
            config.eval.sequences = 4
        return training_data.read(config, config.dataset.path, resolve, tmp_path)

    def feed(config, data, step=0, position=START):
        quiet = SimpleNamespace(stop_is_due=lambda: False, watchdog=SimpleNamespace())
        meter = SimpleNamespace(waited_for_data=lambda seconds: None)
        mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:2])
        return BatchFeed(data, shape_on(config, mesh), quiet, meter, step, position)

    def read(feed, count):
        """The positions before each of the next batches and after them, and the batches' tokens."""
        positions, tokens = [feed.position()], []
        for _ in range(count):
            tokens.append(np.asarray(feed.next()["tokens"]))
            feed.advance()
            positions.append(feed.position())
        return positions, tokens

    plain, plain_data = open_data("")
    sizes = config_lib.batch_sizes(plain)
    whole = read(feed(config_lib.Config({**plain.to_dict(), "steps": 20}), plain_data), 17)[1]
    config, data = open_data(RANGES)
    positions, batches = read(feed(config, data), STEPS)
    assert sizes.sizes == (16,)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch, whole[index_of(step)])
    for step in (2, 3, 4, 6, 9, 11):  # the checkpoint of step 3 is that of a run that leaves out nothing
        again_positions, again = read(feed(config, data, step, positions[step]), STEPS - step)
        assert again_positions[1:] == positions[step + 1 :]
        np.testing.assert_array_equal(again, batches[step:])
        data.check_resume(config.to_dict(), positions[step], step)


@pytest.mark.evidence(
    "a run that goes back and leaves out data is one from scratch with its config, bit for bit"
)
def test_a_rewound_run_is_one_from_scratch(random_dataset, tmp_path):
    """Spikes are left out, too: with a bound that low, many steps are."""
    run = functools.partial(processes.run_imported, XLA_FLAGS=FAST)
    command = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={random_dataset}", *TWO
    command += f"--config.steps={STEPS}", "--config.eval.every_steps=0", "--config.checkpoint.keep=0"
    command += "--config.spikes.skip_deviations=0.5", "--config.spikes.window=3"
    command += ("--config.optimizer.learning_rate=1e-4",)  # losses that do not fall have spikes
    there, scratch = tmp_path / "there", tmp_path / "scratch"

    def steps_of(folder):
        return {record["step"]: record for record in exact(metrics(folder)) if record["step"]}

    output = run(*command, f"--workdir={there}")
    first = steps_of(there)
    so_far = [0, *(first[step]["train/skipped"] for step in range(1, STEPS + 1))]
    skipped = [step for step in first if so_far[step] > so_far[step - 1]]
    assert skipped and list(map(int, re.findall(r"skipped    step (\d+): loss", output))) == skipped

    # Without being asked for it, a run does not go back.
    skip, rewind = "--config.spikes.skip_data=4:6", "--config.checkpoint.rewind=True"
    output = run(*command, f"--workdir={there}", skip, expect=2)
    assert "spikes.skip_data='4:6' is not what" in output
    assert f"the newest fitting one before it is of step 3: {rewind} takes that" in output
    output = run(*command, f"--workdir={there}", skip, rewind)
    assert "the run continues from step 3" in output
    aside = {path.name for path in (there / "checkpoints").glob("*.rewound")}
    assert aside == {"6.rewound", "9.rewound", "12.rewound"}

    run(*command, f"--workdir={scratch}", skip)
    again = steps_of(there)
    assert exact(metrics(there)) == exact(metrics(scratch))
    assert [step for step in first if again[step] != first[step]] == list(range(5, STEPS + 1))
    assert json.loads((there / "config.json").read_text())["spikes"]["skip_data"] == "4:6"
    # A replay leaves them out, too.
    output = run(there, "--step=3", "--steps=3", command="replay")
    assert re.search(r"steps 4 to 6: 3 logged steps are as logged, bit for bit", output), output
    # The same command again, as a scheduler gives it, goes back no more; and nobody may take the range back.
    assert "all 12 steps are done; nothing to do" in run(*command, f"--workdir={there}", skip, rewind)
    shutil.rmtree(there / "checkpoints/3")
    assert "no checkpoint before it is fitting" in run(*command, f"--workdir={there}", rewind, expect=2)
