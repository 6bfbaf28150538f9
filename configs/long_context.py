"""A modern 124M model on sequences of 131,072 tokens, each of which eight devices share.

Longer or shorter ones: --config.model.context_length and --config.mesh.context; larger models as in
--config=configs/long_context.py --config.model.dim=2048 --config.model.num_heads=16
"""

from trainit import optimizers
from trainit.config import MODELS, SCHEDULES, choose, command_line, defaults


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 10_000  # optimizer steps
    config.batch_size = 8  # sequences of 131,072 tokens per step, together 1,048,576
    config.device_batch_size = 1
    config.clip_norm = 1.0  # global l2 norm
    config.mesh.update(data=-1, fsdp=1, context=8)  # with 8 devices of a host along context
    config.model = MODELS["modern"]()
    config.model.context_length = 131_072
    config.model.rope_theta = 5e6  # so that the slowest pair of a head turns less than once in a sequence
    config.model.num_kv_heads = 4  # a third of the keys and values, which travel between devices
    config.model.document_mask = True
    config.optimizer = optimizers.choices()["adamw"]()  # learning rate 1e-3, weight decay 0.1
    config.schedule = SCHEDULES["cosine"]()
    config.eval.sequences = 64
    return choose(config, arg, optimizer=optimizers.choices())


if __name__ == "__main__":
    command_line.refuse(__file__, "train --config=")
