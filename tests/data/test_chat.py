"""Conversations as training data: which tokens count, batches prepared and streamed, losses, bad input."""

import hashlib
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny
from chats import CALLS, LLAMA, PLAIN, QWEN, QWEN_BLOCKS, TOOLS, drawn, lines, message, write_tokenizer
from processes import ROOT, TWO, exact, metrics, run_imported

from trainit import tokenizers
from trainit.__main__ import main as trainit_command
from trainit.config import DATASETS, Config, ConfigDict, ConfigError, resolve
from trainit.data import loader, training_data
from trainit.data.dataset import DatasetError, open_dataset
from trainit.data.jsonl import dataset as streaming
from trainit.data.rows.order import Ordered, Sequential
from trainit.model.gpt import GPT
from trainit.parallel.layout import batch_sharding
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.tokenizers import ByteTokenizer
from trainit.tokenizers.chat import conversation, marks, template
from trainit.tokenizers.chat.encode import encode
from trainit.train import step

LENGTH = 32
BYTES = ByteTokenizer().token_bytes()
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def counted(messages, tokenizer, settings, tools=None) -> tuple[list[int], list[bool]]:
    """Ids, and which of them count; checks that the last one alone ends the conversation."""
    marked = encode(conversation.checked(messages, tools), tokenizer, settings)
    assert marks.last(marks.marks_of(marked)).tolist() == [len(marked) - 1]
    return marks.ids_of(marked).tolist(), (marked < marks.IGNORED).tolist()


def test_chatml_of_bytes_by_hand():
    """With a tokenizer that has no special tokens, the marks of ChatML are text."""
    settings, where = template.settings("", "bytes", "2024-07-26")
    assert where == "ChatML"
    parts = [
        (
            "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHé<|im_end|>\n<|im_start|>assistant\n",
            0,
        ),
        ("Größe!<|im_end|>", 1),
        ("\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("<|im_end|>", 1),
        ("\n", 0),
    ]
    said = (
        ("system", "Brief."),
        ("user", "Hé"),
        ("assistant", "Größe!"),
        ("user", "?"),
        ("assistant", ""),
    )
    split = [
        message(role, [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}])
        for role, text in said
    ]
    for messages in [message(*one) for one in said], split:
        ids, counts = counted(messages, ByteTokenizer(), settings)
        assert bytes(ids).decode() == "".join(text for text, _ in parts)
        assert counts == [bool(flag) for text, flag in parts for _ in text.encode()]


@pytest.mark.parametrize(
    ("source", "end"),
    [(LLAMA, "<|eot|>"), (QWEN, "<|im_end|>"), (QWEN_BLOCKS, "<|im_end|>"), ("", "<|im_end|>")],
)
def test_the_assistants_words_and_the_end_of_its_turn_count(source, end, tmp_path):
    """Special tokens are one id each, also in what a user says; nothing is put before or after the text."""
    choice = write_tokenizer(tmp_path / "model", source)
    settings, _ = template.settings("", choice, "2024-07-26")
    tokenizer = tokenizers.find(choice)
    content = json.loads(tokenizer.serialize())
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    for messages in PLAIN:
        ids, counts = counted(messages, tokenizer, settings)
        spoken = [i for i, counts_ in zip(ids, counts, strict=True) if counts_]
        turns = [
            m["content"].strip() if source == LLAMA else m["content"]
            for m in messages
            if m["role"] == "assistant"
        ]
        runs, text = [], []
        for i in spoken:
            if i == special[end]:
                runs.append(tokenizer.decode(text))
                text = []
            else:
                text.append(i)
        assert (runs, text) == (turns, [])
        assert ids.count(special["<|begin|>"]) == (source == LLAMA)


def test_sentencepiece_and_gpt2_find_the_same_parts(tmp_path):
    """Where no library says where tokens lie, their bytes do."""
    from trainit.tokenizers import SentencePieceTokenizer

    settings, _ = template.settings("chatml", "", "2024-07-26")
    for tokenizer in (
        SentencePieceTokenizer.train(["hello world, what is it? "] * 9, 300),
        tokenizers.find("gpt2"),
    ):
        for messages in PLAIN[:2] + PLAIN[3:]:
            ids, counts = counted(messages, tokenizer, settings)
            spoken = tokenizer.decode([i for i, flag in zip(ids, counts, strict=True) if flag])
            assert spoken == "".join(
                m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"
            )


