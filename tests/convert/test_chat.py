"""Conversations next to transformers: the same ids, the same tokens of the assistant, the same losses."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from chats import CALLS, LLAMA, LLAMA_BLOCKS, PLAIN, QWEN, QWEN_BLOCKS, TOOLS, drawn, write_tokenizer

from trainit import tokenizers
from trainit.checkpoints.convert.pretrained import Pretrained
from trainit.config import resolve
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.tokenizers.chat import conversation, marks, template
from trainit.tokenizers.chat.encode import encode
from trainit.train import step

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
CONVERSATIONS = [(messages, None) for messages in [*PLAIN, *drawn(6, 3)]]


def theirs(folder, messages, tools, source=None) -> tuple[list[int], list[int]]:
    """What transformers makes of a conversation, and its mask of what the assistant writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = tokenizer.apply_chat_template(
        messages, tools, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], made["assistant_masks"]


@pytest.mark.evidence("conversations: ids and the assistant's tokens are those of `transformers`")
@pytest.mark.parametrize(
    ("source", "blocks"), [(LLAMA, LLAMA_BLOCKS), (QWEN, QWEN_BLOCKS)], ids=["Llama", "Qwen"]
)
def test_the_same_ids_and_the_same_mask(source, blocks, tmp_path):
    """With the template's blocks; and what is found without them is what blocks around it would mark."""
    for name, own in (("with", blocks), ("without", source)):
        choice = write_tokenizer(tmp_path / name, own)
        tokenizer, (settings, _) = tokenizers.find(choice), template.settings("", choice, "2024-07-26")
        for messages, tools in [*CONVERSATIONS, *([(CALLS, TOOLS)] if source == QWEN else [])]:
            marked = encode(conversation.checked(messages, tools), tokenizer, settings)
            ids, mask = theirs(tmp_path / name, messages, tools, blocks)
            assert marks.ids_of(marked).tolist() == ids
            assert (marked < marks.IGNORED).astype(int).tolist() == mask
            assert 0 < sum(mask) < len(mask)


@pytest.mark.evidence("conversations: losses are those of `transformers` with other labels ignored")
def test_the_same_loss(tmp_path):
    """A row of several conversations next to each of them alone, with labels of -100 as TRL sets them."""
    folder = tmp_path / "model"
    choice = write_tokenizer(folder, LLAMA)
    tokenizer, (settings, _) = tokenizers.find(choice), template.settings("", choice, "2024-07-26")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    about = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, **sizes)
    model = transformers.LlamaForCausalLM(about).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)

    row, nats, count, texts = [], 0.0, 0, [messages for messages, _ in CONVERSATIONS[:6]]
    for messages in texts:
        ids, mask = theirs(folder, messages, None, LLAMA_BLOCKS)
        labels = torch.tensor([[i if own else -100 for i, own in zip(ids, mask, strict=True)]])
        with torch.no_grad():
            nats += float(model(torch.tensor([ids]), labels=labels).loss) * sum(mask)
        count += sum(mask)
        row.append(encode(conversation.checked(messages, None), tokenizer, settings))
    row = np.concatenate(row)[None, None]

    config = tiny.get_config()
    config.checkpoint.load_path = f"hf:{folder}"
    pretrained = Pretrained(config.checkpoint.load_path)
    config.model = tiny.model(context_length=row.shape[2] - 1, remat="none", scan_layers=True)
    config.mesh.update(ONE)
    pretrained.fill(config)
    config.model.update(document_mask=True, end_of_text=marks.END)
    config = resolve(config, tokenizer.vocab_size, tokenizer.end_of_text)
    mesh = make_mesh(ONE, jax.devices()[:1])
    steps = step.build(config, shape_on(config, mesh))
    params = pretrained.parameters(steps.abstract_state.params)
    batch = {"tokens": row, "lengths": np.full((1, 1), row.shape[2] - 1, np.int32)}
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in batch.items()}
    sums = steps.evaluate(params, batch, np.zeros(config.model.vocab_size, np.int32), 1)
    assert int(sums["count"][0]) == count
    np.testing.assert_allclose(sums["loss"][0], nats, rtol=2e-5)
