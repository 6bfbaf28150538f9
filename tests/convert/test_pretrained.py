"""Models that transformers made, read in: logits, training, written out again, damaged folders."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizers as library
import torch
import transformers
from processes import FAST, ROOT, run
from safetensors.numpy import load_file, save_file

from trainit.__main__ import main as trainit_command
from trainit.checkpoints.convert import pretrained as reading
from trainit.checkpoints.convert.pretrained import Pretrained
from trainit.config import SCHEDULES, ConfigError, resolve
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.train import step

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
NEOX = {**SIZES, "intermediate_size": 64}
SCALED = {
    **{"rope_type": "llama3", "rope_theta": 100.0, "original_max_position_embeddings": 16, "factor": 8.0},
    **{"low_freq_factor": 0.5, "high_freq_factor": 2.0},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "GPT-2": ("GPT2", {**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "GPT-2, untied": ("GPT2", {**GPT2, "n_inner": 72, "tie_word_embeddings": False}),
    "GPT-NeoX": ("GPTNeoX", {**NEOX, "num_attention_heads": 2}),  # as Pythia
    "GPT-NeoX, sequential": (
        "GPTNeoX",
        {**NEOX, "rotary_pct": 1.0, "hidden_act": "gelu_new", "use_parallel_residual": False},
    ),
    "Llama": ("Llama", {**LLAMA, "rope_theta": 500.0}),
    "Llama, tied": (
        "Llama",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "Llama 3": ("Llama", {**LLAMA, "rope_parameters": SCALED}),
    "Qwen2": ("Qwen2", {**LLAMA, "rms_norm_eps": 1e-6}),
    "Qwen2, windows": (
        "Qwen2",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "OLMo 2": ("Olmo2", LLAMA),
    "Gemma 2": (
        "Gemma2",
        {**LLAMA, "head_dim": 12, "sliding_window": 9, "query_pre_attn_scalar": 5},
    ),
    "Mistral": ("Mistral", {**LLAMA, "sliding_window": 9, "head_dim": 12}),
    "Qwen3": ("Qwen3", {**LLAMA, "head_dim": 12}),
}


def make_folder(name: str, folder: Path, rows: int = 384) -> torch.nn.Module:
    """A folder with a model of random weights and a tokenizer of at most 300 ids; the model."""
    kind, fields = MODELS[name]
    if transformers.__version__.startswith("4.") and "rope_parameters" in fields:  # which 5 has instead
        scaling = dict(fields["rope_parameters"])
        theta = scaling.pop("rope_theta")
        fields = {"rope_theta": theta, "rope_scaling": scaling, **fields}
        del fields["rope_parameters"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=rows, eos_token_id=0, **fields)
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + ending)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for array in model.parameters():
            array.add_(torch.randn_like(array) * 0.1)
    model.save_pretrained(folder)
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = library.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["some words and more words"] * 9, trainer)
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return model


def build(folder: Path, sizes: dict[str, int]):
    """The steps of a run that begins from a folder, its first state, and its config."""
    config = tiny.get_config()
    config.model.update(dim=768, num_heads=12, num_blocks=12, context_length=1024, attn_dropout=0.0)  # open
    config.checkpoint.load_path = f"hf:{folder}"
    config.mesh.update(sizes)
    config.schedule = SCHEDULES["constant"]()
    config.schedule.warmup = 0
    config.clip_norm = 0.0
    pretrained = Pretrained(config.checkpoint.load_path)
    pretrained.fill(config)
    config = resolve(config, 300, 0)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    steps = step.build(config, shape_on(config, make_mesh(sizes, devices)))
    state = steps.begin(pretrained.parameters(steps.abstract_state.params))
    return steps, state, config


@pytest.mark.evidence(
    "models that `transformers` made have the same logits here, and are written back bit for bit"
)
@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again(name, tmp_path, capsys):
    model = make_folder(name, tmp_path / "there")
    assert trainit_command(["import", str(tmp_path / "there"), f"--output={tmp_path}/run"]) == 0
    assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path}/out"]) == 0
    capsys.readouterr()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["context_length"] == 64

    before, after = (load_file(tmp_path / of / "model.safetensors") for of in ("there", "out"))
    rows = {array.shape[0] for array in before.values()}
    assert 384 in rows
    for key, array in after.items():  # the export cuts off rows of ids that the tokenizer lacks
        np.testing.assert_array_equal(array, before[key][: len(array)], err_msg=key)
    assert before.keys() == after.keys()

    pretrained = Pretrained(f"hf:{tmp_path}/there")
    gpt = GPT(tiny_config(tmp_path / "there").model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(gpt.init, jax.random.key(0))
    layout = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    ids = np.random.default_rng(1).integers(0, 384, (2, 64))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    actual = np.asarray(gpt(pretrained.parameters(layout), ids))
    assert np.abs(actual - expected).max() <= 1e-5 * np.ptp(expected)


def tiny_config(folder: Path):
    config = tiny.get_config()
    config.model.update(dim=768, num_heads=12, num_blocks=12, context_length=1024)
    Pretrained(f"hf:{folder}").fill(config)
    config.mesh.update(ONE)
    return resolve(config, 300, 0)


def torch_losses(model: torch.nn.Module, tokens: np.ndarray, rate: float, decay: float) -> list[float]:
    """Of steps of torch's AdamW, which decays matrices alone."""
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8), []
    for rows in torch.from_numpy(tokens.astype(np.int64)):
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.evidence(
    "ten steps from a model of `transformers` have the losses of torch's AdamW there, on any mesh"
)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_training_is_that_of_torch(name, tmp_path):
    model = make_folder(name, tmp_path)
    tokens = np.random.default_rng(2).integers(0, 384, (10, 16, 65)).astype(np.uint16)
    expected = torch_losses(model, tokens, 1e-2, 0.1)
    for sizes in (ONE, {**ONE, "fsdp": 4, "tensor": 2}):
        steps, state, config = build(tmp_path, sizes)
        layout = batch_sharding(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))
        losses = []
        for batch in tokens.reshape(10, 16 // config_rows(config, sizes), -1, 65):
            lengths = np.full(batch.shape[:2], 64, np.int32)
            arrays = jax.device_put({"tokens": batch, "lengths": lengths}, layout)
            state, metrics = steps.train(state, arrays)
            losses.append(float(metrics["train/loss"]))
        np.testing.assert_allclose(losses, expected, rtol=1e-4)


def config_rows(config, sizes: dict[str, int]) -> int:
    """Rows of a micro-step."""
    return min(config.batch_size, config.device_batch_size * sizes["data"] * sizes["fsdp"])


def damage(folder: Path, what: str) -> None:
    """Changes a folder with a model so that it cannot be read as one."""
    weights, about = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    arrays = load_file(weights)
    match what:
        case "no config":
            (folder / "config.json").unlink()
            return
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            weights.unlink()
        case "no safetensors":
            weights.write_bytes(b"PK not a file of safetensors" * 9)
        case "an array less":
            del arrays["model.layers.1.mlp.up_proj.weight"]
        case "an array more":
            arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        case "a shard less":
            index = {"weight_map": dict.fromkeys(arrays, "model-00001-of-00002.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case _:
            about.update(json.loads(what))
    if what.startswith("an array"):
        save_file(arrays, weights)
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", r"config\.json: No such file"),
        ("cut", r"model\.safetensors has [\d,]+ bytes, and by its header [\d,]+: it is cut"),
        ("no weights", "has neither model.safetensors nor"),
        ("no safetensors", "is no safetensors file"),
        ("an array less", r"lacks model\.layers\.1\.mlp\.up_proj\.weight, which is blocks/mlp/up/kernel"),
        ("an array more", r"has no place for: model\.layers\.0\.self_attn\.q_proj\.bias"),
        ("a shard less", r"model-00001-of-00002\.safetensors: No such file"),
        ('{"vocab_size": 512}', r"weight has the shape \[384, 32\], .* of \[(512, 32|32, 512)\]"),
        ('{"model_type": "mamba"}', "model_type='mamba' is not known; there are gemma2, gpt2, "),
        ('{"rms_norm_eps": 0.25, "hidden_act": "relu"}', "hidden_act='relu' is not known"),
        ('{"num_hidden_layers": null}', r"config\.json: model\.num_blocks=None must be a whole number"),
        ('{"quantization_config": {"bits": 4}}', "quantization_config=.* is not known"),
    ],
)
def test_a_damaged_folder_is_one_line(what, message, tmp_path, capsys):
    make_folder("Llama", tmp_path / "there")
    damage(tmp_path / "there", what)
    capsys.readouterr()
    assert trainit_command(["import", str(tmp_path / "there"), f"--output={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_the_config_says_must_agree(tmp_path):
    """What is left open is filled in; the context may be shorter, and with RoPE longer."""
    make_folder("Llama", tmp_path)
    pretrained = Pretrained(f"hf:{tmp_path}")
    config = tiny.get_config()
    config.checkpoint.load_step = 5
    with pytest.raises(ConfigError, match=r"checkpoint.load_step=5: the model in .* has no steps"):
        pretrained.fill(config)
    config.checkpoint.load_step = -1
    with pytest.raises(ConfigError, match=r"model.num_heads=3, but the model in .* has 4; leave it out"):
        config.model.num_heads = 3
        pretrained.fill(config)
    config.model.update(num_heads=4, context_length=96)
    pretrained.fill(config)
    assert config.model.context_length == 96
    assert config.model.num_kv_heads == 2
    assert config.model.norm == "rmsnorm"


@pytest.mark.parametrize("stacked", [True, False])
def test_each_part_of_a_parameter_is_read_once(stacked, monkeypatch):
    """Whatever the number of devices that have it; what is read at once is a part, not the array."""
    whole = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "context": 1})
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    read, sizes = reading._read, []

    def count(*arguments):
        part = read(*arguments)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(reading, "_read", count)
    leaf = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=layout)
    found = reading._array(leaf, list(whole) if stacked else [whole], stacked)
    np.testing.assert_array_equal(found, whole)
    assert sizes == [whole.size // 4] * 4


@pytest.mark.parametrize("stacked", [True, False])
def test_pages_of_files_are_given_back(stacked, tmp_path):
    """What has been read of a file counts as memory of the process, and would add up to the whole model."""
    whole = np.random.default_rng(0).standard_normal((4, 512, 1024)).astype(np.float32)
    save_file({"x": whole}, tmp_path / "model.safetensors")
    view = reading.tensor_files.views(tmp_path)["x"]

    def resident_kb() -> int:
        parts = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        (own,) = (part for part in parts if str(tmp_path) in part)
        return int(re.search(r"^Rss:\s+(\d+)", own, re.MULTILINE)[1])

    assert view.sum() == whole.sum()
    assert resident_kb() >= whole.nbytes // 1024
    index = (slice(1, 3), slice(None), slice(None))
    found = reading._read(list(view) if stacked else [view], stacked, index)
    np.testing.assert_array_equal(found, whole[index])
    assert resident_kb() == 0


def test_a_run_from_a_folder(random_dataset, tmp_path, capsys):
    """The command, with data of another tokenizer and with its own; the run resumes by itself."""
    make_folder("Llama", tmp_path / "there")
    text = "".join(json.dumps({"text": f"{i} more words " * 20}) + "\n" for i in range(200))
    (tmp_path / "a.jsonl").write_text(text)
    load = f"--config.checkpoint.load_path=hf:{tmp_path}/there"
    prepare = ["prepare", f"--input={tmp_path}/a.jsonl", "--validation_fraction=0.2"]
    own = f"--tokenizer=tokenizers:{tmp_path}/there/tokenizer.json"
    assert trainit_command([*prepare, own, f"--output={tmp_path}/data"]) == 0
    sizes = {"dim": 768, "num_heads": 12, "num_blocks": 12, "context_length": 32}  # open, but the last
    command = [f"--config={ROOT}/tests/tiny.py", f"--workdir={tmp_path}/run", load, "--config.steps=2"]
    command += [f"--config.model.{name}={size}" for name, size in sizes.items()]
    output = run(*command, f"--config.dataset.path={random_dataset}", expect=2)
    assert "the data's tokenizer (bytes, vocabulary 257" in output
    output = run(*command, f"--config.dataset.path={tmp_path}/data", XLA_FLAGS=FAST)
    assert f"with parameters of hf:{tmp_path}/there, new optimizer" in output
    output = run(*command, f"--config.dataset.path={tmp_path}/data", XLA_FLAGS=FAST)
    assert "all 2 steps are done; nothing to do" in output
