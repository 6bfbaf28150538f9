"""Conversations to ids with marks: what the assistant writes counts, as the chat template says.

A token counts if a part of it lies in what the assistant writes: its messages, and what the template writes
after each of them to end the turn. White space that follows a token which ends a turn does not count, unless
the template's own generation blocks contain it: nobody waits for it. The first token of a conversation never
counts, since it follows nothing.
"""

import functools
from typing import Any

import numpy as np
from absl import logging

from trainit.tokenizers.base import Tokenizer
from trainit.tokenizers.chat import template
from trainit.tokenizers.chat.marks import mark
from trainit.tokenizers.chat.special import SpecialEncoder

_encoder: Any = functools.lru_cache(4)(SpecialEncoder)  # of a tokenizer, made once


def encode(conversation: str, tokenizer: Tokenizer, settings: str) -> np.ndarray:
    """Returns marked ids. Raises ValueError if the template fails, or none of its tokens would count."""
    written, encoder = template.of(settings).write(conversation), _encoder(tokenizer)
    ids, begins, ends = encoder(written.text)
    special = np.isin(ids, list(encoder.special.values()))
    counts = np.zeros(len(ids), bool)
    for begin, end in written.spans:
        own = np.flatnonzero((ends > begin) & (begins < end))
        if not written.exact and special[own].any():
            last = own[special[own]][-1]
            if not written.text[ends[last] : end].strip():
                own = own[own <= last]
        counts[own] = True
    counts[:1] = False
    if not counts.any():
        raise ValueError("the chat template marks nothing that the assistant writes: nothing would count")
    return mark(ids, counts)


def log_template(where: str, settings: str, tokenizer: Tokenizer) -> None:
    """Logs which template is used, and what a tokenizer lacks for it."""
    logging.info("%-10s template: %s", "chat", where)
    marks = "<|im_start|>", "<|im_end|>"
    lacking = [name for name in marks if name in settings and len(_encoder(tokenizer)(name)[0]) != 1]
    if lacking:
        text = "the tokenizer has no %s, which the chat template writes: each is ordinary text of %d tokens"
        count = len(_encoder(tokenizer)(lacking[0])[0])
        logging.warning(f"%-10s {text}", "chat", " and no ".join(lacking), count)
