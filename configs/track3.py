"""The optimization track of modded-nanoGPT: a fixed model, data and batch, and any optimizer.

    trainit train --config=configs/track3.py                 Muon and AdamW as tuned in June 2026
    trainit train --config=configs/track3.py:optimizer=soap  another one for the matrices of the blocks

What counts is after how many steps the validation loss is below 3.28. The data are the first 2 billion tokens
of FineWeb as .bin files, which the track's own script loads into data/fineweb10B. What the track fixes, with
its sources, is in docs/how-to/track3.md.
"""

from trainit import optimizers
from trainit.config import MODELS, SCHEDULES, choose, command_line, defaults

ROWS, LENGTH = 512, 1024
# The track takes sums of the loss over a batch, and Trainit means: this is 1e-10 there.
EPS = 1e-10 / (ROWS * LENGTH)
ADAM = f"optimizer=adamw beta1=0.8 beta2=0.95 eps={EPS} weight_decay=0.001"
GROUPS = (  # by AdamW, each at a rate of its own
    f".*/(bias|scale) learning_rate=0.015 {ADAM}",
    f"token_embedding/embedding learning_rate=0.7 {ADAM}",
    f"head/kernel learning_rate=0.004 {ADAM}",
)
MODEL = {
    **{"dim": 768, "num_heads": 6, "num_blocks": 12, "context_length": LENGTH, "vocab_size": 50304},
    **{"norm": "rmsnorm", "norm_scale": "blocks", "embedding_norm": True, "norm_epsilon": 2**-23},
    **{"qk_norm": True, "activation": "relu2", "head_bias": True, "init": "zero_outputs"},
    # Frequencies there are 1024^(-i / 31), in 32 of the 64 pairs of a head; here theta^(-i / 32).
    **{"positions": "rope", "rotary_fraction": 0.5, "rope_theta": 1024 ** (32 / 31), "attention_scale": 0.12},
    **{"logit_softcap": 15.0, "softcap_form": "rsqrt"},
}


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 3250
    config.batch_size = ROWS
    config.clip_norm = 0.0
    config.model = MODELS["gpt2"](**MODEL)
    config.dataset.update(path="data/fineweb10B", tokenizer="gpt2", order="sequential", whole_batches=True)
    config.eval.update(every_steps=125, sequences=20 * ROWS, first=True)
    config.schedule = SCHEDULES["trapezoid"]()
    config.schedule.update(warmup=0, decay="70%")
    config.parameter_groups = GROUPS
    config.optimizer = optimizers.choices()["muon"]()
    config.optimizer.update(
        learning_rate=0.025,
        weight_decay=0.05,
        nesterov=True,
        ns_coefficients="convergent",
        ns_steps=12,
        ns_eps=1e-7 / (ROWS * LENGTH * (1 - 0.95)),
    )
    return choose(config, arg, optimizer=optimizers.choices())


if __name__ == "__main__":
    command_line.refuse(__file__, "train --config=")
