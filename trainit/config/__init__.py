"""What describes a run: every field with its unit and bounds, choices of whole groups, checks.

A config file in `configs/` has `get_config(arg)`: it starts from `defaults()`, sets what its
experiment is about, and ends with `choose(config, arg, ...)`, which picks whole groups by name
(`:model=gpt2_medium,schedule=cosine`). `resolve` fills what follows from other fields, checks
everything across fields and freezes the result. All of it happens before a device is touched.
"""

from trainit.config.durations import BatchSizes, batch_sizes
from trainit.config.fields import (
    DROPOUTS,
    MESH_AXES,
    VOCABULARY_MULTIPLE,
    Config,
    dataset,
    defaults,
    jsonl,
    model,
)
from trainit.config.groups import DATASETS, FREE, GROUPS, MODELS, SCHEDULES, choose
from trainit.config.resolve import OPTIMIZER_FIELDS, check_mesh, check_ranges, resolve, shrink
from trainit.config.schema import (
    TYPE_NAMES,
    ConfigDict,
    ConfigError,
    Field,
    check_fields,
    check_names,
    field,
    flatten,
    require,
    unknown_field,
    walk,
)

__all__ = [
    "DATASETS",
    "DROPOUTS",
    "FREE",
    "GROUPS",
    "MESH_AXES",
    "MODELS",
    "OPTIMIZER_FIELDS",
    "SCHEDULES",
    "TYPE_NAMES",
    "VOCABULARY_MULTIPLE",
    "BatchSizes",
    "Config",
    "ConfigDict",
    "ConfigError",
    "Field",
    "batch_sizes",
    "check_fields",
    "check_mesh",
    "check_names",
    "check_ranges",
    "choose",
    "dataset",
    "defaults",
    "field",
    "flatten",
    "jsonl",
    "model",
    "require",
    "resolve",
    "shrink",
    "unknown_field",
    "walk",
]
