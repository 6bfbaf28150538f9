"""The smallest run that has everything: a config file for tests."""

from trainit import optimizers
from trainit.config import SCHEDULES, choose, dataset, defaults, model


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 40
    config.batch_size = 16
    config.device_batch_size = 2  # two micro-steps
    config.precision = "float32"
    config.platform = "cpu"
    config.cpu_devices = 8
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.model = model(dim=32, num_heads=4, num_blocks=2, context_length=32, attn_dropout=0.1)
    # What compiles fastest; the choices of "auto" have tests of their own.
    config.logits_mib = 256.0
    config.model.update(remat="none", scan_layers=True)
    config.optimizer = optimizers.choices()["adamw"]()
    config.optimizer.learning_rate = 1e-2
    config.schedule = SCHEDULES["cosine"]()
    config.dataset = dataset("set by the test")
    config.eval.every_steps = 10
    config.eval.sequences = 40
    config.checkpoint.save_steps = 3
    config.checkpoint.keep = 3
    return choose(config, arg, optimizer=optimizers.choices())
