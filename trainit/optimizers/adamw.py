"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101).

For the gradient g at update t, clipped by its global norm, and the parameters x:

    m <- beta1 m + (1 - beta1) g                     v <- beta2 v + (1 - beta2) g^2
    x <- x - rate * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x)

This file is a model for an optimizer of your own. `get_config` declares its fields, `common_fields` those
that others have too. `make` returns an optax transformation; `context.descend` adds what all have in common:
clipping, decay and the learning rate. A file in this folder is chosen by its name (`optimizer=adamw`), one
elsewhere by its path (`optimizer=my/own.py`). `trainit/optimizers/__init__.py` says what else it may declare.
"""

import optax

from trainit.config import Config, ConfigDict, field
from trainit.transforms.context import Context
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True  # no matrix products: the train step may compute an update twice to save memory


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    config.nesterov = field(False, "the mean gradient looks one step ahead")
    return config


def make(config: Config, context: Context) -> optax.GradientTransformation:
    """AdamW; with `nesterov`, m looks one step ahead (Dozat 2016)."""
    return context.descend(scale_by_moments(config.beta1, config.beta2, config.eps, nesterov=config.nesterov))
