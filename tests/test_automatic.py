"""What is chosen where a config says auto: by platform, size and memory, with the same results."""

import numpy as np
import pytest
import tiny
from first_steps import losses_and_norms

from trainit import optimizers
from trainit.config import MESH_AXES, MODELS, ConfigError, defaults, resolve
from trainit.train.automatic import choice

GB = 1e9
ONE = dict.fromkeys(MESH_AXES, 1)


def config_of(model: str, rows: int, sizes: dict, **changes):
    config = defaults()
    config.optimizer = optimizers.choices()["adamw"]()
    config.model = MODELS[model]()
    config.batch_size = rows * sizes["data"] * sizes["fsdp"]
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return resolve(config, config.model.vocab_size or 50257)


CHOICES = {
    "small on a laptop": ("gpt2", 16, {}, "cpu", 16 * GB, ("dots", True, 64)),
    "124M that does not fit": ("gpt2", 16, {}, "cpu", 8 * GB, ("block", True, 64)),
    "124M on a GPU": ("gpt2", 16, {}, "cuda", 72 * GB, ("none", False, 256)),
    "124M on a small GPU": ("gpt2", 16, {}, "cuda", 9 * GB, ("none", False, 256)),
    "124M on a tiny GPU": ("gpt2", 16, {}, "cuda", 6 * GB, ("block", True, 256)),
    "1.3B on eight": ("gpt3_xl", 8, {"fsdp": 8}, "cuda", 72 * GB, ("none", False, 256)),
    "1.3B on eight small ones": ("gpt3_xl", 8, {"fsdp": 8}, "cuda", 24 * GB, ("block", True, 256)),
    "7B on eight": ("llama2_7b", 2, {"fsdp": 8}, "cuda", 72 * GB, ("dots", True, 1024)),
    "70B on eight": ("llama2_70b", 4, {"tensor": 8}, "cuda", 72 * GB, ("block", True, 256)),
    "of unknown memory": ("gpt2", 16, {}, "rocm", 0, ("block", True, 256)),
}


@pytest.mark.parametrize(
    ("model", "rows", "sizes", "platform", "memory", "expected"), CHOICES.values(), ids=CHOICES
)
def test_the_first_way_that_fits_is_taken(model, rows, sizes, platform, memory, expected):
    sizes = ONE | sizes
    config = config_of(model, rows, sizes)
    settled, text = choice.settle(config, sizes, platform, memory)
    assert (settled.model.remat, settled.model.scan_layers, settled.logits_mib) == expected
    remat, loop, mib = expected
    assert text.startswith(f"remat={remat} (auto), scan_layers={loop} (auto), logits_mib={mib} (auto): some ")
    assert f" of {memory / 2**30:.1f} GiB of a device; " in text
    # Nothing else has changed, and the same config with these names is left as it is.
    named = {"model__remat": expected[0], "model__scan_layers": expected[1], "logits_mib": expected[2]}
    same = config_of(model, rows, sizes, **named)
    assert settled.to_dict() == same.to_dict() == choice.settle(same, sizes, platform, memory)[0].to_dict()


def test_what_a_config_names_stays():
    named = {"model__remat": "none", "logits_mib": 32.0}
    settled, text = choice.settle(config_of("gpt2", 16, ONE, **named), ONE, "cpu", 8 * GB)
    assert (settled.model.remat, settled.model.scan_layers, settled.logits_mib) == ("none", True, 32.0)
    assert text.startswith("remat=none, scan_layers=True (auto), logits_mib=32.0: some ")
    for remat, loop in (("block", True), ("dots", True), ("none", False), ("attention", False)):
        settled, _ = choice.settle(config_of("gpt2", 16, ONE, model__remat=remat), ONE, "cuda", 72 * GB)
        assert (settled.model.remat, settled.model.scan_layers) == (remat, loop)
    loop, _ = choice.settle(config_of("gpt2", 16, ONE, model__scan_layers=True), ONE, "cuda", 72 * GB)
    assert (loop.model.remat, loop.model.scan_layers) == ("dots", True)
    unrolled, _ = choice.settle(config_of("gpt2", 16, ONE, model__scan_layers=False), ONE, "cpu", 99 * GB)
    assert (unrolled.model.remat, unrolled.model.scan_layers) == ("dots", False)


def test_a_word_that_is_no_number_of_mib():
    with pytest.raises(ConfigError, match="logits_mib='many' must be a number of MiB, or auto"):
        config_of("gpt2", 16, ONE, logits_mib="many")


# GiB at most as compiled for H100s by XLA, in bfloat16 (jax-cuda12-plugin 0.10.2): state and temporaries.
COMPILED = [
    ("gpt2", 16, {}, ("none", True, 256), 5.6),
    ("gpt2", 16, {}, ("none", False, 256), 5.5),
    ("gpt2", 16, {}, ("dots", True, 256), 5.4),
    ("gpt2_medium", 16, {}, ("none", False, 256), 13.4),
    ("gpt2_medium", 16, {"fsdp": 8}, ("none", False, 256), 11.1),
    ("gpt3_xl", 8, {"fsdp": 8}, ("none", False, 256), 25.6),
    ("gpt3_xl", 8, {"fsdp": 8}, ("dots", True, 1024), 19.6),
    ("gpt3_xl", 8, {"fsdp": 8}, ("block", True, 256), 7.8),
    ("llama2_7b", 2, {"fsdp": 8}, ("block", True, 256), 18.4),
    ("llama2_70b", 4, {"fsdp": 8, "tensor": 8}, ("block", True, 256), 23.3),
]


@pytest.mark.parametrize(("model", "rows", "sizes", "way", "gib"), COMPILED)
def test_the_memory_is_roughly_that_of_compiled_steps(model, rows, sizes, way, gib):
    sizes = ONE | sizes
    needed = choice.needed(config_of(model, rows, sizes), sizes, "cuda", choice.Choice(*way, because=""))
    assert needed / 2**30 == pytest.approx(gib, rel=0.3)


def test_results_change_by_rounding_only():
    """Three steps with what CPUs, and what GPUs have by default, against keeping everything in a loop."""

    def losses(platform: str) -> np.ndarray:
        config = tiny.get_config()
        config.update(batch_size=2, device_batch_size=0)
        config.mesh.update(data=1, fsdp=1, tensor=1)
        config.model.attn_dropout = 0.0
        if platform:
            config.logits_mib = "auto"
            config.model.update(remat="auto", scan_layers="auto")
        config = resolve(config, 257)
        if platform:
            config, _ = choice.settle(config, ONE, platform, GB)
        return losses_and_norms(config, ONE, 257, 3)

    plain = losses("")
    assert plain[0] != plain[4]
    for platform in ("cpu", "cuda"):
        np.testing.assert_allclose(losses(platform), plain, rtol=1e-5)
