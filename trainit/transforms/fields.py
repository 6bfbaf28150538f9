"""The config fields that several optimizers have, each declared once."""

import dataclasses
from typing import Any

from trainit.config import ConfigDict, field

PRECISIONS = ("bfloat16", "float32")
FIELDS = {
    "learning_rate": field(0.0, "peak of the schedule", at_least=0),
    "weight_decay": field(0.0, "weight decay, times the learning rate; decoupled by default", at_least=0),
    "decoupled": field(True, "add the decay after the direction (AdamW) instead of to the gradient"),
    "beta1": field(0.9, "decay of the mean gradient", at_least=0, below=1),
    "beta2": field(0.999, "decay of the mean squared gradient", at_least=0, below=1),
    "eps": field(1e-8, "added to the root of the mean square", above=0),
    "nesterov": field(False, "the mean gradient, or the momentum, looks one step ahead"),
    "momentum": field(0.9, "factor of m in m <- momentum * m + g; 0: none", at_least=0, below=1),
    # Of Muon and Mango.
    "ns_steps": field(5, "iterations of Newton-Schulz", above=0),
    "ns_precision": field("bfloat16", "precision of the products in Newton-Schulz", one_of=PRECISIONS),
    # Of online learners.
    "discount": field(0.9, "factor by which the past counts less with each step", above=0, at_most=1),
    "radius": field(0.0, "maximum of the point's norm over all parameters; 0: no maximum", at_least=0),
    "lipschitz": field(10.0, "bound G of its gradients, to which larger ones are clipped", above=0),
    "regularization": field(0.0, "lambda, where lambda/2 |Delta|^2 is added to each loss", at_least=0),
}


def common_fields(**defaults: Any) -> ConfigDict:
    """A config with these fields of FIELDS, in this order and with these defaults."""
    config = ConfigDict()
    for name, default in defaults.items():
        config[name] = dataclasses.replace(FIELDS[name], default=default)
    return config
