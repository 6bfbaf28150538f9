"""Greedy texts next to those of transformers on the exported folder."""

import jax
import numpy as np
import pytest
import torch
from finished import make_run
from transformers import AutoModelForCausalLM

from trainit.__main__ import main as trainit_command
from trainit.checkpoints.finished_run import open_run
from trainit.generate.decoder import Decoder
from trainit.generate.parameters import mesh_for
from trainit.generate.sampling import Sampling

MODELS = {
    "GPT-2": {},
    "Llama": {
        **{"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False},
        "num_kv_heads": 2,
    },
}
LENGTHS = (3, 40, 1, 17, 64)


@pytest.mark.evidence("greedy texts are those of `transformers` on the exported model, token for token")
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_transformers(name, penalty, random_dataset, tmp_path):
    make_run(tmp_path / "run", random_dataset, 257, 256, context_length=128, **MODELS[name])
    assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path}/out"]) == 0
    draw = np.random.default_rng(5)
    prompts = [draw.integers(0, 256, size).astype(np.int32) for size in LENGTHS]
    run = open_run(tmp_path / "run", None)
    mesh = mesh_for(run.config.model, jax.devices()[:1])
    made = Decoder(run.config, mesh, "float32", 256, 257).restore(run)
    rows = [(prompt, 0) for prompt in prompts]
    parts = made.generate(rows, 64, Sampling(repetition_penalty=penalty), 0, 16)
    ours = [row[row >= 0].tolist() for row in np.concatenate(list(parts)).T]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        mask = torch.ones_like(ids)
        flags = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 256}
        theirs = model.generate(ids, attention_mask=mask, repetition_penalty=penalty, **flags)
        assert text == theirs[0, len(prompt) :].tolist()
    assert len(set(ours[0])) > 3  # no text of one token
