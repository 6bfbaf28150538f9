"""Muon with Newton-Schulz on the embeddings or the head too, by switches: Jordan et al. 2024, as `muon`."""

import optax
from ml_collections import ConfigDict

from trainit.optimizers import muon


def get_config() -> ConfigDict:
    config = muon.get_config()
    config.name = "muon_og"
    config.ns_embedding = False  # Muon for the embeddings too, whose factor is sqrt(max(1, rows / width))
    config.ns_head = False  # Muon for the head too
    return config


def make(config, context) -> optax.GradientTransformation:
    more = {"embedding": config.ns_embedding, "head": config.ns_head}
    return muon.by_kind(config, context, {"matrix"} | {kind for kind, on in more.items() if on})