def test_tools_calls_and_days_reach_the_template(tmp_path):
    (tmp_path / "own.jinja").write_text(QWEN + "{{ strftime_now('%d %B %Y') }}{{ eos_token }}")
    choice = write_tokenizer(tmp_path / "model")
    tokenizer = tokenizers.find(choice)
    settings, where = template.settings(str(tmp_path / "own.jinja"), choice, "2020-02-29")
    assert where == str(tmp_path / "own.jinja")
    text = template.of(settings).render(json.loads(conversation.checked(CALLS, TOOLS))["messages"], TOOLS)
    assert (
        '\n{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}<|im_end|>'
        in text
    )
    assert text.endswith("29 February 2020<|im_end|>")
    settings, _ = template.settings("", write_tokenizer(tmp_path / "qwen", QWEN), "2024-07-26")
    ids, counts = counted(CALLS, tokenizer, settings, TOOLS)
    end = tokenizer.end_of_text
    spoken = tokenizer.decode([i for i, flag in zip(ids, counts, strict=True) if flag and i != end])
    assert spoken == '\n<tool_call>\n{"name": "größe", "arguments": {"of": "<é>"}}\n</tool_call>3 m, 4 years.'


REWRITES = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}.{% endfor %}"
BAD = {
    "the messages are missing": {"text": "x"},
    "the messages are no list": {"messages": "x"},
    "the conversation is empty": {"messages": []},
    "message 1 has the role 'robot', which is none of system, user, assistant, tool": [message("robot", "x")],
    "no message is the assistant's": [message("user", "x")],
    "message 1 (user) has a content that is no text": [message("user", {"a": 1}), message("assistant", "x")],
    "message 2 (assistant) has a content that is no text": [message("user", "x"), message("assistant", None)],
    "message 2 is no object": [message("user", "x"), "y"],
    "the tools are no list": {"messages": PLAIN[0], "tools": "x"},
    "the chat template fails: TemplateError: no tools here": {"messages": PLAIN[0], "tools": TOOLS},
}


def settings_of(folder, train: str, validation: str, **changes):
    (folder / "train.jsonl").write_text(train)
    (folder / "validation.jsonl").write_text(validation)
    config = DATASETS["chat"]()
    config.update(path=str(folder / "train.jsonl"), validation_path=str(folder / "validation.jsonl"))
    config.update(tokenizer="bytes", streams=1, window=1, workers=0, **changes)
    return config


@pytest.mark.parametrize("reason", BAD)
def test_a_line_that_is_no_conversation_is_named(reason, tmp_path, capsys):
    """Before a run, in the files to train and to validate on; and where they are prepared."""
    (tmp_path / "own.jinja").write_text(
        "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + template.CHATML
    )
    good, bad = lines(PLAIN), lines([*PLAIN, "", BAD[reason]]).replace('{"messages": ""}', "")
    for train, validation in ((bad, good), (good, bad)):
        config = settings_of(tmp_path, train, validation, template=str(tmp_path / "own.jinja"))
        with pytest.raises(DatasetError) as error:
            streaming.open_files(config, ByteTokenizer(), 0, LENGTH, 0)
        name = "train" if train == bad else "validation"
        assert f"{name}.jsonl: line 6: {reason}" in str(error.value)
        assert "\n" not in str(error.value)
    arguments = [
        f"--input={tmp_path}/validation.jsonl",
        f"--validation={tmp_path}/train.jsonl",
        "--tokenizer=bytes",
    ]
    arguments += ["--chat", f"--template={tmp_path}/own.jinja", f"--output={tmp_path}/data", "--workers=1"]
    assert trainit_command(["prepare", *arguments]) == 1
    assert f"validation.jsonl: line 6: {reason}" in capsys.readouterr().err
    assert trainit_command(["prepare", *arguments, "--on_error=skip", f"--output={tmp_path}/skipped"]) == 0
    assert open_dataset(tmp_path / "skipped").info["broken"]["list"][0][1] == 6


