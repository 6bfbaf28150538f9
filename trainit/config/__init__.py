"""What describes a run: every field with its unit and bounds, choices of whole groups, checks.

A config file in `configs/` has `get_config(arg)`: it starts from `defaults()`, sets what its
experiment is about, and ends with `choose(config, arg, ...)`, which picks whole groups by name
(`:model=gpt2_medium,schedule=cosine`). `resolve` fills what follows from other fields, checks
everything across fields and freezes the result. All of it happens before a device is touched.
"""

from trainit.config.durations import BatchSizes, batch_sizes
from trainit.config.fields import (
    DATASETS,
    DROPOUTS,
    FREE,
    GROUPS,
    MESH_AXES,
    MODELS,
    SCHEDULES,
    VOCABULARY_MULTIPLE,
    Config,
    ConfigError,
    choose,
    dataset,
    defaults,
    flatten,
    jsonl,
    model,
    require,
)
from trainit.config.resolve import check_mesh, check_ranges, resolve, shrink

__all__ = [
    "DATASETS",
    "DROPOUTS",
    "FREE",
    "GROUPS",
    "MESH_AXES",
    "MODELS",
    "SCHEDULES",
    "VOCABULARY_MULTIPLE",
    "BatchSizes",
    "Config",
    "ConfigError",
    "batch_sizes",
    "check_mesh",
    "check_ranges",
    "choose",
    "dataset",
    "defaults",
    "flatten",
    "jsonl",
    "model",
    "require",
    "resolve",
    "shrink",
]
