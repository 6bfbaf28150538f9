#!/usr/bin/env bash
# lm-evaluation-harness: a text's log-likelihood changes when another request has the same tokens, split elsewhere.
#
# Libraries: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0, on a CPU; its model class "hf" as it is by default.
# Guess: each (context, continuation) is scored by itself, so that a score does not depend on what else is asked for.
# Seen: the class keeps logits for choices of one token (logits_cache=True), by the tokens of context and continuation
#   without the last one. Two requests whose tokens are the same in all, but whose contexts end at different places,
#   share an entry: the second gets logits of the wrong positions, also where continuations have many tokens, and
#   its score is wrong. In loglikelihood_rolling this meets texts that repeat themselves, as logs and lists do.
#   With logits_cache=False each score is that of the request alone.
# What to do: logits_cache=False in the model's arguments, where a task splits texts at several places.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet lm-eval==0.4.13 accelerate==1.15.0 transformers==5.24.0 torch==2.13.0 tokenizers==0.23.3
cat > shares.py <<'PYTHON'
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=0))
for array in model.parameters():
    array.data += 0.3 * torch.randn_like(array)
words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, 50)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
text = [3, 1, 4, 1, 5, 9, 2, 6]
early, late = (None, text[:2], text[2:]), (None, text[:5], text[5:])


def right(context: list[int], continuation: list[int]) -> float:
    ids = context + continuation
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return sum(rows[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def differ(cache: bool) -> list[bool]:
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=cache)
    both = harness._loglikelihood_tokens([early, late], disable_tqdm=True)
    alone = [harness._loglikelihood_tokens([one], disable_tqdm=True)[0] for one in (early, late)]
    expected = [right(*early[1:]), right(*late[1:])]
    for name, scores in (("together", both), ("alone", alone)):
        print(f"logits_cache={cache}, {name}: {[round(score, 4) for score, _ in scores]}")
    print(f"by torch: {[round(score, 4) for score in expected]}")
    assert all(abs(score - value) < 1e-3 for (score, _), value in zip(alone, expected))
    return [abs(score - value) > 1e-2 for (score, _), value in zip(both, expected)]


raise SystemExit(0 if any(differ(True)) and not any(differ(False)) else 1)
PYTHON
env/bin/python shares.py 2> errors.txt || { tail -20 errors.txt; echo "not as described"; exit 1; }
echo "as described: together, a score is wrong; alone or without the cache, it is right"
