"""Exported models next to transformers: logits, tokens, files."""

import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizers as library
import torch
import transformers
from finished import make_run, random_params
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainit.__main__ import main as trainit_command
from trainit.checkpoints.convert import families, weights
from trainit.cluster.files import write_json
from trainit.config import defaults, resolve
from trainit.model.gpt import GPT
from trainit.parallel.trees import path_name
from trainit.prepare.demo import write_dataset
from trainit.tokenizers import SentencePieceTokenizer, find

MODERN = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False}
PYTHIA = {
    **{"positions": "rope", "rotary_fraction": 0.25, "parallel_residual": True, "activation": "gelu_exact"},
    "num_heads": 2,
}
SCALED = {  # some frequencies stay, some are divided, some lie between
    **{"rope_scaling.factor": 8.0, "rope_scaling.original_context": 16, "rope_theta": 100.0},
    **{"rope_scaling.low_frequency_factor": 0.5, "rope_scaling.high_frequency_factor": 2.0},
}
OLMO = {**MODERN, "norm_placement": "after", "qk_norm": True, "qk_norm_over_heads": True}
GEMMA = {
    **{**MODERN, "activation": "geglu", "norm_placement": "both", "norm_unit_offset": True},
    **{"embedding_scale": 0.0, "window": 7, "window_layers": "::2", "attention_softcap": 3.0},
    **{"attention_scale": 5**-0.5, "logit_softcap": 4.0, "head_dim": 12},
}
MODELS = {
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-2, tied": ("GPT2LMHeadModel", {"tied_embeddings": True, "mlp_dim": 72}),
    "GPT-2, exact GELU": ("GPT2LMHeadModel", {"activation": "gelu_exact", "norm_epsilon": 0.1}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"positions": "rope", "rope_theta": 500.0}),
    "GPT-NeoX, Pythia": ("GPTNeoXForCausalLM", PYTHIA),
    "GPT-NeoX, tied": ("GPTNeoXForCausalLM", {**PYTHIA, "tied_embeddings": True, "norm_epsilon": 0.1}),
    "Llama": ("LlamaForCausalLM", {**MODERN, "num_kv_heads": 2, "rope_theta": 500_000.0}),
    "Llama, biases, tied": ("LlamaForCausalLM", {**MODERN, "use_bias": True, "tied_embeddings": True}),
    "Llama 3": ("LlamaForCausalLM", {**MODERN, **SCALED, "num_kv_heads": 2, "norm_epsilon": 0.1}),
    "Qwen2": ("Qwen2ForCausalLM", {**MODERN, "qkv_bias": True, "num_kv_heads": 2}),
    "Qwen2, tied": ("Qwen2ForCausalLM", {**MODERN, "qkv_bias": True, "tied_embeddings": True}),
    "Mistral": ("MistralForCausalLM", {**MODERN, "num_kv_heads": 2, "head_dim": 12, "window": 7}),
    "Mistral, tied": ("MistralForCausalLM", {**MODERN, "window": 1, "tied_embeddings": True}),
    "Qwen2, windows": (
        "Qwen2ForCausalLM",
        {**MODERN, "qkv_bias": True, "window": 5, "window_layers": "1:", "num_blocks": 3},
    ),
    "Qwen3, windows": ("Qwen3ForCausalLM", {**MODERN, "qk_norm": True, "window": 9, "window_layers": "0"}),
    "OLMo 2": ("Olmo2ForCausalLM", {**OLMO, "num_kv_heads": 2}),
    "OLMo 2, tied": ("Olmo2ForCausalLM", {**OLMO, **SCALED, "tied_embeddings": True, "norm_epsilon": 0.1}),
    "Gemma 2": ("Gemma2ForCausalLM", {**GEMMA, "num_kv_heads": 2, "tied_embeddings": True}),
    "Gemma 2, no caps": (
        "Gemma2ForCausalLM",
        {**GEMMA, "attention_softcap": 0.0, "logit_softcap": 0.0, "window": 0, "norm_epsilon": 0.1},
    ),
    "Qwen3": ("Qwen3ForCausalLM", {**MODERN, "qk_norm": True, "num_kv_heads": 1}),
    "Qwen3, own head size, tied": (
        "Qwen3ForCausalLM",
        {**MODERN, **SCALED, "qk_norm": True, "head_dim": 12, "tied_embeddings": True, "norm_epsilon": 0.1},
    ),
}


