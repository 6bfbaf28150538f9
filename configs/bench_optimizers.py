"""Compares the optimizers, each at its best learning rate, over several seeds.

    trainit sweep configs/bench_optimizers.py:small    an hour on two CPU cores
    trainit sweep configs/bench_optimizers.py:medium   one GPU: --sbatch="--gpus-per-node=1"
    trainit sweep configs/bench_optimizers.py:full     GPT-2; --sbatch="--gpus-per-node=8"

The learning rate is chosen with a seed that counts for nothing else, from a grid that grows until the best
is not its last. Everything else of an optimizer is as its authors propose.
"""

from trainit.config import command_line

# Each grid begins around what its authors propose, a factor of two between its values.
RATES = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "sgdm": (0.25, 0.5, 1.0),
    "optax.lion": (2e-4, 4e-4, 8e-4),
    "schedule_free+adamw": (2e-3, 4e-3, 8e-3),
    "sophia": (5e-4, 1e-3, 2e-3),
    "soap": (1e-3, 2e-3, 4e-3),
    "muon": (5e-3, 1e-2, 2e-2),
    "mango": (5e-3, 1e-2, 2e-2),
}
GROUPS = {"schedule_free+adamw": ",schedule=constant"}  # the averaging is its schedule
SIZES = {
    "small": {
        "config": "configs/debug.py",
        "fields": {
            "steps": 200,
            "batch_size": 16,
            "model.dim": 128,
            "model.num_heads": 4,
            "model.num_blocks": 2,
            "model.context_length": 64,
            "cpu_devices": 1,
            "mesh.data": 1,
            "mesh.fsdp": 1,
            "mesh.tensor": 1,
            "eval.every_steps": 25,
            "eval.sequences": 256,
            "checkpoint.save_steps": 0,
        },
    },
    "medium": {
        "config": "configs/pile_gpt.py",
        "fields": {
            "steps": 4_000,
            "batch_size": 128,
            "device_batch_size": 32,
            "model.dim": 512,
            "model.num_heads": 8,
            "model.num_blocks": 6,
            "model.context_length": 512,
            "eval.every_steps": 250,
            "checkpoint.keep": 1,
        },
    },
    "full": {
        "config": "configs/pile_gpt.py",
        "target": 3.28,  # of the modded-nanoGPT optimization track, on FineWeb in GPT-2's tokens
        "fields": {
            "steps": 10_000,
            "batch_size": 512,  # 524,288 tokens
            "device_batch_size": 32,
            "eval.every_steps": 125,
            "eval.sequences": 10_240,
            "checkpoint.keep": 1,
        },
    },
}


def get_sweep(size: str):
    if size not in SIZES:
        raise ValueError(f"no size {size!r}: there are {', '.join(SIZES)}")
    left_out = {"soap"} if size == "small" else {}  # its decompositions take a CPU longer than all the others
    return {
        **SIZES[size],
        "variants": {
            name: {
                "groups": f"optimizer={name}" + GROUPS.get(name, ""),
                "grid": {"optimizer.learning_rate": rates},
            }
            for name, rates in RATES.items()
            if name not in left_out
        },
        "tuning_seeds": [0],
        "extend": True,
        "seeds": [1, 2, 3],
        "baseline": "adamw",
    }


if __name__ == "__main__":
    command_line.refuse(__file__, "sweep ")
