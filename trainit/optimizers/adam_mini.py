"""Adam-mini, with one mean square for each head, unit or token: Zhang et al. 2024, arXiv 2406.16793."""

import jax
import jax.numpy as jnp
import optax

from trainit.config import ConfigDict
from trainit.parallel.layout import logical_axes
from trainit.parallel.trees import path_name
from trainit.transforms.fields import common_fields

# The logical axes along which each place has a mean square of its own. Any other parameter has one a layer.
OWN = {
    "token_embedding/embedding": {"vocab"},
    "position_embedding/embedding": {"position"},
    "head/kernel": {"vocab"},
    "blocks/attention/query/kernel": {"heads"},
    "blocks/attention/key/kernel": {"kv_heads"},
    "blocks/attention/value/kernel": {"kv_heads", "head_size"},
    "blocks/attention/out/kernel": {"embed"},
    "blocks/mlp/up/kernel": {"mlp"},
    "blocks/mlp/gate/kernel": {"mlp"},
    "blocks/mlp/down/kernel": {"embed"},
    "blocks/attention/query/bias": {"heads"},
    "blocks/attention/key/bias": {"kv_heads"},
}

ELEMENTWISE = True


def get_config() -> ConfigDict:
    return common_fields(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)


def make(config, context) -> optax.GradientTransformation:
    """AdamW whose squares are means: over a head's queries or keys, a unit's inputs, a token's row."""

    def mean_squares(gradients: dict) -> dict:
        def mean(path, g):
            name = path_name(path)
            own = OWN.get(name, set()) | {"layers"}
            axes = [i for i, axis in enumerate(logical_axes(name)) if axis not in own]
            return jnp.mean(g * g, axes, keepdims=True)

        return jax.tree.map_with_path(mean, gradients)

    def init(params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, mean_squares(zeros))

    def update(gradients, state: optax.ScaleByAdamState, params=None):
        count = state.count + 1
        t = count.astype(jnp.float32)
        mu = optax.tree.update_moment(gradients, state.mu, config.beta1, 1)
        nu = optax.tree.update_moment(mean_squares(gradients), state.nu, config.beta2, 1)
        correct1, correct2 = 1 - config.beta1**t, 1 - config.beta2**t
        direction = jax.tree.map(lambda m, v: m / correct1 / (jnp.sqrt(v / correct2) + config.eps), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return context.descend(optax.GradientTransformation(init, update))
