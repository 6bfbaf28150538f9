"""Jump trajectory: AdamW for some steps, then Adam on the length of all parameters alone, in turns.

From github.com/ZQZCalin/trainit; no paper describes it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict, field
from trainit.parallel.trees import inner_product
from trainit.transforms.fields import common_fields
from trainit.transforms.moments import scale_by_moments

ELEMENTWISE = True


def get_config() -> ConfigDict:
    config = common_fields(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    config.normal_steps = field(4500, "updates by AdamW that begin a cycle", above=0)
    config.jump_steps = field(500, "updates along the parameters themselves that end it", above=0)
    config.jump_rate = field(1.0, "learning rate of the length, in units of the scheduled one", at_least=0)
    return config


class JumpState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32: updates done
    normal: optax.OptState
    jump: optax.OptState


def make(config, context) -> optax.GradientTransformation:
    """Both optimizers start again from zero moments when their turn comes.

    In a jump x moves to x + d x/|x|, where d is Adam's step for the gradient <g, x/|x|> of the length.
    """
    adam = scale_by_moments(config.beta1, config.beta2, config.eps)
    decay = context.decay()

    def init(params) -> JumpState:
        return JumpState(jnp.zeros((), jnp.int32), adam.init(params), adam.init(jnp.float32(0)))

    def choose(condition, a, b):
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)

    def update(gradients, state: JumpState, params=None):
        new = optax.tree.zeros_like(state)
        turn = state.count % (config.normal_steps + config.jump_steps)
        is_normal = turn < config.normal_steps
        direction, normal = adam.update(gradients, choose(turn == 0, new.normal, state.normal))
        direction, _ = decay.update(direction, decay.init(params), params)
        length = jnp.maximum(optax.tree.norm(params), jnp.finfo(jnp.float32).tiny)
        along = inner_product(gradients, params) / length
        grow, jump = adam.update(along, choose(turn == config.normal_steps, new.jump, state.jump))
        jumped = jax.tree.map(lambda x: config.jump_rate * grow * (x / length), params)
        new_normal, new_jump = choose(is_normal, (normal, state.jump), (state.normal, jump))
        return choose(is_normal, direction, jumped), JumpState(state.count + 1, new_normal, new_jump)

    return context.descend(optax.GradientTransformation(init, update), decay="own")
