"""What an optimizer's `make(config, context)` gets in addition to its own config."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from trainit.parallel.layout import parameter_kind
from trainit.parallel.trees import path_name
from trainit.transforms.schedules import Schedule


@dataclass(frozen=True)
class Context:
    """What an optimizer may know of its run, and helpers that make an optimizer of a direction.

    A direction is an update before the learning rate and the sign: Adam's m / sqrt(v), for example.
    """

    schedule: Schedule  # step -> learning rate
    steps: int  # of the whole run
    parameters: dict  # shapes and dtypes, nested as the parameters are
    weight_decay: float
    clip_norm: float  # largest global norm of the gradient; 0: no clipping
    key: jax.Array  # for the optimizer's own randomness: uint32 (2,), which checkpoints can hold
    mesh: Mesh | None = None  # None: one device
    decays_vectors: bool = False  # biases and norms' scales, too
    undecayed: frozenset[str] = frozenset()  # kinds of parameters that do not decay

    def by_path(self, function: Callable[[str, str], Any]) -> dict:
        """function(path, kind) for every parameter; the kinds are those of `parameter_kind`."""
        names = jax.tree.map_with_path(lambda path, _: path_name(path), self.parameters)
        return jax.tree.map(lambda name: function(name, parameter_kind(name)), names)

    @property
    def decay_mask(self) -> dict:
        """True where weights decay: matrices, embeddings and the head; by default not biases and scales."""
        return self._decays(self.parameters)

    def _decays(self, tree: dict) -> dict:
        def decays(path, _) -> bool:
            kind = parameter_kind(path_name(path))
            return kind not in self.undecayed and (self.decays_vectors or kind != "vector")

        return jax.tree.map_with_path(decays, tree)

    def clip(self) -> optax.GradientTransformation:
        """Clips the gradient by its global norm. This comes first, before anything else sees the gradient."""

        # Optax chooses between the gradient and the clipped gradient, which keeps both in memory.
        def update(updates, state, params=None):
            return _times(jnp.minimum(1.0, self.clip_norm / optax.tree.norm(updates)), updates), state

        clips = optax.GradientTransformation(optax.init_empty_state, update)
        return clips if self.clip_norm else optax.identity()

    def decay(self) -> optax.GradientTransformation:
        """Adds weight_decay * parameters where `decay_mask` is True. It also works on a part of the tree."""
        return optax.add_decayed_weights(self.weight_decay, self._decays)

    def decay_updates(self, updates: dict, params: dict, step: jax.Array) -> dict:
        """Finished updates less rate * weight_decay * parameters, where `decay_mask` is True."""
        shrink = self.schedule(step) * self.weight_decay
        return jax.tree.map(lambda u, p, own: u - shrink * p if own else u, updates, params, self.decay_mask)

    def descend(
        self, direction: optax.GradientTransformation, decay: str = "decoupled"
    ) -> optax.GradientTransformation:
        """Completes a direction to an optimizer: gradients are clipped before it, the rate comes after.

        With decay "decoupled", weight_decay * parameters is added after the direction (Loshchilov & Hutter
        2017, arXiv 1711.05101), with "coupled" to the clipped gradient before it, and with "own" nowhere,
        since the direction contains it.
        """

        # `step` is the run's. A count kept here would differ from it after a step that was skipped.
        def scale(updates, state, params=None, *, step):
            return _times(-self.schedule(step), updates), state

        both = {"decoupled": (direction, self.decay()), "coupled": (self.decay(), direction)}
        parts = (direction,) if decay == "own" else both[decay]
        last = optax.GradientTransformation(optax.init_empty_state, scale)
        return self.chain(self.clip(), *parts, last)

    def chain(self, *parts: optax.GradientTransformation) -> optax.GradientTransformation:
        """`optax.chain`, in which each update gets the keywords, such as `step`, that its signature names."""
        return optax.chain(*map(by_signature, parts))


def by_signature(part: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same with an update that can be given any keywords, and gets those that its signature names."""
    known = inspect.signature(part.update).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

    def update(updates, state, params=None, **extra_args):
        given = extra_args if takes_all else {k: v for k, v in extra_args.items() if k in known}
        return part.update(updates, state, params, **given)

    return optax.GradientTransformationExtraArgs(part.init, update)


def _times(factor: jax.Array, tree: dict) -> dict:
    return jax.tree.map(lambda u: (factor * u.astype(jnp.float32)).astype(u.dtype), tree)
