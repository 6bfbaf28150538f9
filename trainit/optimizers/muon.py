"""Muon for hidden matrices, AdamW or LaProp for the rest: Jordan et al. 2024, kellerjordan.github.io."""

import optax
from ml_collections import ConfigDict

from trainit.config import require
from trainit.optimizers.common._bounds import above_0, not_below_0
from trainit.optimizers.common.moments import scale_by_laprop, scale_by_moments
from trainit.optimizers.common.newton_schulz import scale_by_newton_schulz


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "muon"
    config.learning_rate = 0.02  # of matrices, peak of the schedule; >= 0
    config.weight_decay = 0.0  # decoupled, times the parameter's own rate; >= 0
    config.momentum = 0.95  # m <- momentum * m + g; in [0, 1)
    config.nesterov = True  # orthogonalize momentum * m + g instead of m
    config.ns_steps = 5  # of Newton-Schulz; > 0
    config.ns_precision = "bfloat16"  # of its products: bfloat16, float32
    config.ns_eps = 1e-7  # added to the Frobenius norm that its input is divided by; > 0
    config.rest = "adamw"  # of embeddings, head and vectors: adamw, laprop
    config.rest_rate = 0.015  # their learning rate in units of the scheduled one; >= 0
    config.rest_beta1 = 0.95  # decay of their mean; in [0, 1)
    config.rest_beta2 = 0.95  # decay of their mean squared gradient; in [0, 1)
    config.rest_eps = 1e-8  # added to the root of their mean square; > 0
    return config


def make(config, context) -> optax.GradientTransformation:
    return _by_kind(config, context, {"matrix"})


def get_muon_og_config() -> ConfigDict:
    config = get_config()
    config.name = "muon_og"
    config.ns_embedding = False  # Muon for the embeddings too, whose factor is sqrt(max(1, rows / width))
    config.ns_head = False  # Muon for the head too
    return config


def make_muon_og(config, context) -> optax.GradientTransformation:
    """Muon with Newton-Schulz on the embeddings or the head too, by switches."""
    more = {"embedding": config.ns_embedding, "head": config.ns_head}
    return _by_kind(config, context, {"matrix"} | {kind for kind, on in more.items() if on})


def _by_kind(config, context, kinds: set[str]) -> optax.GradientTransformation:
    """Muon for parameters of these kinds of `layout.parameter_kind`, the config's `rest` for the others."""
    rests = {"adamw": scale_by_moments, "laprop": scale_by_laprop}
    require(
        config.ns_precision in ("bfloat16", "float32"),
        f"optimizer.ns_precision={config.ns_precision!r} is none of 'bfloat16', 'float32'",
    )
    require(config.rest in rests, f"optimizer.rest={config.rest!r} is none of 'adamw', 'laprop'")
    above_0(config, "ns_steps")
    not_below_0(config, "rest_rate")
    muon = optax.chain(
        optax.trace(config.momentum, config.nesterov),
        scale_by_newton_schulz(
            context.mesh, steps=config.ns_steps, dtype=config.ns_precision, eps=config.ns_eps
        ),
        context.decay(),
    )
    rest = optax.chain(
        rests[config.rest](config.rest_beta1, config.rest_beta2, config.rest_eps),
        context.decay(),
        optax.scale(config.rest_rate),
    )
    labels = context.by_path(lambda path, kind: "muon" if kind in kinds else "rest")
    return context.descend(optax.partition({"muon": muon, "rest": rest}, labels), decay="own")
