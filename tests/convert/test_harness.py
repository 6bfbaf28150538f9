"""lm-evaluation-harness: the numbers of its own model class for transformers, on the same folder."""

import json
import re

import jax
import pytest
import tokenizers
from test_pretrained import make_folder

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from trainit.cluster import devices  # noqa: E402
from trainit.config import ConfigError, command_line  # noqa: E402
from trainit.generate.evaluate import command, harness, loaded  # noqa: E402

TEXT = "some words and more words, even more words than that. " * 9
PAIRS = [
    ("some words", " and more words"),
    ("some words ", "and more"),
    ("", "words alone"),
    (TEXT, " more words"),
    ("more\n", " some\n"),
]
UNTIL = {"until": ["w"], "max_gen_toks": 12}


@pytest.fixture(scope="module", params=["GPT-2", "Llama"])
def both(request, tmp_path_factory):
    """Our model of a folder on eight devices, by itself and in the harness, and the harness's own of it."""
    folder = tmp_path_factory.mktemp("model")
    make_folder(request.param, folder)
    rows = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    make_folder(request.param, folder, rows)  # every row is a token's, so that texts are of tokens
    parser = command_line.Parser("trainit evaluate", "")
    command.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "configure", lambda *_: None)  # the tests have done so
        flags = parser.parse([f"hf:{folder}", "--config.precision=float32"])
        model = loaded.load(flags, needs_data=False)
    assert jax.device_count() == 8
    # Its cache takes requests for one whose tokens are the same in all, wherever their contexts end.
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, logits_cache=False)
    return model, harness.HarnessModel(model), theirs


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.mark.evidence("log-likelihoods and texts in lm-evaluation-harness are those of its own model class")
def test_numbers_are_those_of_the_harness(both, monkeypatch):
    _, ours, theirs = both
    pairs = ask("loglikelihood", PAIRS)
    for (score, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy
    rolling = ask("loglikelihood_rolling", [(TEXT,), ("some words",)])
    expected = theirs.loglikelihood_rolling(rolling)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, rel=1e-4)
    longer = {"until": ["zzz"], "max_gen_toks": 9}
    texts = ask("generate_until", [("some words", UNTIL), (TEXT, UNTIL), ("more", longer)])
    expected = theirs.generate_until(texts)
    assert ours.generate_until(texts) == expected

    # An empty context is an end of text. One text at a time, or several together: they are the same.
    [begun] = theirs.generate_until(ask("generate_until", [("<|endoftext|>", longer)]))
    monkeypatch.setattr(harness, "TEXTS", 1)
    assert ours.generate_until([*texts, *ask("generate_until", [("", longer)])]) == [*expected, begun]


@pytest.mark.parametrize("both", ["GPT-2"], indirect=True)
def test_a_task_from_local_files(both, tmp_path):
    """A task that a YAML file describes, offline; one that nobody has."""
    model, _, theirs = both
    lines = [{"text": "some words", "choices": [" and more", " or less"], "label": i % 2} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/q.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    found, table = harness.run(model, "mine", str(tmp_path), None)
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=["mine"], task_manager=manager)["results"]["mine"]
    assert found["mine"]["acc,none"] == expected["acc,none"] == 0.5
    assert re.search(r"\|mine .*\|acc .*\|  0\.5\|", table)
    with pytest.raises(ConfigError, match="lm-eval has no task 'mien'"):
        harness.run(model, "mien", str(tmp_path), None)