def logits_there(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.evidence(
    "an exported model has the same logits in `transformers`, to 1e-5 of their spread, in each family"
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(name, tmp_path):
    architecture, fields = MODELS[name]
    config = tiny.get_config()
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.model.update_from_flattened_dict(fields)
    model = resolve(config, 257, 256).model
    params = random_params(GPT(model).init(jax.random.key(0)))
    # What the command writes of a checkpoint.
    family = families.find(model)
    assert family.architecture == architecture
    by_path = {path_name(path): array for path, array in jax.tree.leaves_with_path(params)}
    groups = families.groups(list(by_path), family)
    parts = (families.tensors(family, {path: by_path[path] for path in group}, 257) for group in groups)
    weights.write(tmp_path, parts, "float32")
    write_json(tmp_path / "config.json", families.config_json(family, model, 257, 256, "float32"))

    if transformers.__version__.startswith("4.") and name == "OLMo 2, tied":
        with pytest.raises(ValueError, match="`rope_scaling` must be a dictionary"):
            logits_there(tmp_path, np.zeros((1, 1), np.int64))
        return  # that version has no scaling of RoPE in this family, and says so
    ids = np.random.default_rng(1).integers(0, 257, (3, 32))
    expected = np.asarray(jax.jit(GPT(model))(params, ids))[..., :257]
    actual = logits_there(tmp_path, ids)
    assert actual.shape == expected.shape  # rows that pad the vocabulary are no tokens
    assert np.abs(actual - expected).max() <= 1e-5 * np.ptp(expected)


def test_several_files_have_an_index(random_dataset, tmp_path, monkeypatch):
    make_run(tmp_path / "run", random_dataset, 257, 256)
    ids = np.random.default_rng(1).integers(0, 257, (2, 32))
    for name, size in (("one", 1 << 30), ("many", 20_000)):
        monkeypatch.setattr(weights, "SHARD_BYTES", size)
        assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path / name}"]) == 0
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    sizes = 0
    for file in files:
        with safe_open(tmp_path / "many" / file, "np") as content:
            sizes += sum(content.get_tensor(key).nbytes for key in content.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sizes
    np.testing.assert_array_equal(logits_there(tmp_path / "one", ids), logits_there(tmp_path / "many", ids))


def test_bfloat16_is_the_rounded_model(random_dataset, tmp_path):
    params, _ = make_run(tmp_path / "run", random_dataset, 257, 256)
    flags = [f"--output={tmp_path}/out", "--dtype=bfloat16"]
    assert trainit_command(["export", str(tmp_path / "run"), *flags]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    expected = torch.from_numpy(params["head"]["kernel"].T[:257].copy()).bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


TEXTS = (
    "Some words, and more of them: 1, 2, 3.\n\n\tdef f(x):\n        return x**2  # indented\r\n",
    "  two spaces before,   three between, and two behind  ",
    "Ελληνικά και русский текст, 汉字文本。한국어 텍스트, हिन्दी पाठ, עברית. 😀👍🏽 e\u0301 ﬁ",
    "don't stop; it's 10:30, $1,234.56 & 100%! http://a.b/c?d=e_f#g",
)


def tokenizer_file(kind: str, folder: Path) -> str:
    """The choice of a tokenizer of this kind, whose file is made here."""
    lines = [*TEXTS, *(" ".join(TEXTS).split(" "))] * 3
    if kind in ("bytes", "gpt2"):
        return kind
    if kind == "own":
        (folder / "t.model").write_bytes(SentencePieceTokenizer.train(lines, 500).serialize())
    elif kind.startswith(("bpe", "unigram")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind.split()[0],
            vocab_size=500,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix="prefix" in kind,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / "t.model").write_bytes(model.getvalue())
    else:
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>"]
        trainer = library.trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet
        )
        made.train_from_iterator(lines, trainer)
        made.save(str(folder / "t.json"))
        return f"tokenizers:{folder}/t.json"
    return f"sentencepiece:{folder}/t.model"


KINDS = ("bytes", "gpt2", "own", "bpe", "bpe with prefix", "unigram", "unigram with prefix", "byte-level")


@pytest.mark.evidence("an exported tokenizer gives the same ids, and the text back, in `transformers`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
def test_tokens_are_the_same(kind, family, tmp_path):
    choice = tokenizer_file(kind, tmp_path)
    tokenizer = find(choice)
    write_dataset(tmp_path / "data", tokenizer, {"train": TEXTS, "validation": TEXTS})
    make_run(
        tmp_path / "run", tmp_path / "data", tokenizer.vocab_size, tokenizer.end_of_text, **MODELS[family][1]
    )
    assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path}/out"]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode([text])[0].tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == ids  # nothing is put around it
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=8"], r"has no checkpoint of step 8; there are \[7\]"),
        (["--output="], "--output=FOLDER is missing"),
        (["--output={}/run"], "run exists already"),
        (["--tokenizer=gpt2"], "has 50257 ids and the model 384"),
    ],
)
def test_what_cannot_be_exported(flags, message, random_dataset, tmp_path, capsys):
    make_run(tmp_path / "run", random_dataset, 257, 256)
    capsys.readouterr()
    given = [f"--output={tmp_path}/out", *(flag.format(tmp_path) for flag in flags)]
    assert trainit_command(["export", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_no_family_has(random_dataset, tmp_path, capsys):
    make_run(tmp_path / "run", random_dataset, 257, 256, activation="relu2", logit_softcap=15.0)
    assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path}/out"]) == 2
    assert "has model.activation='relu2', model.logit_softcap=15.0 together" in capsys.readouterr().err


def test_no_family_has_the_parts_of_the_optimization_track():
    for name, value in {"norm_scale": "blocks", "embedding_norm": True, "softcap_form": "rsqrt"}.items():
        config = defaults()
        config.model.update({name: value, "logit_softcap": 15.0, "head_dim": 64, "num_kv_heads": 12})
        for family in families.FAMILIES:
            assert f"{name}={value!r}" in family.unmet(config.model)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """The library's own error, as of a full disk, does not name it."""
    (tmp_path / "0.unnamed").mkdir()
    with pytest.raises(OSError, match=r"Error while serializing: .*/0\.unnamed'"):
        weights.write(tmp_path, [{"a": np.zeros(4, np.float32)}], "float32")


def test_a_line_that_a_crash_left_unfinished(random_dataset, tmp_path):
    """The model card has the newest whole validation up to the checkpoint's step."""
    make_run(tmp_path / "run", random_dataset, 257, 256)
    lines = [json.dumps({"step": step, "valid/loss": 5.0 - step / 4}) for step in (0, 4, 8)]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "valid/lo']))
    assert trainit_command(["export", str(tmp_path / "run"), f"--output={tmp_path}/out"]) == 0
    assert (
        "| validation | loss 4.0000 nats per token, after 4 steps |"
        in (tmp_path / "out/README.md").read_text()
    )
