"""Muon for hidden matrices, AdamW or LaProp for the rest: Jordan et al. 2024, kellerjordan.github.io.

For the gradient G of a matrix, m <- momentum m + G, and the direction is nearly U V^T of the singular value
decomposition m = U S V^T, by Newton-Schulz. `muon_og` has switches for the embeddings and the head.
`equilibrate` is MuonEq (Chang et al. 2026, arXiv 2603.28254), whose rows are the outputs here; `normalize` is
Muon+ (Zhang et al. 2026, arXiv 2602.21545).
"""

import optax

from trainit.config import ConfigDict, field
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_laprop, scale_by_moments
from trainit.transforms.newton_schulz import COEFFICIENTS, SCALES, scale_by_newton_schulz

NORMS = ("none", "outputs", "inputs")


def get_config() -> ConfigDict:
    config = fields_of_direction()
    config.scale = field("jordan", "factor of an update by its matrix's inputs and outputs", one_of=SCALES)
    return config


def fields_of_direction() -> ConfigDict:
    """All except the scale, for optimizers that choose their updates' size themselves."""
    config = common_fields(momentum=0.95, nesterov=True, ns_steps=5, ns_precision="bfloat16")
    config.learning_rate = field(0.02, "peak of the schedule, for matrices", at_least=0)
    config.weight_decay = field(0.0, "decoupled weight decay, times the parameter's own rate", at_least=0)
    config.ns_coefficients = field("jordan", "of Newton-Schulz's quintic", one_of=COEFFICIENTS)
    config.ns_eps = field(1e-7, "added to the Frobenius norm that its input is divided by", above=0)
    config.equilibrate = field("none", "whose norms become 1 before Newton-Schulz", one_of=NORMS)
    config.normalize = field("none", "whose norms become 1 after Newton-Schulz", one_of=NORMS)
    config.rest = field("adamw", "optimizer of embeddings, head and vectors", one_of=("adamw", "laprop"))
    config.rest_rate = field(0.015, "learning rate of `rest`, in units of the scheduled one", at_least=0)
    config.rest_beta1 = field(0.95, "decay of the mean gradient of `rest`", at_least=0, below=1)
    config.rest_beta2 = field(0.95, "decay of the mean squared gradient of `rest`", at_least=0, below=1)
    config.rest_eps = field(1e-8, "added to the root of the mean square of `rest`", above=0)
    return config


def make(config, context) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, `rest` for embeddings, head and vectors."""
    parts = momentum(config), orthogonal(config, context, config.scale)
    return by_kind(config, context, {"matrix"}, *parts)


def get_muon_og_config() -> ConfigDict:
    config = get_config()
    config.ns_embedding = field(False, "Muon for embeddings, too, times sqrt(max(1, rows / width))")
    config.ns_head = field(False, "use Muon for the head, too")
    return config


def make_muon_og(config, context) -> optax.GradientTransformation:
    """Muon with Newton-Schulz on the embeddings or the head too, by switches."""
    more = {"embedding": config.ns_embedding, "head": config.ns_head}
    kinds = {"matrix"} | {kind for kind, on in more.items() if on}
    return by_kind(config, context, kinds, momentum(config), orthogonal(config, context, config.scale))


def momentum(config) -> optax.GradientTransformation:
    """m <- momentum m + G; with `nesterov`, momentum m + G for the new m."""
    return optax.trace(config.momentum, config.nesterov)


def orthogonal(config, context, scale: str = "jordan") -> optax.GradientTransformation:
    """Newton-Schulz with the config's settings, and a scale of SCALES."""
    options = {"steps": config.ns_steps, "dtype": config.ns_precision, "eps": config.ns_eps}
    options |= {"coefficients": config.ns_coefficients, "scale": scale}
    options |= {"before": config.equilibrate, "after": config.normalize}
    return scale_by_newton_schulz(context.mesh, **options)


def by_kind(config, context, kinds: set[str], *parts: optax.GradientTransformation):
    """A chain of parts for kinds of `layout.parameter_kind`; the config's `rest` for others."""
    rests = {"adamw": scale_by_moments, "laprop": scale_by_laprop}
    muon = optax.chain(*parts, context.decay())
    direction = rests[config.rest](config.rest_beta1, config.rest_beta2, config.rest_eps)
    rest = optax.chain(direction, context.decay(), optax.scale(config.rest_rate))
    labels = context.by_path(lambda path, kind: "muon" if kind in kinds else "rest")
    return context.descend(optax.partition({"muon": muon, "rest": rest}, labels), decay="own")
