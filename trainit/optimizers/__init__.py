"""Optimizers: each is one file with two functions.

    def get_config() -> ConfigDict                       # learning_rate, weight_decay, its own fields
    def make(config, context) -> optax.GradientTransformation

`optimizer=NAME` finds the file here by its name, `optimizer=path/to/mine.py` one anywhere, and
`optimizer=optax.NAME` or `optax.contrib.NAME` an optimizer of optax. `optimizer=WRAPPER+NAME` changes any of
them by one of `wrappers`. What optimizers share is in `common`; `common.context` is what `make` is given.

A file can declare two things about its updates:

    NEEDS = {"gradient_at"}   # they call gradient_at(params), which gives this batch's gradient elsewhere,
                              # or sampled_gradient_at(params, key), whose targets the model draws itself.
                              # Both are parameters of the update, as `step` may be. Without NEEDS, to call
                              # one is an error. Where it depends on fields: def needs(config) -> set.
    ELEMENTWISE = True        # they have no matrix products. The train step then computes an update twice
                              # rather than keep it in memory. Without it, it never does.
"""

from trainit.optimizers.common.build import Optimizer, assigned, build, check, logged, of_run, training_point
from trainit.optimizers.common.registry import choices, own_files_hash
from trainit.transforms.context import Context
