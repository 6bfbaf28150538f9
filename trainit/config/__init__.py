"""What describes a run: every field with its unit and bounds, choices of whole groups, checks.

A config file in `configs/` has `get_config(arg)`: it starts from `defaults()`, sets what its experiment is
about, and ends with `choose(config, arg, ...)`, which picks whole groups by name. `resolve` fills what
follows from other fields, checks everything across fields and freezes the result.
"""

from trainit.config.durations import BatchSizes, batch_sizes
from trainit.config.fields import DROPOUTS, GATED, MESH_AXES, Config, dataset, defaults, jsonl, model
from trainit.config.groups import DATASETS, FREE, GROUPS, MODELS, SCHEDULES, choose
from trainit.config.resolve import (
    OPTIMIZER_FIELDS,
    USUAL_FIELDS,
    check_mesh,
    layers_with_window,
    length_multiple,
    of_this_version,
    resolve,
    shrink,
)
from trainit.config.schema import ConfigDict, ConfigError, Field, check_fields, field, flatten, require, walk
