"""Eight virtual CPU devices, and small datasets, for every test."""

import os
import tempfile

# What commands compile and prepare is kept for the whole session, by all that take part in it. What tests
# compile themselves is not: few of their programs are alike, and to write one takes an eighth of its time.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TRAINIT_CACHE"] = tempfile.mkdtemp(prefix="trainit-tests-")

# PyTorch's threads wait for each other in a loop, while other tests have the cores: a test of 20 s took 150.
os.environ["OMP_NUM_THREADS"] = "1"

from processes import FAST

os.environ["XLA_FLAGS"] = FAST

import atexit
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from trainit.cluster.process import STOP_SIGNALS
from trainit.cluster.tuning import collect_garbage_rarely

# A suite in the background ignores SIGINT, one under nohup SIGHUP, and so would all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
collect_garbage_rarely()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth less to compile
if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["TRAINIT_CACHE"], ignore_errors=True)


LONG = (  # by their CPU time, from minutes to half a minute
    *("test_train", "test_step", "test_main", "test_optimizers", "test_loader", "test_float16"),
    *("test_streaming", "test_plan", "test_optimizer_state", "test_checkpoint", "test_prepare_files"),
    *("test_tokenizers_long", "test_optimizer_field", "test_gpt", "test_diagnostics", "test_attention"),
    *("test_document_mask", "test_optimizer_declarations", "test_float8", "test_sweep"),
    *("test_compare", "test_sources", "test_foreign"),
)


# A tenth of the tests by their time, which .ci/run repeats on the newest Python and JAX: resumes, meshes,
# checkpoints, the loss, optimizers. They begin with FILE::NAME.
NEWEST = (
    "test_checkpoint.py::test_restores_bit_exact_onto_any_mesh",
    "test_checkpoint.py::test_parameters_alone",
    "test_checkpoint.py::test_another_model_is_refused",
    "test_checkpoint.py::test_an_unfinished_save",
    "test_checkpoint.py::test_keep_removes",
    "test_checkpoint.py::test_importing",
    "test_checkpoint.py::test_what_a_resume_may_change",
    "test_cross_entropy.py::test_sums_and_gradient_equal_numpy",
    "test_cross_entropy.py::test_chunks_on_a_mesh_equal_numpy",
    "test_cross_entropy.py::test_logits_are_computed_once",
    "test_optimizers.py::test_eight_devices_make_the_same_updates_and_hold_a_share_each",
    "test_optimizers.py::test_an_update_needs_the_step",
    "test_xla_flags.py::",
    *(
        f"test_step.py::test_every_split_of_the_mesh_gives_the_same_run[{mesh}]"
        for mesh in (
            *("data 8 fsdp 1 tensor 1", "data 1 fsdp 8 tensor 1", "data 1 fsdp 1 tensor 8"),
            "data 2 fsdp 2 tensor 2",
        )
    ),
    "test_step.py::test_everything_is_born_and_stays_sharded[adamw]",
    "test_step.py::test_everything_is_born_and_stays_sharded[muon]",
    "test_train.py::test_undisturbed_run",
    "test_train.py::test_other_sizes_go_on_with_the_same_run",
    "test_train.py::test_time_limit_resume_and_complete",
    "test_train.py::test_stop_signals",
)


def pytest_collection_modifyitems(items):
    """Marks the tests of NEWEST, and puts files that last long first.

    Begun at the end, a long file would keep one worker busy while others rest.
    """
    for item in items:
        if f"{item.path.name}::{item.name}".startswith(NEWEST):
            item.add_marker("newest")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def unblocked():
    """What commands in this process have blocked comes again, here and to what a test starts."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@pytest.fixture
def keep_compiled():
    """A function that has JAX keep each compiled program in a folder, or in none."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    kept = [getattr(jax.config, name) for name in names]

    def keep(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield lambda folder: keep(folder and str(folder), 0.0)
    keep(*kept)


@pytest.fixture(scope="session")
def subset_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of bytes with three subsets, of few and of many documents, in several shards."""
    from trainit.__main__ import main as trainit_command

    draw, folder = np.random.default_rng(1), tmp_path_factory.mktemp("subsets")
    letters = {"Alpha": "abc", "Beta (1)": "defgh", "Gamma": "xyzäö"}
    for name, count in (("train", 200), ("validation", 40)):
        lines = []
        for _ in range(count):
            subset = str(draw.choice(list(letters), p=[0.6, 0.3, 0.1]))
            text = "".join(draw.choice(list(letters[subset]), draw.integers(1, 400)))
            lines.append(json.dumps({"text": text, "meta": {"pile_set_name": subset}}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [f"--input={folder}/train.jsonl", f"--validation={folder}/validation.jsonl"]
    arguments += ["--tokenizer=bytes", f"--output={folder}/data", "--shard_tokens=9000", "--workers=1"]
    assert trainit_command(["prepare", *arguments]) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def random_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of bytes: words drawn from a seed, in four shards to train and one to validate."""
    from trainit.prepare.demo import write_dataset
    from trainit.tokenizers import ByteTokenizer

    draw = np.random.default_rng(0)
    words = ["".join(chr(c) for c in draw.integers(97, 123, draw.integers(1, 8))) for _ in range(300)]

    def documents(count: int) -> list[str]:
        return [" ".join(draw.choice(words, draw.integers(20, 200))) for _ in range(count)]

    folder = tmp_path_factory.mktemp("data") / "random"
    splits = {"train": documents(150), "validation": documents(10)}
    write_dataset(folder, ByteTokenizer(), splits, shard_tokens=20_000)
    return folder
