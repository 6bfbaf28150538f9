"""Vocabularies of the library sentencepiece."""

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

from trainit.tokenizers.base import SPACE, SURROGATES, Vocabulary, piece_bytes


class SentencePieceTokenizer(Vocabulary):
    """A sentencepiece model (Kudo & Richardson 2018, arXiv 1808.06226).

    Its character for a space, U+2581, is encoded as bytes where it stands in a text.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, end_of_text: int | None = None):
        import sentencepiece

        self._content = model
        try:
            self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model: {error}") from None
        self.end_of_text = p.eos_id()
        if self.end_of_text < 0:
            raise ValueError("the sentencepiece model has no end-of-sentence id, which ends each document")
        self.table = [piece_bytes(p.id_to_piece(i), p.is_byte(i)) for i in range(p.vocab_size())]
        self.byte_ids = None
        self.prefixed = p.id_to_piece(p.encode("a")[0]).startswith(SPACE)
        if p.is_byte(p.piece_to_id("<0x00>")) and not self.prefixed:
            self.byte_ids = np.array([p.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)], np.int32)
            self.by_bytes = SURROGATES + SPACE
        for i in range(p.vocab_size()):
            if p.is_control(i) or p.is_unknown(i):
                self.table[i] = b""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, sample: int = 0) -> "SentencePieceTokenizer":
        """Byte-pair encoding in which every text is representable and decodes to itself.

        Bytes are the fallback, nothing is normalized, and the newline is a token of its own. `vocab_size`
        includes special ids and 256 bytes. At most `sample` lines are drawn from the texts; 0: all.
        Raises ValueError with what sentencepiece says, as when vocab_size does not fit the texts.
        """
        import sentencepiece

        model = io.BytesIO()
        sampled: Any = {"input_sentence_size": sample, "shuffle_input_sentence": True} if sample else {}
        lines = (line for text in texts for line in text.splitlines(keepends=True))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line.encode("utf8", "replace") for line in lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                required_chars=SPACE,  # else a text without spaces makes a model that loses them
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                user_defined_symbols=["\n"],
                eos_id=0,
                eos_piece="<|endoftext|>",
                unk_id=1,
                bos_id=-1,
                pad_id=-1,
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
                **sampled,
            )
        except RuntimeError as error:
            raise ValueError(f"sentencepiece cannot train with vocab_size={vocab_size}: {error}") from None
        return cls(model.getvalue())

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]