def test_templates_that_cannot_be_used(tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "rewrites.jinja").write_text(REWRITES)
    (tmp_path / "silent.jinja").write_text("{% generation %}{% endgeneration %}{{ messages }}")
    for choice, why in {
        str(tmp_path / "bad.jinja"): "bad.jinja: TemplateSyntaxError",
        str(tmp_path / "none.jinja"): "none.jinja: No such file",
    }.items():
        with pytest.raises(ConfigError, match=why):
            template.settings(choice, "bytes", "2024-07-26")
    with pytest.raises(ConfigError, match="'today'"):
        template.settings("", "bytes", "today")
    for name, why in {
        "rewrites": "another way than without later messages",
        "silent": "nothing would count",
    }.items():
        settings, _ = template.settings(str(tmp_path / f"{name}.jinja"), "bytes", "2024-07-26")
        with pytest.raises(ValueError, match=why):
            encode(conversation.checked(PLAIN[1], None), ByteTokenizer(), settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files, their prepared form in several shards, and the fields of dataset=chat."""
    folder = tmp_path_factory.mktemp("chat")
    config = settings_of(folder, lines(drawn(60, 0) + PLAIN[:2]), lines(drawn(12, 1)))
    arguments = [f"--input={config.path}", f"--validation={config.validation_path}", "--tokenizer=bytes"]
    arguments += ["--chat", f"--output={folder}/data", "--shard_tokens=3000", "--workers=1"]
    assert trainit_command(["prepare", *arguments]) == 0
    assert trainit_command(["verify", f"{folder}/data"]) == 0
    return folder, config


def reference(conversations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ChatML in bytes, written out: ids, which count, and where conversations begin."""
    ids, counts, begins = [], [], []
    for messages in conversations:
        begins.append(len(ids))
        for one in messages:
            head, body = f"<|im_start|>{one['role']}\n".encode(), f"{one['content']}<|im_end|>".encode()
            ids += [*head, *body, *b"\n"]
            counts += [0] * len(head) + [one["role"] == "assistant"] * len(body) + [0]
    return np.array(ids), np.array(counts, bool), np.array(begins)


@pytest.mark.evidence(
    "conversations: the same batches prepared and streamed, with the assistant's tokens marked"
)
def test_prepared_and_streamed_are_the_same_batches(data):
    folder, config = data
    streamed = streaming.open_files(config, ByteTokenizer(), 0, LENGTH, 0)
    prepared = open_dataset(folder / "data")
    assert len(prepared.splits["train"].paths) > 2
    ids, counts, begins = reference(drawn(60, 0) + PLAIN[:2])
    layout = batch_sharding(make_mesh(ONE, jax.devices()[:1]))
    shape, count = (2, 4, LENGTH), len(ids) // (8 * LENGTH)
    source = Ordered(prepared.splits["train"], Sequential(prepared.splits["train"].sequences(LENGTH)))
    ours = loader.batches(source, shape, layout, count=count)
    theirs = streamed.reader(shape, layout).batches(count)
    at = 0
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        assert one["tokens"].dtype == other["tokens"].dtype == source.dtype == streamed.dtype
        for row in np.array(one["tokens"]).reshape(8, -1):
            place = slice(at, at + LENGTH + 1)
            np.testing.assert_array_equal(marks.ids_of(row), ids[place])
            np.testing.assert_array_equal(row < marks.IGNORED, counts[place])
            ends = marks.last(marks.marks_of(row)) + 1 + at
            np.testing.assert_array_equal(ends, begins[(begins > at) & (begins <= at + LENGTH + 1)])
            at += LENGTH
    assert at == count * 8 * LENGTH
    # Validation: the same split, held in memory and on the disk, and the bytes of its text.
    held, stored = streamed.validation, prepared.splits["validation"]
    every = np.arange(held.sequences(LENGTH))
    for mine, other in zip(held.read(every, LENGTH), stored.read(every, LENGTH), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert held.bytes == stored.bytes == len(reference(drawn(12, 1))[0])


def test_conversations_are_left_out_and_put_aside_with_their_marks(tmp_path):
    """Duplicates; and a validation split by hash. What stays is as the reference has it."""
    (tmp_path / "twice.jsonl").write_text(lines(drawn(60, 0) + drawn(9, 0) + drawn(60, 0)[:30]))
    arguments = [f"--input={tmp_path}/twice.jsonl", "--tokenizer=bytes", "--validation_fraction=0.2"]
    arguments += ["--chat", "--deduplicate", f"--output={tmp_path}/data", "--workers=1"]
    assert trainit_command(["prepare", *arguments]) == 0
    assert trainit_command(["verify", f"{tmp_path}/data"]) == 0
    dataset = open_dataset(tmp_path / "data")
    assert dataset.info["duplicates"] >= 30
    # What is compared in the background of a run: all files of all shards, those of the marks among them.
    files = list((tmp_path / "data").glob("*-0*.*"))
    assert {path.suffix for path in files} == {".tokens", ".marks", ".documents", ".bytes", ".subsets"}
    assert dataset.digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    found = {}
    for split in dataset.splits.values():
        starts, _, _ = split.documents(0)
        for begin, end in zip(starts, [*starts[1:], split.tokens], strict=True):
            part = split.shards[0][begin:end]
            found[bytes(marks.ids_of(part).astype(np.uint8))] = (part < marks.IGNORED).tolist()
    for messages in drawn(60, 0):
        ids, counts, _ = reference([messages])
        assert found.pop(bytes(ids.astype(np.uint8))) == counts.tolist()
    assert len(dataset.splits["validation"].documents(0)[0]) > 3


def config_of(folder, **changes):
    config = tiny.get_config()
    config.dataset.path = str(folder / "data")
    config.model.update(attn_dropout=0.0, positions="rope", context_length=LENGTH)
    config.mesh.update(ONE)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return training_data.read(config, config.dataset.path, resolve, folder)


def pieces(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each conversation, or part of one, of rows (n, L + 1): inputs, targets, which count; padded."""
    found = []
    for row in rows:
        ids, begin = marks.ids_of(row).astype(np.int32), 0
        for end in [*marks.last(marks.marks_of(row)), LENGTH]:
            size = min(end + 1, LENGTH) - begin
            if size > 0:
                places = slice(begin, begin + size), slice(begin + 1, begin + 1 + size)
                parts = ids[places[0]], ids[places[1]], row[places[1]] < marks.IGNORED
                found.append([np.pad(part, (0, LENGTH - size)) for part in parts])
            begin = end + 1
    return tuple(np.array(part) for part in zip(*found, strict=True))


@pytest.mark.evidence("conversations: loss and gradient are those of the assistant's tokens, on every mesh")
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_loss_is_the_mean_over_what_the_assistant_writes(sizes, data):
    """Of micro-steps with more and with fewer such tokens, against NumPy on each conversation by itself."""
    folder, _ = data
    sizes = ONE | sizes
    config, read = config_of(folder, device_batch_size=8 // (sizes["data"] * sizes["fsdp"]), mesh=sizes)
    assert (config.model.document_mask, config.model.end_of_text) == (True, marks.END)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    shape, layout = shape_on(config, mesh), batch_sharding(mesh)
    steps = step.build(config, shape)
    state = steps.init()
    params = jax.device_get(state.params)
    batch = next(read.reader(shape.batch_at(0), layout).batches(1))
    of_steps = np.array(batch["tokens"])
    in_steps = (of_steps[..., 1:] < marks.IGNORED).sum((1, 2))
    assert len(set(in_steps)) == len(in_steps) == 2

    # The mean loss, in NumPy from logits; and its gradient, by JAX without masks of documents or targets.
    inputs, targets, own = pieces(of_steps.reshape(16, -1))
    assert len(inputs) > 16
    plain = ConfigDict(config.model.to_dict())
    plain.document_mask = False
    model = GPT(Config(plain))
    logits = np.array(jax.jit(model)(params, inputs), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    count = int(in_steps.sum())

    @jax.jit
    def gradient(params):
        def mean(p):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(p, inputs), targets)
            return (losses * own).sum() / count

        return optax.tree.norm(jax.grad(mean)(params))

    state, found = steps.train(state, batch)
    assert own.sum() == count == int(found["tokens"])
    assert int(found["rows_tokens"]) == 16 * LENGTH
    np.testing.assert_allclose(found["train/loss"], nats[own].sum() / count, rtol=2e-5)
    np.testing.assert_allclose(found["train/accuracy"], (logits.argmax(-1) == targets)[own].mean(), atol=1e-6)
    np.testing.assert_allclose(found["train/grad_norm"], gradient(params), rtol=2e-4)

    # Validation has the same sums. Each token is a byte.
    half = {"tokens": of_steps[:1], "lengths": np.full((1, 8), LENGTH, np.int32)}
    half = {name: jax.device_put(array, layout) for name, array in half.items()}
    sums = steps.evaluate(
        jax.device_put(params, jax.tree.map(lambda x: x.sharding, state.params)), half, BYTES, 1
    )
    inputs, targets, own = pieces(of_steps[0])
    assert int(sums["count"][0]) == int(sums["bytes"][0]) == own.sum() == in_steps[0]
    np.testing.assert_allclose(sums["loss"][0], nats[: len(own)][own].sum(), rtol=2e-5)

    # A batch in which nothing counts is no fault.
    nothing = jax.device_put(of_steps | np.uint32(marks.IGNORED), layout)
    state, found = steps.train(state, {"tokens": nothing, "lengths": batch["lengths"]})
    assert [float(found[f"train/{name}"]) for name in ("loss", "accuracy", "grad_norm", "skipped")] == [0] * 4
    assert np.isfinite(found["train/update_norm"])


@pytest.mark.evidence("conversations: a resume is exact")
def test_a_run_resumes_exactly(data, tmp_path):
    """Streamed, with a worker; its metrics are those of the run that was not stopped."""
    _, config = data
    command = [
        f"--config={ROOT}/tests/tiny.py:dataset=chat",
        *(f"--config.dataset.{name}={config[name]}" for name in ("path", "validation_path", "tokenizer")),
        *("--config.dataset.streams=4", "--config.dataset.window=8", "--config.steps=5"),
        *("--config.eval.every_steps=5", "--config.eval.sequences=16", "--config.dataset.workers=0"),
        *TWO,
    ]
    output = run_imported(*command, f"--workdir={tmp_path}/calm")
    assert "the tokenizer has no <|im_start|> and no <|im_end|>" in output
    shutil.copytree(tmp_path / "calm", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "5")
    assert "resume     at step 3" in run_imported(*command, f"--workdir={tmp_path}/resumed")
    assert exact(metrics(tmp_path / "resumed")) == exact(metrics(tmp_path / "calm"))
    last = metrics(tmp_path / "calm")[-1]
    assert 0 < last["tokens"] < 5 * 16 * 32
    assert last["valid/bits_per_byte"] == pytest.approx(last["valid/loss"] / np.log(2))
    # Another template makes other data, of which a resume warns.
    (tmp_path / "own.jinja").write_text(template.CHATML + " ")
    prints = []
    for choice in ("", "chatml", str(tmp_path / "own.jinja")):
        config.template = choice
        prints.append(streaming.open_files(config, ByteTokenizer(), 0, LENGTH, 0).fingerprint)
    config.template = ""
    assert prints[0] == prints[1] != prints[2]


def test_conversations_may_be_mixed_with_texts(data, random_dataset, tmp_path):
    """All targets of texts count. The conversations come first, since their marks say where documents end."""
    folder, _ = data
    mixture = f"{random_dataset} 0.5, {folder / 'data'} 0.5"
    config, read = config_of(folder, dataset__mixture=mixture)
    ids, _ = read.rows.read(np.arange(600), LENGTH)  # in an order that hangs on the folders' names
    counts = (ids[:, 1:] < marks.IGNORED).mean(1)
    assert ids.dtype == np.uint32
    assert (counts[::2] == 1).all()
    assert 0.1 < counts[1::2].mean() < 0.9
    config = tiny.get_config()
    config.dataset.update(path=str(random_dataset), mixture=mixture)
    with pytest.raises(ConfigError, match=r"has conversations, .* texts: exchange the two"):
        training_data.read(config, config.dataset.path, resolve, tmp_path)
