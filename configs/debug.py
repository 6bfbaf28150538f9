"""A small GPT on presidents' messages: three minutes on a laptop, over eight virtual devices."""

from trainit import optimizers
from trainit.config import SCHEDULES, choose, command_line, dataset, defaults, model


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 250  # optimizer steps
    config.batch_size = 16  # sequences of 128 tokens per step
    config.device_batch_size = 0
    config.clip_norm = 1.0  # global l2 norm
    config.precision = "float32"
    config.platform = "cpu"
    config.cpu_devices = 8
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.model = model(
        dim=192,
        num_heads=6,
        num_blocks=4,
        context_length=128,
        norm="rmsnorm",
        activation="swiglu",
        positions="rope",
        use_bias=False,
        tied_embeddings=True,
    )
    config.optimizer = optimizers.choices()["adamw"]()
    config.optimizer.learning_rate = 3e-3
    config.schedule = SCHEDULES["linear"]()
    config.dataset = dataset("demo")
    config.eval.every_steps = 50
    config.eval.sequences = 128
    config.checkpoint.save_steps = 50
    return choose(config, arg, optimizer=optimizers.choices())


if __name__ == "__main__":
    command_line.refuse(__file__, "train --config=")
