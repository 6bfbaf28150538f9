"""Conversations to ids with marks, as `reader.encode` makes ids of texts."""

import numpy as np

from trainit.data.documents.reader import Broken, Document, Fields
from trainit.tokenizers import Tokenizer
from trainit.tokenizers.chat.encode import encode as encode_one


def fields(text: str, subset: str, chat: object) -> Fields:
    """The dotted names of what is read of a line; conversations (`chat`) may have tools, too."""
    return text, subset, *(["tools"] if chat else [])


def encode(
    documents: list[Document], tokenizer: Tokenizer, settings: str, file: str
) -> tuple[list[Document], list[np.ndarray], list[Broken]]:
    """Returns the conversations that can be written, the marked ids of each, and those that cannot.

    The text of a document is the JSON of `conversation.checked`; `settings` are those of `template.settings`.
    """
    kept, encoded, broken = [], [], []
    for document in documents:
        try:
            encoded.append(encode_one(document.text, tokenizer, settings))
            kept.append(document)
        except ValueError as error:
            broken.append(Broken(file, document.line, " ".join(str(error).split())))
    return kept, encoded, broken
