"""Whole groups of fields by name, as in --config=FILE:model=gpt2_medium,schedule=cosine."""

import re
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainit.config.fields import LINEAR, chat, dataset, diagnostics, jsonl, model, schedule
from trainit.config.schema import ConfigDict, ConfigError, names

Maker = Callable[[], ConfigDict]  # of the fields of a choice
_OPEN_MODELS = tomllib.loads(Path(__file__).with_name("open_models.toml").read_text("utf-8"))
MODELS: dict[str, Maker] = {
    # Radford et al. 2019, with the head untied.
    "gpt2": model,
    "gpt2_medium": partial(model, dim=1024, num_heads=16, num_blocks=24),
    "gpt2_large": partial(model, dim=1280, num_heads=20, num_blocks=36),
    "gpt2_xl": partial(model, dim=1600, num_heads=25, num_blocks=48),
    # GPT-2's sizes with what models have used since.
    "modern": partial(
        model, norm="rmsnorm", activation="swiglu", positions="rope", use_bias=False, qk_norm=True
    ),
    # GPT-3 XL, 1.3B (Brown et al. 2020, arXiv 2005.14165, table 2.1; heads of 128).
    "gpt3_xl": partial(model, dim=2048, num_heads=16, num_blocks=24, context_length=2048),
    # Llama 2 and 3, Pythia, Mistral, Qwen, OLMo, Gemma.
    **{name: partial(model, **fields) for name, fields in _OPEN_MODELS.items()},
}

_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup": "10%"},
    "linear": LINEAR,
    "cosine": {"warmup": "10%", "cycles": 1, "final": 0.0},
    "inverse_sqrt": {"warmup": "10%", "decay": 0, "final": 0.0},
    "power": {"warmup": "10%", "exponent": 0.5, "decay": 0, "final": 0.0},
    "trapezoid": {"warmup": "10%", "decay": "20%", "final": 0.0},
    "piecewise_linear": {"warmup": 0, "boundaries": ("0%", "50%", "100%"), "values": (0.0, 1.0, 0.0)},
}
SCHEDULES: dict[str, Maker] = {name: partial(schedule, name, **fields) for name, fields in _SCHEDULES.items()}
DATASETS: dict[str, Maker] = {"pile": partial(dataset, "data/pile"), "demo": partial(dataset, "demo")}
DATASETS |= {"jsonl": jsonl, "chat": chat}
_COSTLY = ("last_gradient", "past_gradients", "last_parameters", "last_loss")  # copies, a forward pass
DIAGNOSTICS: dict[str, Maker] = {
    "none": partial(diagnostics, every_steps=0),
    "norms": partial(diagnostics, **dict.fromkeys(_COSTLY, False)),
    "full": diagnostics,
}

GROUPS: dict[str, dict[str, Maker]]
GROUPS = {"model": MODELS, "schedule": SCHEDULES, "dataset": DATASETS, "diagnostics": DIAGNOSTICS}

# Fields that say where and how a run runs, and not what it is (data have fingerprints): they may change.
FREE = re.compile(
    r"(max_minutes|stall_seconds|max_skipped|device_batch_size|logits_mib|platform|cpu_devices|trackers)$"
    r"|model\.(attention|remat|scan_layers)$"
    r"|dataset\.(path|validation_path|subset_field|tokenizer|template|end_of_text|workers|prefetch)$"
    r"|spikes\.skip_data$|(mesh|eval|log|check|checkpoint|restart|profile|diagnostics|wandb)\."
)


def choose(config: ConfigDict, arg: str, **groups: Mapping[str, Maker]) -> ConfigDict:
    """Replaces groups of `config`, in place, by the choices that `arg` names: "model=gpt2,schedule=cosine".

    `groups` are more than those of GROUPS. ConfigErrors list the known groups or choices.
    """
    groups = {**GROUPS, **groups}
    for part in filter(None, arg.split(",")):
        group, equals, choice = part.partition("=")
        if group not in groups or not equals:
            raise ConfigError(f"unknown group {part!r}: write GROUP=CHOICE, GROUP one of {names(groups)}")
        if choice not in groups[group]:
            raise ConfigError(f"unknown {group} {choice!r}: there are {names(groups[group])}")
        config[group] = groups[group][choice]()
    return config
