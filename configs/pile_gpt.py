"""GPT-2 124M on the Pile: the benchmark of the optimizers' laboratory.

What is not set here is as `trainit.config.defaults` and `trainit.config.model` declare it; groups
are replaced as in --config=configs/pile_gpt.py:model=gpt2_medium,optimizer=sgdm,schedule=cosine
"""

from trainit import optimizers
from trainit.config import MODELS, SCHEDULES, choose, command_line, defaults


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 50_000  # optimizer steps
    config.batch_size = 128  # sequences of 1024 tokens per step
    config.clip_norm = 10.0  # global l2 norm
    config.model = MODELS["gpt2"]()  # dim 768, 12 heads, 12 blocks, context 1024, untied head, no dropout
    config.optimizer = optimizers.choices()["adamw"]()  # learning rate 1e-3, weight decay 0.1
    config.schedule = SCHEDULES["linear"]()
    config.schedule.warmup = "10%"  # 5,000 of 50,000 steps
    return choose(config, arg, optimizer=optimizers.choices())


if __name__ == "__main__":
    command_line.refuse(__file__, "train --config=")
